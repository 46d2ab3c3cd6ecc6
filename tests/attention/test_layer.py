"""One step for sequences of all kinds: none of them depends on the others, and one that fails fails alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from magicpig import Config
from magicpig.attention.step import Phase, Segment, attend_layer, attend_stores, decode_step
from magicpig.errors import ArgumentError, InsufficientMemoryError, NotFiniteError
from magicpig.kernels.arena import UNLIMITED, Arena
from magicpig.store import KVStore

G, H, D = 2, 4, 64
SCALE = D**-0.5
SETTINGS = [
    Config(K=10, L=150, seed=1),
    Config(K=9, L=120, seed=2),
    Config(budget=128, seed=3),
    Config(budget=1024, epsilon=0.05, seed=4),
    Config(sampler="full"),
    Config(sampler="oracle", budget=64, seed=5),
    Config(kv_dtype="int8", budget=64, seed=6),
    Config(sampler="window"),
]


def filled(config: Config, tokens: int = 3000, *, arena: Arena = UNLIMITED, seed: int = 0) -> KVStore:
    store = KVStore(G, D, torch.bfloat16, config, layer=1, arena=arena)
    generator = torch.Generator().manual_seed(seed)
    store.append(*torch.randn(2, G, tokens, D, generator=generator))
    return store


def new_tokens(*shape: int) -> list[Tensor]:
    return [torch.randn(*shape, heads, D).bfloat16() for heads in (H, G, G)]


def held(store: KVStore) -> list[Tensor]:
    return [torch.cat(x, 1) for x in zip(*store.blocks(), strict=True)]


@pytest.mark.parametrize("bad", range(3), ids=["query", "keys", "values"])
def test_a_step_of_all_settings_gives_each_what_it_gets_alone_and_one_with_bad_numbers_fails_alone(bad: int) -> None:
    stores = [filled(config, seed=i) for i, config in enumerate(SETTINGS)]
    alone = [store.fork() for store in stores]
    new = new_tokens(len(stores))
    new[bad][1, 0, 3] = math.nan
    before = held(stores[1])
    segments = [Segment(store, i, 1, Phase.DECODE) for i, store in enumerate(stores)]
    result = attend_layer(segments, *new, scale=SCALE)
    for i, store in enumerate(alone):
        if i == 1:
            assert isinstance(result.errors[1], NotFiniteError)
            assert result.output[1].isnan().all()
            assert all(torch.equal(x, y) for x, y in zip(held(stores[1]), before, strict=True))
            assert stores[1].length == 3000
            continue
        own = decode_step(*(x[i : i + 1] for x in new), [store], scale=SCALE)
        assert result.errors[i] is None
        assert torch.equal(result.output[i], own.output[0])
        assert stores[i].length == 3001


def test_segments_of_any_length_and_phase_side_by_side() -> None:
    counts = [(40, Phase.PREFILL), (5, Phase.DECODE), (1, Phase.DECODE), (7, Phase.STORE), (3, Phase.DECODE)]
    configs = [Config(), Config(budget=64), Config(K=6, L=30), Config(), Config(kv_dtype="int8")]
    stores = [filled(config, seed=i) for i, config in enumerate(configs)]
    alone = [store.fork() for store in stores]
    new = new_tokens(sum(n for n, _ in counts))
    segments, begin = [], 0
    for store, (n, phase) in zip(stores, counts, strict=True):
        segments.append(Segment(store, begin, n, phase))
        begin += n
    result = attend_layer(segments, *new, scale=SCALE)
    for segment, store in zip(segments, alone, strict=True):
        at = slice(segment.begin, segment.begin + segment.count)
        own = attend_layer([Segment(store, 0, segment.count, segment.phase)], *(x[at] for x in new), scale=SCALE)
        assert torch.equal(result.output[at], own.output)
        assert all(torch.equal(x, y) for x, y in zip(held(segment.store), held(store), strict=True))
    assert result.output[46:53].eq(0).all()
    assert result.errors == [None] * 5


@pytest.mark.parametrize("phase", [Phase.STORE, Phase.PREFILL, Phase.DECODE, Phase.VERIFY])
@pytest.mark.parametrize("kv_dtype", ["model", "int8"])
def test_a_segment_that_fails_at_its_last_token_leaves_nothing_behind(phase: Phase, kv_dtype: str) -> None:
    store = filled(Config(budget=64, kv_dtype=kv_dtype), 2500)
    other = filled(Config(), seed=1)
    before, new = held(store), new_tokens(301)
    new[1][299, 1, 1] = math.inf
    result = attend_layer([Segment(store, 0, 300, phase), Segment(other, 300, 1, Phase.DECODE)], *new, scale=SCALE)
    assert isinstance(result.errors[0], NotFiniteError)
    assert result.errors[1] is None
    assert result.output[:300].isnan().all()
    assert result.output[300].isfinite().all()
    assert all(torch.equal(x, y) for x, y in zip(held(store), before, strict=True))


@pytest.mark.parametrize(
    "rule", [{}, {"softcap": 5.0, "sink_logits": torch.linspace(-1, 1, H)}], ids=["plain", "capped"]
)
@pytest.mark.parametrize("kv_dtype", ["model", "int8"])
@pytest.mark.parametrize("before", [0, 1, 255, 4094, 6143])
def test_verified_tokens_are_those_of_full_attention_to_the_bit(before: int, kv_dtype: str, rule: dict) -> None:
    """What was drafted before leaves no trace; the eleven tokens cross the end of a stride, and of a block."""
    config = Config(budget=64, kv_dtype=kv_dtype)
    store = KVStore(G, D, torch.bfloat16, config, layer=1) if before == 0 else filled(config, before)
    if before:
        full = store.fork(config.changed({"sampler": "full"}))
    else:
        full = KVStore(G, D, torch.bfloat16, config.changed({"sampler": "full"}), layer=1)
    drafted, new = new_tokens(9), new_tokens(11)
    attend_layer([Segment(store, 0, 9, Phase.DECODE)], *drafted, scale=SCALE, **rule)
    store.crop(before)
    verified = attend_layer([Segment(store, 0, 11, Phase.VERIFY)], *new, scale=SCALE, **rule)
    for t in range(11):
        one = attend_layer([Segment(full, 0, 1, Phase.DECODE)], *(x[t : t + 1] for x in new), scale=SCALE, **rule)
        assert torch.equal(one.output[0], verified.output[t]), t
        assert torch.equal(one.lse[0], verified.lse[t]), t
    assert all(torch.equal(x, y) for x, y in zip(held(store), held(full), strict=True))
    # And both go on alike.
    last = new_tokens(1)
    for each in (store, full):
        each.settle()
    states = [attend_layer([Segment(each, 0, 1, Phase.VERIFY)], *last, scale=SCALE, **rule) for each in (store, full)]
    assert torch.equal(states[0].output, states[1].output)
    assert store.stats.steps == 9


def test_a_sequence_that_finds_no_memory_fails_alone() -> None:
    arena = Arena()
    full = filled(Config(), 2048, arena=arena)
    other = filled(Config(), seed=1)
    arena.limit = arena.used
    for phase in (Phase.DECODE, Phase.PREFILL):
        new = new_tokens(2)
        result = attend_layer([Segment(full, 0, 1, phase), Segment(other, 1, 1, phase)], *new, scale=SCALE)
        assert isinstance(result.errors[0], InsufficientMemoryError)
        assert result.errors[1] is None
        assert (full.length, result.output[0].isnan().all()) == (2048, True)
    assert other.length == 3002


@pytest.mark.parametrize("config", [Config(budget=64), Config(sampler="oracle", budget=64)], ids=["sketch", "oracle"])
def test_layers_and_heads_have_their_own_luck(config: Config) -> None:
    """With flat attention a systematic sample is one of n / 64, equally likely: two are the same or apart."""
    query, drawn, body = torch.zeros(1, H, D).bfloat16(), [], 0
    for layer in range(20):
        store = KVStore(G, D, torch.bfloat16, config, layer=layer)
        store.append(*torch.randn(2, G, 2500, D))
        store.settle()
        body = store.body
        drawn += [set(ids.tolist()) for ids in attend_stores(query, [store], scale=SCALE)[1].ids[0][:: H // G]]
    pairs = [len(a & b) > 32 for i, a in enumerate(drawn) for b in drawn[i + 1 :]]
    expected = len(pairs) * 64 / body
    # Pairs are independent two by two, so that variances add up; five deviations.
    assert abs(sum(pairs) - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("config", SETTINGS[:7], ids=str)
def test_a_head_draws_the_same_wherever_it_lives(config: Config) -> None:
    keys, values = torch.randn(2, G, 4000, D).bfloat16()
    query = torch.randn(1, H, D).bfloat16()

    def drawn(first: int, heads: int) -> tuple[Tensor, list[Tensor]]:
        store = KVStore(heads, D, torch.bfloat16, config, layer=3, first_head=first)
        store.append(keys[first : first + heads], values[first : first + heads])
        store.settle()
        own = query[:, first * H // G : (first + heads) * H // G]
        state, info = attend_stores(own, [store], scale=SCALE)
        return state.output, info.ids[0] + info.log_u[0]

    whole, samples = drawn(0, G)
    (left, left_samples), (right, right_samples) = drawn(0, 1), drawn(1, 1)
    assert torch.equal(whole, torch.cat([left, right], 1))
    half = H // G
    split = left_samples[:half] + right_samples[:half] + left_samples[half:] + right_samples[half:]
    assert all(torch.equal(a, b) for a, b in zip(samples, split, strict=True))


def test_segments_that_do_not_fit_are_named() -> None:
    store, new = filled(Config(), 10), new_tokens(3)
    with pytest.raises(ArgumentError, match=r"^query has shape \(3, 4, 64\); expected \(2, H, 64\)$"):
        attend_layer([Segment(store, 0, 2, Phase.PREFILL)], *new, scale=SCALE)
    with pytest.raises(ArgumentError, match=r"^a segment has begin=1 and count=3; expected begin=0, behind the one"):
        attend_layer([Segment(store, 1, 3, Phase.PREFILL)], *new, scale=SCALE)
    with pytest.raises(ArgumentError, match=r"^stores has the same store twice; fork it$"):
        attend_layer([Segment(store, 0, 1, Phase.DECODE), Segment(store, 1, 2, Phase.DECODE)], *new, scale=SCALE)
