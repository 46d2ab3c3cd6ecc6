"""MagicPigCache as transformers sees it: positions count padding, stores do not; misuse is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from magicpig import Config
from magicpig.integrations.transformers import MagicPigCache, attach
from magicpig.integrations.transformers.compat import CACHE, cache_argument
from magicpig.integrations.transformers.layer import MagicPigLayer

Tiny = Callable[[str], PreTrainedModel]
Tokens = Callable[..., Tensor]
RULE: dict[str, Any] = {"scale": 0.25, "softcap": None, "sink_logits": None}


def feed(layer: MagicPigLayer, T: int, mask: Tensor | None = None, B: int = 2) -> Tensor:
    keys, _ = layer.update(torch.randn(B, 2, T, 16), torch.randn(B, 2, T, 16))
    return layer.attend(torch.randn(B, 4, T, 16), keys, mask, **RULE)


@pytest.fixture
def layer() -> MagicPigLayer:
    return MagicPigLayer(Config(), 1)


def lengths(layer: MagicPigLayer) -> list[int]:
    return [store.length for store in layer.stores]


def test_padding_is_counted_but_not_stored(layer: MagicPigLayer) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    output = feed(layer, 5, mask)
    assert output.shape == (2, 5, 4, 16)
    assert layer.get_seq_length() == 5
    assert layer.get_mask_sizes(3) == (8, 0)
    assert layer.batch_size == 2
    assert lengths(layer) == [3, 4]
    assert (output[mask == 0] == 0).all()
    assert (output[mask == 1] != 0).any(-1).all()
    mask = torch.cat([mask, torch.tensor([[1], [0]])], 1)
    output = feed(layer, 1, mask)
    assert lengths(layer) == [4, 4]
    assert (output[0] != 0).any()
    assert (output[1] == 0).all()


def test_a_sequence_of_padding_alone_gives_no_nan(layer: MagicPigLayer) -> None:
    mask = torch.tensor([[0, 0, 0], [1, 1, 1]])
    assert (feed(layer, 3, mask)[0] == 0).all()
    assert lengths(layer) == [0, 3]
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
    assert feed(layer, 1, mask).isfinite().all()
    assert lengths(layer) == [1, 4]


def test_crop_counts_padding(layer: MagicPigLayer) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    feed(layer, 5, mask)
    layer.crop(-2)
    assert layer.get_seq_length() == 3
    assert lengths(layer) == [1, 3]
    layer.crop(0)
    assert lengths(layer) == [1, 3]
    feed(layer, 1, torch.cat([mask[:, :3], torch.ones(2, 1, dtype=torch.int64)], 1))
    layer.crop(-100)
    assert (layer.get_seq_length(), lengths(layer)) == (0, [0, 0])
    with pytest.raises(ValueError, match="tokens_to_remove=3 must be negative"):
        layer.crop(3)


def test_reset_makes_it_new(layer: MagicPigLayer) -> None:
    feed(layer, 5, torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
    layer.reset()
    assert layer.get_seq_length() == 0
    feed(layer, 3, B=3)
    assert lengths(layer) == [3, 3, 3]


def test_selecting_rows_takes_their_padding_along(layer: MagicPigLayer) -> None:
    layer.reorder_cache(torch.tensor([0]))  # nothing there yet: nothing happens
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    feed(layer, 3, mask)
    layer.batch_repeat_interleave(2)
    assert lengths(layer) == [1, 1, 3, 3]
    layer.batch_select_indices(torch.tensor([3, 0]))
    assert lengths(layer) == [3, 1]
    feed(layer, 1, torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]))
    assert lengths(layer) == [4, 2]


@pytest.mark.parametrize(
    "mask",
    [None, torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])],
    ids=["forgotten", "one token appears", "one token disappears"],
)
def test_a_mask_that_changes_its_mind(layer: MagicPigLayer, mask: Tensor | None) -> None:
    feed(layer, 3, torch.tensor([[0, 1, 1], [1, 1, 1]]))
    with pytest.raises(ValueError, match=r"attention_mask has changed for a token .* \(sequence 0, position [01]\)"):
        feed(layer, 1, mask)


def test_a_mask_of_the_wrong_size(layer: MagicPigLayer) -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 4\); expected \(2, 3\)"):
        feed(layer, 3, torch.ones(2, 4))


def test_a_batch_of_another_size(layer: MagicPigLayer) -> None:
    feed(layer, 3)
    with pytest.raises(ValueError, match="a batch of 3 does not fit this cache, which holds 2 sequences"):
        feed(layer, 1, B=3)


def test_values_of_another_size(layer: MagicPigLayer) -> None:
    with pytest.raises(ValueError, match=r"keys have shape .* and its values"):
        layer.update(torch.zeros(1, 2, 3, 24), torch.zeros(1, 2, 3, 16))


def test_keys_that_are_not_numbers(layer: MagicPigLayer) -> None:
    keys, _ = layer.update(torch.full((1, 2, 3, 16), torch.nan), torch.zeros(1, 2, 3, 16))
    with pytest.raises(ValueError, match="keys has entries that are not finite"):
        layer.attend(torch.zeros(1, 4, 3, 16), keys, None, **RULE)


def test_float64_is_refused(layer: MagicPigLayer) -> None:
    with pytest.raises(ValueError, match=r"dtype=torch\.float64 is not supported"):
        layer.update(torch.zeros(1, 2, 3, 16).double(), torch.zeros(1, 2, 3, 16).double())


def test_keys_cannot_be_used_elsewhere(layer: MagicPigLayer) -> None:
    keys, values = layer.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16))
    with pytest.raises(AttributeError, match="there is no transpose of them"):
        keys.transpose(1, 2)
    layer.attend(torch.zeros(1, 4, 3, 16), keys, None, **RULE)
    with pytest.raises(ValueError, match="several of its layers attend to the same keys"):
        layer.attend(torch.zeros(1, 4, 3, 16), values, None, **RULE)


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_an_interrupted_forward_pass(layer: int, tiny: Tiny, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = attach(tiny("llama")), tokens(1, 12)
    cache = MagicPigCache(model.config)
    model(ids, **cache_argument(cache))
    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[layer], "attend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, :1], **cache_argument(cache))
    with pytest.raises(RuntimeError, match=r"interrupted.*use a new MagicPigCache"):
        model(ids[:, :1], **cache_argument(cache))


@torch.no_grad()
def test_an_interruption_between_layers(tiny: Tiny, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = attach(tiny("llama")), tokens(1, 12)
    cache = MagicPigCache(model.config)
    model(ids, **cache_argument(cache))
    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[1], "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, :1], **cache_argument(cache))
    with pytest.raises(RuntimeError, match="layers 0 and 1 have not seen the same tokens"):
        model(ids[:, :1], **cache_argument(cache))


def test_another_cache_is_exact_and_says_so(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = attach(tiny("llama")), tokens(1, 12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :8], **cache_argument(cache))
        with pytest.warns(UserWarning, match="not a MagicPigCache, so attention is exact"):
            logits = model(ids[:, 8:], **cache_argument(cache)).logits
        expected = model(ids, use_cache=False).logits[:, 8:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_static_cache_is_refused(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = attach(tiny("llama")), tokens(1, 12)
    with pytest.raises(ValueError, match="cache of fixed size"):
        model(ids, **cache_argument(StaticCache(config=model.config, max_cache_len=64)))
    with pytest.raises(ValueError, match=f"{CACHE} is a StaticCache"):
        model.generate(ids, **cache_argument(StaticCache(config=model.config, max_cache_len=64)))


@torch.no_grad()
def test_a_sliding_layer_keeps_its_stock_cache(tiny: Tiny, tokens: Tokens) -> None:
    model = attach(tiny("gemma2"))
    cache = MagicPigCache(model.config)
    model(tokens(2, 30), **cache_argument(cache))
    assert cache.is_sliding == [True, False]
    sliding, full = cache.report().layers
    assert (sliding.kind, full.kind) == ("sliding", "sampled")
    assert sliding.tokens == 2 * 7  # a window of 8 less the next token
    assert full.tokens == cache.report().tokens == 2 * 30


def test_the_report_of_an_empty_cache(tiny: Tiny) -> None:
    report = MagicPigCache(tiny("gemma2").config).report()
    assert (report.tokens, report.kv_bytes, report.full_step_bytes, report.sampled_share_max) == (0, 0, 0, None)


@torch.no_grad()
def test_the_report_adds_up(tiny: Tiny, tokens: Tokens) -> None:
    model = attach(tiny("llama"))
    settings: dict[str, Any] = {
        "K": 4,
        "L": 16,
        "sinks": 2,
        "recent": 6,
        "block": 8,
        "exact_below": 0,
        "dense_layers": (0,),
    }
    cache = MagicPigCache(model.config, Config(**settings))
    ids = tokens(1, 48)
    for first, last in [(0, 47), (47, 48)]:
        model(ids[:, first:last], **cache_argument(cache))
    report = cache.report()
    dense, sampled = report.layers
    assert (dense.kind, dense.indexed, dense.index_bytes) == ("dense", 0, 0)
    # 47 tokens were there when the body was indexed: whole strides of 8 that leave 6 tokens, but for the 2 sinks
    assert (sampled.kind, sampled.tokens, sampled.indexed) == ("sampled", 48, 38)
    assert sampled.sampled_share_mean is not None
    assert sampled.sampled_share_max is not None
    assert 0 < sampled.sampled_share_mean <= sampled.sampled_share_max <= 1
    row = 2 * 16 * 4
    assert sampled.full_step_bytes == 48 * 2 * row
    drawn = min(2, 4 * sampled.sampled_share_mean) * 38  # four query heads, at most every row of both kv heads
    assert sampled.read_step_bytes == round((10 * 2 + drawn) * row)
    assert sampled.kv_bytes >= sampled.full_step_bytes
    assert sampled.index_bytes > 0
    for name in ("kv_bytes", "index_bytes", "full_step_bytes", "read_step_bytes"):
        assert getattr(report, name) == getattr(dense, name) + getattr(sampled, name)
    assert report.sampled_share_mean == sampled.sampled_share_mean


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("sampler", ["full", "lsh"])
def test_a_cache_of_whole_numbers_gives_nearly_the_same_logits(
    tiny: Tiny, tokens: Tokens, family: str, sampler: Any
) -> None:
    model, ids = attach(tiny(family)), tokens(2, 120)
    settings: dict[str, Any] = {"sampler": sampler, "K": 1, "L": 60, "block": 32, "exact_below": 0, "dense_layers": ()}
    logits = []
    for kv_dtype in ("model", "int8"):
        cache = MagicPigCache(model.config, Config(**settings, kv_dtype=kv_dtype))
        with torch.no_grad():
            for at in (slice(0, 50), slice(50, 118), slice(118, 119), slice(119, 120)):
                last = model(ids[:, at], **cache_argument(cache)).logits[:, -1]
        logits.append(last)
    # About 1 % in every layer; and the rows are rounded, or the two would be the same.
    error = (logits[1] - logits[0]).norm(dim=1) / logits[0].norm(dim=1)
    assert 1e-4 < float(error.max()) < 0.05


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_a_cache_filled_without_the_last_layers_attention_holds_the_same(
    tiny: Tiny, tokens: Tokens, family: str
) -> None:
    model = attach(tiny(family), Config(exact_below=0, dense_layers=()))
    ids = tokens(2, 120)
    whole, filled = MagicPigCache(model.config), MagicPigCache(model.config)
    with torch.no_grad():
        model(ids[:, :100], **cache_argument(whole))
        with filled.filling():
            model(ids[:, :60], **cache_argument(filled))
            model(ids[:, 60:100], **cache_argument(filled))
        model(ids[:, :100], **cache_argument(again := MagicPigCache(model.config)))
        logits = [model(ids[:, 100:], **cache_argument(cache)).logits for cache in (whole, filled, again)]
    # Two chunks add in another order than one.
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(logits[2], logits[0])
    if family == "llama":
        last = whole.layers[-1].stores[0], filled.layers[-1].stores[0]
        for (k, v), (k2, v2) in zip(*(list(store.blocks()) for store in last), strict=True):
            torch.testing.assert_close(k2, k, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(v2, v, rtol=1e-4, atol=1e-4)


def test_filling_skips_the_attention_of_the_last_layer_only(tiny: Tiny, tokens: Tokens) -> None:
    model = attach(tiny("llama"), Config())
    seen: dict[int, Tensor] = {}
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given, i=i: seen.__setitem__(i, given[0]))
        for i, layer in enumerate(model.model.layers)
    ]
    cache = MagicPigCache(model.config)
    with torch.no_grad(), cache.filling():
        model(tokens(1, 30), **cache_argument(cache))
    zero = [not bool(seen[i].any()) for i in sorted(seen)]
    assert zero == [False] * (len(zero) - 1) + [True]
    with torch.no_grad():
        model(tokens(1, 30), **cache_argument(MagicPigCache(model.config)))
    assert all(bool(x.any()) for x in seen.values())
    for hook in hooks:
        hook.remove()
