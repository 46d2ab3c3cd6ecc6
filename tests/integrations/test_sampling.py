"""Sampling really on: what the tokens may depend on (settings, seed) and what not (batch, beams, speculation)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from magicpig import Config
from magicpig.integrations.transformers import MagicPigCache, attach, detach
from magicpig.integrations.transformers.compat import cache_argument, cache_of
from magicpig.store import KVStore

# Indexed from the first step on, and every 8 tokens from then on; about a third of the body is sampled.
SMALL: dict[str, Any] = {
    "K": 4,
    "L": 16,
    "sinks": 2,
    "recent": 6,
    "block": 8,
    "exact_below": 0,
    "dense_layers": (),
}
FAMILIES = ["llama", "gemma2", "gpt_oss"]  # plain; softcap beside sliding layers; sink logits beside sliding layers

Tiny = Callable[[str], PreTrainedModel]
Tokens = Callable[..., Tensor]
Generate = Callable[..., Any]


def last_logits(model: PreTrainedModel, ids: Tensor, cache: MagicPigCache) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, **cache_argument(cache)).logits[:, -1]
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_and_is_deterministic(family: str, tiny: Tiny, tokens: Tokens, generate: Generate) -> None:
    model, ids = tiny(family), tokens(1, 100)
    runs = []
    for seed in (0, 0, 1):
        attach(model, **SMALL, seed=seed)
        cache = MagicPigCache(model.config, Config(**SMALL, seed=seed))
        runs.append(generate(model, ids, **cache_argument(cache), max_new_tokens=50))
        sampled = [layer for layer in cache.report().layers if layer.kind == "sampled"]
        assert sampled
        for layer in sampled:
            assert layer.tokens == 149
            assert layer.indexed > 120  # several blocks of new tokens among them
            assert layer.sampled_share_mean is not None
            assert 0.02 < layer.sampled_share_mean < 0.9
    first, again, other = runs
    assert all(torch.equal(a, b) for a, b in zip(first.logits, again.logits, strict=True))
    assert torch.equal(first.logits[0], other.logits[0])  # of the prompt, which is read exactly
    assert not torch.allclose(first.logits[1], other.logits[1], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_sampled_is_exact(family: str, tiny: Tiny, tokens: Tokens, generate: Generate) -> None:
    """One bit, 1024 tables, one hit: only a key opposite to the query could be missed."""
    model, ids = tiny(family), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    eager = generate(detach(model), ids, attention_mask=mask, max_new_tokens=40)
    attach(model, **{**SMALL, "K": 1, "L": 1024, "min_hits": 1})
    ours = generate(model, ids, attention_mask=mask, max_new_tokens=40)
    assert torch.equal(eager.sequences, ours.sequences)
    for a, b in zip(eager.logits, ours.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_does_not_see_its_batch(family: str, tiny: Tiny, tokens: Tokens, generate: Generate) -> None:
    model = attach(tiny(family), **SMALL)
    lengths = (40, 61, 33)
    longest = max(lengths)
    ids, mask = tokens(3, longest), torch.ones(3, longest, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, : longest - length] = 0
    together = generate(model, ids, attention_mask=mask, max_new_tokens=40).sequences
    for row, length in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, -length:], max_new_tokens=40).sequences
        assert torch.equal(alone[0, length:], together[row, longest:])


def test_forks_are_copies(tiny: Tiny, tokens: Tokens) -> None:
    """Sequences repeated, reordered and dropped go on exactly as if each had been alone from the start."""
    model = attach(tiny("llama"))
    config = Config(**SMALL)
    prompt, steps = tokens(1, 50), tokens(3, 40, seed=1)

    shared = MagicPigCache(model.config, config)
    last_logits(model, prompt, shared)
    last_logits(model, steps[:1, :1], shared)  # indexes the prompt
    shared.batch_repeat_interleave(3)
    assert shared.batch_size == 3
    for t in range(1, 20):
        last_logits(model, steps[:, t : t + 1], shared)
    shared.reorder_cache(torch.tensor([2, 0, 2]))  # 1 is dropped
    paths = [steps[2], steps[0], torch.cat([steps[2, :20], steps[1, 20:]])]
    branches = torch.stack(paths)
    for t in range(20, 39):
        last_logits(model, branches[:, t : t + 1], shared)
    shared.batch_select_indices(torch.tensor([True, False, True]))
    logits = last_logits(model, branches[[0, 2], 39:], shared)

    for row, path in enumerate((paths[0], paths[2])):
        alone = MagicPigCache(model.config, config)
        last_logits(model, prompt, alone)
        last_logits(model, steps[:1, :1], alone)
        for t in range(1, 39):
            last_logits(model, path[None, t : t + 1], alone)
        expected = last_logits(model, path[None, 39:], alone)
        torch.testing.assert_close(logits[row : row + 1], expected, atol=1e-4, rtol=1e-4)
    assert shared.report().sampled_share_mean is not None


def test_beams_are_as_good_as_their_scores(tiny: Tiny, tokens: Tokens, generate: Generate) -> None:
    """The score of a beam is the likelihood of its tokens when they are read alone, through all reordering."""
    model = attach(tiny("llama"), **SMALL)
    ids = tokens(2, 50)
    out = generate(
        model, ids, num_beams=3, num_return_sequences=3, max_new_tokens=30, output_scores=True, length_penalty=0.0
    )
    for row in (0, 2, 4):
        cache = MagicPigCache(model.config, Config(**SMALL))
        sequence = out.sequences[row : row + 1]
        logits = [last_logits(model, sequence[:, :50], cache)]
        logits += [last_logits(model, sequence[:, t : t + 1], cache) for t in range(50, 79)]
        likelihood = torch.cat(logits).log_softmax(-1).gather(1, sequence[0, 50:, None]).sum()
        torch.testing.assert_close(likelihood, out.sequences_scores[row], atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("exact_below", [0, 90], ids=["indexed at once", "indexed on the way"])
def test_prompt_lookup_changes_nothing(
    family: str,
    exact_below: int,
    tiny: Tiny,
    tokens: Tokens,
    generate: Generate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several proposed tokens are decoded one by one, and forgotten as if they had never been."""
    taken_back = 0
    crop = KVStore.crop

    def counted(store: KVStore, length: int) -> None:
        nonlocal taken_back
        taken_back += store.policy.index_end(length, store.spec.stride) < store.indexed_to
        crop(store, length)

    monkeypatch.setattr(KVStore, "crop", counted)
    model = attach(tiny(family), **{**SMALL, "exact_below": exact_below})
    # No token twice: nothing is proposed in the first forward pass, which is the prompt's and exact.
    ids = torch.randperm(90, generator=torch.Generator().manual_seed(0))[None, :70] + 3
    plain = generate(model, ids, max_new_tokens=120)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = model.register_forward_hook(count)
    assisted = generate(model, ids, max_new_tokens=120, prompt_lookup_num_tokens=5)
    hook.remove()
    assert torch.equal(plain.sequences, assisted.sequences)
    assert passes < 120
    if family != "gemma2":  # which soon repeats itself, so that hardly a proposal is wrong
        assert taken_back > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_on_an_indexed_cache(family: str, tiny: Tiny, tokens: Tokens) -> None:
    """Several tokens are exact prefill, however few, unless they are said to be decoded."""
    model = attach(tiny(family))
    config = Config(**SMALL)
    prompt, turn = tokens(1, 60), tokens(1, 7, seed=1)

    def indexed() -> MagicPigCache:
        cache = MagicPigCache(model.config, config)
        last_logits(model, prompt, cache)
        cache.settle()
        return cache

    at_once, one_by_one, prefilled = indexed(), indexed(), indexed()
    with at_once.decoding():
        logits = last_logits(model, turn, at_once)
    for t in range(7):
        expected = last_logits(model, turn[:, t : t + 1], one_by_one)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert [layer.indexed for layer in at_once.report().layers] == [
        layer.indexed for layer in one_by_one.report().layers
    ]
    assert at_once.report().sampled_share_mean is not None

    exact = MagicPigCache(model.config, Config(sampler="full"))
    last_logits(model, prompt, exact)
    right = last_logits(model, turn, exact)
    assert not torch.allclose(right, logits, atol=1e-3)
    torch.testing.assert_close(last_logits(model, turn, prefilled), right, atol=1e-4, rtol=1e-4)
    assert prefilled.report().sampled_share_mean is None

    tokenwise = indexed()
    with tokenwise.prefilling():
        for t in range(7):
            ours = last_logits(model, turn[:, t : t + 1], tokenwise)
    torch.testing.assert_close(ours, right, atol=1e-4, rtol=1e-4)


def test_chunks_of_a_prompt_stay_exact(tiny: Tiny, tokens: Tokens, generate: Generate) -> None:
    """However small a chunk is."""
    model, ids = attach(tiny("llama"), **SMALL), tokens(1, 64)
    whole = generate(model, ids, max_new_tokens=20)
    chunked = generate(model, ids, max_new_tokens=20, prefill_chunk_size=8)
    assert torch.equal(whole.sequences, chunked.sequences)
    torch.testing.assert_close(whole.logits[0], chunked.logits[0], atol=1e-4, rtol=1e-4)


def test_dense_layers_and_short_contexts_sample_nothing(tiny: Tiny, tokens: Tokens, generate: Generate) -> None:
    model, ids = attach(tiny("llama")), tokens(1, 50)
    for changes in ({"dense_layers": (0, 1)}, {"exact_below": 1000}, {"sampler": "full"}):
        cache = MagicPigCache(model.config, Config(**{**SMALL, **changes}))
        ours = generate(model, ids, **cache_argument(cache))
        report = cache.report()
        assert report.sampled_share_mean is None
        assert report.read_step_bytes == report.full_step_bytes > 0
        assert report.index_bytes == 0
        assert torch.equal(ours.sequences, generate(detach(model), ids).sequences)
        attach(model)


def test_each_layer_reads_by_its_own_settings(tiny: Tiny, tokens: Tokens, generate: Generate) -> None:
    model, ids = tiny("llama"), tokens(1, 100)
    own = {"sampler": "sketch", "budget": 9, "bits": 3}
    runs = []
    for config in (
        Config(**{**SMALL, **own}),
        Config(**SMALL, layers={0: own, 1: own}),
        Config(**SMALL, layers={0: own}),
    ):
        attach(model, config)
        runs.append(generate(model, ids))
    everywhere, each, first = runs
    assert all(torch.equal(a, b) for a, b in zip(everywhere.logits, each.logits, strict=True))
    assert not torch.equal(everywhere.logits[-1], first.logits[-1])
    sketched, hashed = cache_of(first).report().layers
    assert sketched.index_bytes == cache_of(everywhere).report().layers[0].index_bytes
    assert hashed.index_bytes != sketched.index_bytes  # tables


def test_half_precision(tiny: Tiny, tokens: Tokens, generate: Generate) -> None:
    ids = tokens(2, 60)
    for dtype in (torch.bfloat16, torch.float16):
        model = copy.deepcopy(tiny("llama")).to(dtype)
        attach(model, **SMALL)
        cache = MagicPigCache(model.config, Config(**SMALL))
        out = generate(model, ids, **cache_argument(cache))
        assert torch.stack(out.logits).isfinite().all()
        report = cache.report()
        # 2 sequences of 83 tokens, keys and values of 2 layers and 2 heads, 16 numbers of 2 bytes
        assert report.full_step_bytes == 2 * 83 * 2 * 2 * 2 * 16 * 2
        assert report.read_step_bytes < report.full_step_bytes
