"""One prefill, many settings: `MagicPigCache.fork` and `settle`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from magicpig import Config
from magicpig.integrations.transformers import MagicPigCache, attach
from magicpig.integrations.transformers.compat import cache_argument

# Indexed from the first step on, and every 8 tokens from then on; about a third of the body is sampled.
SMALL: dict[str, Any] = {"K": 4, "L": 16, "sinks": 2, "recent": 6, "block": 8, "exact_below": 0, "dense_layers": ()}
LSH, FULL = Config(**SMALL), Config(**{**SMALL, "sampler": "full"})
SETTINGS = {
    "lsh": LSH,
    "another lsh": Config(**{**SMALL, "K": 3, "sinks": 5, "recent": 11, "seed": 3}),
    "one dense layer": Config(**{**SMALL, "dense_layers": (1,)}),
    "full": FULL,
    "keys as they are": Config(**{**SMALL, "centre": False}),
    "window": Config(**{**SMALL, "sampler": "window"}),
    "quest": Config(**{**SMALL, "sampler": "quest", "budget": 0.3}),
    "oracle": Config(**{**SMALL, "sampler": "oracle", "budget": 10}),
    "each layer its own": Config(**SMALL, layers={1: {"sampler": "oracle", "budget": 10}}),
}
FAMILIES = ["llama", "gemma2", "gpt_oss"]  # plain; softcap beside sliding layers; sink logits beside sliding layers

Tiny = Callable[[str], PreTrainedModel]
Tokens = Callable[..., Tensor]


def padding(ids: Tensor) -> Tensor:
    """The second sequence is nine tokens shorter."""
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    return mask


def read(model: PreTrainedModel, ids: Tensor, mask: Tensor, config: Config) -> MagicPigCache:
    cache = MagicPigCache(model.config, config)
    with torch.no_grad():
        model(ids, attention_mask=mask, **cache_argument(cache))
    return cache


def write(model: PreTrainedModel, cache: MagicPigCache, mask: Tensor, steps: int = 12, first: int = 5) -> Tensor:
    """Logits (steps, B, vocabulary) of greedy decoding from the token `first` on."""
    token, logits = torch.full((len(mask), 1), first), []
    for _ in range(steps):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        with torch.no_grad():
            logits.append(model(token, attention_mask=mask, **cache_argument(cache)).logits[:, -1])
        token = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits)


@pytest.mark.parametrize(("family", "prefilled_by"), [("llama", FULL), ("gemma2", LSH), ("gpt_oss", FULL)])
def test_a_fork_by_another_setting_is_a_prefill_by_it(
    family: str, prefilled_by: Config, tiny: Tiny, tokens: Tokens
) -> None:
    model, ids = attach(tiny(family)), tokens(2, 50)
    mask = padding(ids)
    cache = read(model, ids, mask, prefilled_by)
    for name, config in SETTINGS.items():
        fork = cache.fork(config)
        assert fork.config == config
        fresh = read(model, ids, mask, config)
        assert torch.equal(write(model, fork, mask), write(model, fresh, mask)), name
        assert fork.report() == fresh.report(), name
    assert cache.get_seq_length() == 50


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settled", [False, True])
def test_forks_go_their_own_ways(family: str, settled: bool, tiny: Tiny, tokens: Tokens) -> None:
    model, ids = attach(tiny(family)), tokens(2, 50)
    mask = padding(ids)

    def begin() -> tuple[MagicPigCache, Tensor]:
        cache, longer = read(model, ids, mask, LSH), mask
        if settled:
            write(model, cache, mask, steps=5)
            longer = torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], 1)
        return cache, longer

    cache, longer = begin()
    alone = [write(model, begin()[0], longer, first=first) for first in (5, 6, 7)]
    forks = [cache, cache.fork(), cache.fork()]
    assert torch.equal(write(model, forks[1], longer, first=6), alone[1])
    forks[2].reorder_cache(torch.tensor([0, 1]))
    assert torch.equal(write(model, forks[0], longer, first=5), alone[0])
    assert torch.equal(write(model, forks[2], longer, first=7), alone[2])
    assert [fork.get_seq_length() for fork in forks] == [longer.shape[1] + 12] * 3
    assert not torch.equal(alone[0], alone[1])


def test_a_fork_counts_what_it_reads_itself(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = attach(tiny("llama")), tokens(2, 50)
    mask = torch.ones_like(ids)
    cache = read(model, ids, mask, LSH)
    write(model, cache, mask, steps=3)
    before = cache.report().sampled_share_mean
    fork = cache.fork()
    assert before is not None
    assert fork.report().sampled_share_mean is None
    write(model, fork, torch.cat([mask, mask[:, :3]], 1), steps=3)
    assert fork.report().sampled_share_mean is not None
    assert cache.report().sampled_share_mean == before


def test_forks_of_a_short_prompt_may_differ_later(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = attach(tiny("llama")), tokens(2, 20)
    mask = torch.ones_like(ids)
    later = Config(**{**SMALL, "exact_below": 30})
    cache = read(model, ids, mask, later)
    write(model, cache, mask, steps=4)  # still exact, so still free to go on by anything
    fork = cache.fork(LSH)
    write(model, fork, torch.cat([mask, mask[:, :4]], 1), steps=1)
    assert all(layer.indexed == 2 * ((25 - 1 - 6) // 8 * 8 - 2) for layer in fork.report().layers)
    assert all(layer.indexed == 0 for layer in cache.report().layers)


@pytest.mark.parametrize("name", SETTINGS)
def test_another_setting_never_comes_too_late(name: str, tiny: Tiny, tokens: Tokens) -> None:
    """What is indexed by one setting goes on by another as if it had been read by that."""
    model, ids = attach(tiny("llama")), tokens(2, 50)
    mask = padding(ids)
    cache = read(model, ids, mask, Config(**{**SMALL, "seed": 9}))
    cache.settle()
    fork, fresh = cache.fork(SETTINGS[name]), read(model, ids, mask, SETTINGS[name])
    assert torch.equal(write(model, fork, mask), write(model, fresh, mask))
    assert fork.report() == fresh.report()


def test_whole_numbers_stay_what_they_are(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = attach(tiny("llama")), tokens(2, 50)
    cache = read(model, ids, torch.ones_like(ids), Config(**SMALL, kv_dtype="int8"))
    with pytest.raises(ValueError, match=r"^rows that are there stay as they are: kv_dtype cannot change in a fork"):
        cache.fork(LSH)


def test_an_empty_cache_forks(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = attach(tiny("gemma2")), tokens(1, 30)
    cache = MagicPigCache(model.config, FULL).fork(LSH)
    cache.settle()
    with torch.no_grad():
        model(ids, **cache_argument(cache))
    assert cache.report().layers[1].kind == "sampled"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_after_settling_is_sampled(family: str, tiny: Tiny, tokens: Tokens) -> None:
    model, ids = attach(tiny(family)), tokens(2, 70)
    context, question, mask = ids[:, :50], ids[:, 50:], padding(ids)
    cache = read(model, context, mask[:, :50], LSH)
    exact, sampled, stepwise = cache.fork(), cache.fork(), cache.fork()
    sampled.settle()
    stepwise.settle()
    with torch.no_grad():
        right = model(question, attention_mask=mask, **cache_argument(exact)).logits
        with sampled.decoding():
            ours = model(question, attention_mask=mask, **cache_argument(sampled)).logits
        steps = [
            model(question[:, t : t + 1], attention_mask=mask[:, : 51 + t], **cache_argument(stepwise)).logits
            for t in range(20)
        ]
    # Torch may round the other layers of 20 tokens otherwise than those of one.
    torch.testing.assert_close(ours, torch.cat(steps, 1), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(ours, right, atol=1e-2)
    assert exact.report().sampled_share_mean is None
    assert sampled.report().sampled_share_mean == pytest.approx(stepwise.report().sampled_share_mean, rel=0.05)


def test_forks_take_their_guesses_back_each_for_itself(tiny: Tiny, tokens: Tokens) -> None:
    """A guess of several tokens passes the point where a block is indexed; `crop` then goes back before it."""
    model, ids = attach(tiny("llama")), tokens(1, 60)

    def guess() -> MagicPigCache:
        cache = read(model, ids[:, :50], torch.ones(1, 50), LSH)
        cache.activate_past_recording()
        with torch.no_grad():
            model(ids[:, 50:51], **cache_argument(cache))
            model(ids[:, 51:60], **cache_argument(cache))
        return cache

    def go_on(cache: MagicPigCache) -> Tensor:
        cache.crop(-8)
        return write(model, cache, torch.ones(1, 52))

    alone, cache = go_on(guess()), guess()
    fork = cache.fork()
    assert torch.equal(go_on(fork), alone)
    assert torch.equal(go_on(cache), alone)


def test_an_interrupted_cache_does_not_fork(tiny: Tiny) -> None:
    cache = MagicPigCache(tiny("llama").config)
    cache.layers[0].update(torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16))
    with pytest.raises(RuntimeError, match=r"interrupted.*use a new MagicPigCache"):
        cache.fork()
