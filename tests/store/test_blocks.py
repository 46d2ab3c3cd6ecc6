"""Memory: counted once however many share it, with a limit, and copied only where somebody writes."""

from __future__ import annotations

import pytest
import torch

from magicpig import Config
from magicpig.attention.step import attend_stores, decode_step
from magicpig.errors import ArgumentError, InsufficientMemoryError
from magicpig.kernels.arena import Arena
from magicpig.settings import DrawPolicy
from magicpig.store import KVStore

G, H, D = 2, 4, 64
STRIDE = 256


def filled(tokens: int, arena: Arena, config: Config | None = None) -> KVStore:
    store = KVStore(G, D, torch.bfloat16, config or Config(), arena=arena)
    store.append(torch.randn(G, tokens, D), torch.randn(G, tokens, D))
    return store


def step(store: KVStore) -> torch.Tensor:
    query, keys, values = (torch.randn(1, heads, D).bfloat16() for heads in (H, G, G))
    return decode_step(query, keys, values, [store], scale=D**-0.5).output


@pytest.mark.parametrize(
    "config", [Config(), Config(K=8, L=20), Config(kv_dtype="int8")], ids=["sketch", "lsh", "int8"]
)
def test_forks_of_a_settled_store_allocate_nothing_until_they_write_and_then_a_stride(config: Config) -> None:
    arena = Arena()
    store = filled(32768 + 100, arena, config)
    store.settle()
    before = arena.used
    forks = [store.fork() for _ in range(3)]
    assert arena.used == before
    stride = G * STRIDE * 2 * D * 2  # a bfloat16 key and value
    for i, fork in enumerate(forks):
        step(fork)
        assert arena.used == before + (i + 1) * stride
        assert all(x is y for x, y in zip(fork.index.memories(), store.index.memories(), strict=True))
    del forks, fork
    assert arena.used == before
    del store
    assert arena.used == 0


def test_a_fork_that_goes_on_first_writes_behind_what_is_shared_and_the_others_copy() -> None:
    arena = Arena()
    store = filled(2 * STRIDE, arena)
    first, second = store.fork(), store.fork()
    new = torch.randn(2, G, STRIDE, D)
    first.append(*new)
    assert first.rows(0)[0].data_ptr() == store.rows(0)[0].data_ptr() or first.rows(0)[0].shape[0] > 2 * STRIDE
    second.append(*-new)
    (ours, _), (theirs, _), (held, _) = (next(each.blocks(0)) for each in (first, second, store))
    assert torch.equal(ours[:, : 2 * STRIDE], held)
    assert torch.equal(theirs[:, : 2 * STRIDE], held)
    assert torch.equal(ours[:, 2 * STRIDE :], -theirs[:, 2 * STRIDE :])


def test_an_arena_at_its_limit_refuses_and_leaves_the_store_as_it_was() -> None:
    arena = Arena(limit=2 * G * 2048 * 2 * D * 2)
    store = filled(2048, arena, Config(exact_below=10**6))
    with pytest.raises(
        InsufficientMemoryError, match=r"^\d+ more bytes .* do not fit: \d+ are in use and the limit is"
    ):
        store.append(torch.randn(G, 100_000, D), torch.randn(G, 100_000, D))
    with pytest.raises(ArgumentError, match=r"^limit=-1 must not be negative$"):
        Arena(-1)


def test_what_is_drawn_may_change_at_any_step() -> None:
    arena = Arena()
    store = filled(8192, arena, Config(budget=64, candidates=128))
    store.settle()
    query, held = torch.randn(1, H, D).bfloat16(), arena.used

    def drawn() -> list[int]:
        return [len(ids) for ids in attend_stores(query, [store], scale=D**-0.5)[1].ids[0]]

    assert drawn() == [64] * H
    ids = attend_stores(query, [store], scale=D**-0.5)[1].ids[0][0]
    store.draw = DrawPolicy(64, 128, None, 2, seed=1)
    assert not torch.equal(attend_stores(query, [store], scale=D**-0.5)[1].ids[0][0], ids)
    store.draw = DrawPolicy(300, 600, None, 2, seed=0)
    assert drawn() == [300] * H
    store.draw = DrawPolicy(64, 128, None, 2, seed=0)
    assert torch.equal(attend_stores(query, [store], scale=D**-0.5)[1].ids[0][0], ids)
    assert arena.used == held
    with pytest.raises(ArgumentError, match=r"^min_hits=9 is out of range; allowed: 1 to L=8$"):
        filled(10, arena, Config(K=4, L=8)).draw = DrawPolicy(64, 128, None, 9, seed=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 64},
        {"candidates": 900},
        {"epsilon": 0.2},
        {"seed": 5},
        {"bits": 3},
        {"K": 6, "L": 30},
        {"recent": 300},
        {"block": 64},
    ],
    ids=str,
)
def test_a_settled_store_forks_to_other_settings_as_if_it_were_fresh(settings: dict) -> None:
    arena = Arena()
    store = filled(5000, arena)
    store.settle()
    keys, values = (torch.cat(x, 1) for x in zip(*store.blocks(), strict=True))
    config = Config(**settings)
    fork, fresh = store.fork(config), KVStore(G, D, torch.bfloat16, config, arena=arena)
    fresh.append(keys, values)
    assert (fork.index is store.index) == (not {"bits", "K", "recent", "block"} & set(settings))
    new = [torch.randn(1, heads, D).bfloat16() for heads in (H, G, G)]
    outputs = [decode_step(*new, [each], scale=D**-0.5).output for each in (fork, fresh)]
    assert torch.equal(*outputs)


def test_rows_of_whole_numbers_keep_what_they_were_rounded_by() -> None:
    store = filled(5000, Arena(), Config(kv_dtype="int8"))
    for settings in ({}, {"kv_dtype": "int8", "block": 64}, {"kv_dtype": "int8", "centre": False}):
        with pytest.raises(ArgumentError, match=r"^rows that are there stay as they are: kv_dtype cannot change"):
            store.fork(Config(**settings))
    store.fork(Config(kv_dtype="int8", K=5, L=10)).settle()
