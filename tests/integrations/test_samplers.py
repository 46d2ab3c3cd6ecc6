"""The samplers for comparison in a model: `attach(model, sampler="topk", budget=0.02)` and so on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from magicpig import Config, samplers
from magicpig.integrations.transformers import MagicPigCache, attach, detach
from magicpig.integrations.transformers.compat import cache_argument, cache_of

SMALL: dict[str, Any] = {"sinks": 2, "recent": 6, "block": 8, "exact_below": 0, "dense_layers": ()}
FAMILIES = ["llama", "gemma2", "gpt_oss"]  # plain; softcap beside sliding layers; sink logits beside sliding layers

Tiny = Callable[[str], PreTrainedModel]
Tokens = Callable[..., Tensor]
Generate = Callable[..., Any]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_for_everything_is_exact(family: str, tiny: Tiny, tokens: Tokens, generate: Generate) -> None:
    model, ids = tiny(family), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    eager = generate(detach(model), ids, attention_mask=mask)
    for sampler in ("topk", "quest"):
        attach(model, Config(sampler=sampler, budget=1000, **SMALL))
        ours = generate(model, ids, attention_mask=mask)
        assert torch.equal(eager.sequences, ours.sequences)
        for a, b in zip(eager.logits, ours.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sampler", [*samplers.CHOOSING, "window"])
def test_the_report_says_what_was_read(sampler: str, tiny: Tiny, tokens: Tokens, generate: Generate) -> None:
    model, ids = tiny("llama"), tokens(1, 100)
    config = Config(sampler=sampler, budget=20, **SMALL)
    attach(model, config)
    runs = [generate(model, ids) for _ in range(2)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    report = cache_of(runs[0]).report()
    # 23 decode steps; at each all whole strides of 8 are indexed that leave 6 tokens, less the sinks
    bodies = [(100 + t - 6) // 8 * 8 - 2 for t in range(23)]
    for layer in report.layers:
        assert (layer.kind, layer.tokens, layer.indexed) == ("sampled", 123, bodies[-1])
        assert layer.sampled_share_mean is not None
        assert layer.sampled_share_max is not None
        if sampler == "window":
            assert (layer.sampled_share_mean, layer.sampled_share_max) == (0, 0)
        elif sampler == "oracle-replacement":  # rows drawn repeatedly are read once
            assert 0 < layer.sampled_share_mean < 20 * 23 / sum(bodies)
        elif sampler == "quest":  # two whole pages, of which one may be the last, or have the sinks
            assert 18 * 23 / sum(bodies) <= layer.sampled_share_mean <= 32 * 23 / sum(bodies)
        else:
            assert layer.sampled_share_mean == pytest.approx(20 * 23 / sum(bodies))
            assert layer.sampled_share_max == pytest.approx(20 / bodies[0])
        assert (layer.index_bytes > 0) == (sampler == "quest")
    exact = generate(attach(model, sampler="full"), ids)
    torch.testing.assert_close(runs[0].logits[0], exact.logits[0], atol=1e-5, rtol=1e-5)  # of the prompt: read exactly
    assert not torch.allclose(runs[0].logits[1], exact.logits[1], atol=1e-4)


@pytest.mark.parametrize("sampler", ["oracle", "quest"])
def test_beams_and_several_answers(sampler: str, tiny: Tiny, tokens: Tokens, generate: Generate) -> None:
    """Beams fork and drop stores all the time. With rows for everything they are those of exact attention."""
    model, ids = tiny("llama"), tokens(2, 40)
    options = {"num_beams": 3, "num_return_sequences": 2}
    eager = generate(detach(model), ids, **options)
    ours = generate(attach(model, Config(sampler=sampler, budget=1000, **SMALL)), ids, **options)
    assert torch.equal(eager.sequences, ours.sequences)


def test_a_prompt_with_another_setting_in_the_cache(tiny: Tiny, tokens: Tokens, generate: Generate) -> None:
    """The cache decides, not what the model was attached with: one attached model serves all settings."""
    model, ids = attach(tiny("llama")), tokens(1, 80)
    config = Config(sampler="topk", budget=10, **SMALL)
    cache = MagicPigCache(model.config, Config(sampler="full"))
    with torch.no_grad():
        model(ids[:, :-1], **cache_argument(cache))
    forked = generate(model, ids, **cache_argument(cache.fork(config)))
    whole = generate(model, ids, **cache_argument(cache))
    assert cache_of(forked).report().sampled_share_max == pytest.approx(10 / ((80 - 1 - 6) // 8 * 8 - 2))
    assert cache_of(whole).report().sampled_share_max is None
    assert not torch.equal(forked.logits[0], whole.logits[0])
