"""A store is a function of its tokens and settings: however they came, it is bit for bit what a fresh one would be."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch import Tensor

from magicpig import Config
from magicpig.attention.prefill import prefill
from magicpig.attention.step import attend_stores, decode_step
from magicpig.store import KVStore
from magicpig.store.disk import pack, read_tensors, unpack, write_tensors

G, H, D = 2, 4, 40
STRIDE = 16
SMALL: dict[str, Any] = {"sinks": 3, "recent": 10, "block": STRIDE, "exact_below": 40}
SETTINGS: dict[str, dict[str, Any]] = {
    "sketch": {"budget": 12},
    "sketch, one phase": {"budget": 12, "candidates": 12},
    "sketch, epsilon": {"budget": 4, "epsilon": 0.5, "bits": 3},
    "sketch, no centre": {"budget": 12, "centre": False},
    "sketch, int8": {"budget": 12, "kv_dtype": "int8"},
    "lsh": {"K": 4, "L": 12, "min_hits": 1},
    "lsh, no window": {"K": 4, "L": 12, "min_hits": 1, "recent": 0},
    "lsh, int8": {"K": 4, "L": 12, "min_hits": 1, "kv_dtype": "int8"},
    "quest": {"sampler": "quest", "budget": 20},
    "oracle": {"sampler": "oracle", "budget": 8},
    "full, int8": {"sampler": "full", "kv_dtype": "int8"},
}


def tokens(n: int) -> tuple[Tensor, Tensor]:
    """Keys around a mean of their own, as models have them, and values."""
    return (torch.randn(G, n, D) + 3 * torch.linspace(-1, 1, D)).bfloat16(), torch.randn(G, n, D).bfloat16()


def new_store(config: Config) -> KVStore:
    return KVStore(G, D, torch.bfloat16, config, layer=5, first_head=3)


def fresh(config: Config, keys: Tensor, values: Tensor) -> KVStore:
    store = new_store(config)
    if keys.shape[1]:
        store.append(keys, values)
    return store


def assert_same_rows(store: KVStore, other: KVStore) -> None:
    assert (store.length, store.flushed) == (other.length, other.flushed)
    for (a, a_centre), (b, b_centre) in zip(
        store.pieces(0, store.flushed), other.pieces(0, store.flushed), strict=True
    ):
        assert torch.equal(a, b)
        assert (a_centre is None and b_centre is None) or torch.equal(a_centre, b_centre)
    for (a, b), (c, d) in zip(store.blocks(), other.blocks(), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def assert_same_index(store: KVStore, other: KVStore) -> None:
    assert store.indexed_to == other.indexed_to
    ours, theirs = store.index.tensors(), other.index.tensors()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def assert_same_step(store: KVStore, other: KVStore) -> None:
    """Both are forked, so that the token that is decoded stays out of them."""
    query, keys, values = torch.randn(1, H, D), torch.randn(1, G, D), torch.randn(1, G, D)
    new = [x.bfloat16() for x in (query, keys, values)]
    pair = [store.fork(), other.fork()]
    outputs = [decode_step(*new, [each], scale=D**-0.5) for each in pair]
    assert torch.equal(outputs[0].output, outputs[1].output)
    assert torch.equal(outputs[0].lse, outputs[1].lse)
    drawn = [attend_stores(new[0], [each], scale=D**-0.5)[1] for each in pair]
    for ours, theirs in zip(drawn[0].ids[0] + drawn[0].log_u[0], drawn[1].ids[0] + drawn[1].log_u[0], strict=True):
        assert torch.equal(ours, theirs)


class Stores(RuleBasedStateMachine):
    """Up to four stores, each beside its tokens."""

    config: Config

    @initialize(n=st.sampled_from([0, 1, 39, 60, 4085]))
    def begin(self, n: int) -> None:
        torch.manual_seed(n)
        keys, values = tokens(n)
        self.stores = [fresh(self.config, keys, values)]
        self.held = [(keys, values)]

    def at(self, which: int) -> int:
        return which % len(self.stores)

    def extend(self, i: int, keys: Tensor, values: Tensor) -> None:
        self.held[i] = torch.cat([self.held[i][0], keys], 1), torch.cat([self.held[i][1], values], 1)

    @rule(which=st.integers(0, 3), n=st.sampled_from([1, 2, 9, 16, 17, 50, 300]))
    def append(self, which: int, n: int) -> None:
        keys, values = tokens(n)
        self.stores[self.at(which)].append(keys, values)
        self.extend(self.at(which), keys, values)

    @rule(which=st.integers(0, 3), n=st.sampled_from([1, 7, 16, 40]))
    def read(self, which: int, n: int) -> None:
        keys, values = tokens(n)
        prefill(torch.randn(H, n, D).bfloat16(), keys, values, self.stores[self.at(which)], scale=D**-0.5)
        self.extend(self.at(which), keys, values)

    @rule(steps=st.integers(1, 40))
    def decode(self, steps: int) -> None:
        for _ in range(steps):
            new = [tokens(1) for _ in self.stores]
            keys, values = (torch.stack([each[part][:, 0] for each in new]) for part in (0, 1))
            query = torch.randn(len(self.stores), H, D).bfloat16()
            decode_step(query, keys, values, self.stores, scale=D**-0.5)
            for i, each in enumerate(new):
                self.extend(i, *each)

    @rule(which=st.integers(0, 3))
    def settle(self, which: int) -> None:
        self.stores[self.at(which)].settle()

    @rule(which=st.integers(0, 3))
    def fork(self, which: int) -> None:
        i = self.at(which)
        if len(self.stores) < 4:
            self.stores.append(self.stores[i].fork())
            self.held.append(self.held[i])

    @rule(which=st.integers(0, 3), back=st.integers(0, 2 * STRIDE), deep=st.integers(0, 300))
    def crop(self, which: int, back: int, deep: int) -> None:
        i = self.at(which)
        length = self.held[i][0].shape[1]
        if self.config.kv_dtype == "int8":  # bit for bit at the end of a stride, and in the last two: see KVStore.crop
            self.stores[i].tidy()
            least = self.stores[i].flushed - (STRIDE if self.stores[i].previous is not None else 0)
            to = max(0, length - back, least) if back else max(0, length - deep) // STRIDE * STRIDE
        else:
            to = max(0, length - deep)
        self.stores[i].crop(to)
        self.held[i] = self.held[i][0][:, :to], self.held[i][1][:, :to]

    @rule(which=st.integers(0, 3))
    def save_and_load(self, which: int) -> None:
        i, tensors = self.at(which), {}
        packed = pack(self.stores[i], "0", tensors)
        with tempfile.TemporaryDirectory() as folder:
            write_tensors(Path(folder) / "store", "test", packed, tensors)
            manifest, read = read_tensors(Path(folder) / "store", "test")
            self.stores[i] = unpack(manifest, "0", read)

    @rule(which=st.integers(0, 3), chunks=st.lists(st.integers(1, 70), min_size=1, max_size=6), indexes=st.booleans())
    def preempt_and_resume(self, which: int, chunks: list[int], indexes: bool) -> None:
        """The store is dropped, and its tokens are read again in other pieces."""
        i, done = self.at(which), 0
        keys, values = self.held[i]
        store = new_store(self.config)
        for n in [*chunks, keys.shape[1]]:
            new = keys[:, done : done + n], values[:, done : done + n]
            if new[0].shape[1]:
                store.append(*new)
            if indexes:
                store.settle()
            done = min(done + n, keys.shape[1])
        self.stores[i] = store

    @rule(which=st.integers(0, 3))
    def compare(self, which: int) -> None:
        store = self.stores[self.at(which)]
        store.tidy()
        other = fresh(self.config, *self.held[self.at(which)])
        assert_same_step(store, other)
        store.settle()
        other.settle()
        assert_same_rows(store, other)
        assert_same_index(store, other)

    def teardown(self) -> None:
        for which in range(len(getattr(self, "stores", []))):
            self.compare(which)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_store_is_what_a_fresh_one_would_be(name: str) -> None:
    class Machine(Stores):
        config = Config(**{**SMALL, **SETTINGS[name]})

    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    case = Machine.TestCase
    case.settings = settings(max_examples=6, stateful_step_count=14, deadline=None, suppress_health_check=checks)
    case("runTest").runTest()
