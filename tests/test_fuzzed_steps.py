"""Steps of any shape against the reference, one after the other as hypothesis makes them up."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from magicpig import Config
from magicpig.attention.step import attend_stores, decode_step
from magicpig.kernels import base, cpu, library
from magicpig.kernels.attend import reference
from magicpig.kernels.tables.reference import lookup_brute_force
from magicpig.store import KVStore
from magicpig.types import Sample

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 0.1


@st.composite
def settings_of_a_store(draw: st.DrawFn) -> Config:
    return Config(
        sampler=draw(st.sampled_from(["full", "lsh", "sketch"])),
        kv_dtype=draw(st.sampled_from(["model", "int8"])),
        K=draw(st.integers(1, 16)),
        L=draw(st.integers(2, 70)),
        budget=draw(st.one_of(st.integers(1, 400), st.floats(0.01, 0.9))),
        candidates=draw(st.one_of(st.none(), st.integers(1, 500), st.floats(0.01, 0.99))),
        bits=draw(st.integers(1, 4)),
        epsilon=draw(st.sampled_from([None, 0.02])),
        sinks=draw(st.integers(0, 5)),
        recent=draw(st.integers(0, 40)),
        block=draw(st.sampled_from([8, 16, 32, 64, 128])),
        centre=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
        exact_below=0,
    )


@pytest.mark.parametrize("level", library.isa_levels(True))
@given(
    config=settings_of_a_store(),
    dtype=st.sampled_from(sorted(DTYPES)),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    head_dim=st.integers(1, 160),
    tokens=st.integers(1, 600),
    decoded=st.integers(0, 3),
    softcap=st.sampled_from([None, 2.0]),
)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_a_step_is_the_references(level, config, dtype, kv_heads, group, head_dim, tokens, decoded, softcap):
    before = library.isa()
    library.use_isa(level)
    try:
        torch.manual_seed(tokens)
        store = KVStore(kv_heads, head_dim, DTYPES[dtype], config, sampled=True)
        keys, values = (torch.randn(kv_heads, tokens + decoded, head_dim).to(DTYPES[dtype]) for _ in range(2))
        store.append(keys[:, :tokens], values[:, :tokens])
        for t in range(tokens, tokens + decoded):
            query = torch.randn(1, kv_heads * group, head_dim).to(DTYPES[dtype])
            decode_step(query, keys[None, :, t], values[None, :, t], [store], scale=SCALE, softcap=softcap)
        store.settle()
        compare(store, torch.randn(kv_heads * group, head_dim), softcap)
    finally:
        library.use_isa(before)


def compare(store: KVStore, query: Tensor, softcap: float | None) -> None:
    """One step over the store as it is with what the reference makes of the same rows and the same sample."""
    state, info = attend_stores(query[None], [store], scale=SCALE, softcap=softcap)
    keys, values = (torch.cat(x, 1).double() for x in zip(*stored(store), strict=True))
    begin, end = (store.config.sinks, store.indexed_to) if store.settled else (0, 0)
    exact = torch.cat([torch.arange(begin), torch.arange(end, store.length)])
    group = len(query) // store.kv_heads
    for h, q in enumerate(query.double()):
        sample, g = Sample(info.ids[0][h], info.log_u[0][h].double()), h // group
        assert_may_be_drawn(store, query[h], g, sample)
        read = torch.cat([exact, sample.ids])
        log_u = torch.cat([torch.zeros(len(exact)), sample.log_u])
        right = reference.attend(q[None], keys[g, read], values[g, read], scale=SCALE, log_u=log_u, softcap=softcap)
        # As in tests/test_decode.py: sums of float32 terms of logits of order one.
        assert float((state.output[0, h] - right.output[0]).norm()) <= 3e-5 * float(values[g].norm(dim=-1).max())
        assert float((state.lse[0, h] - right.lse[0]).abs()) <= 3e-5 * max(1.0, float(right.lse[0].abs()))


def assert_may_be_drawn(store: KVStore, query: Tensor, head: int, sample: Sample) -> None:
    config = store.config
    assert (sample.log_u <= 1e-6).all()
    assert (sample.ids.diff() > 0).all()
    if not store.settled:
        assert len(sample.ids) == 0
    elif config.sampler == "lsh":
        sampler, (segment,) = store.sampler.hasher, store.index.segments
        hashed_from = None if segment.centre is None else segment.centre.tensor
        codes = cpu.hash_rows([base.interleave_heads(query[None, None])], sampler)[0, :, 0].to(torch.int64)
        body = torch.cat([keys for keys, _ in stored(store)], 1)[:, : store.indexed_to]
        centres = [] if hashed_from is None else [hashed_from]
        of_body = cpu.hash_rows([base.interleave_heads(body)], sampler, centres)
        found = lookup_brute_force(codes, of_body[head].to(torch.int64).T, config.min_hits)
        assert torch.equal(sample.ids, found[found >= config.sinks])
    else:
        assert len(sample.ids) >= min(store.draw.budget_for(store.indexed_to - config.sinks), 1)
        assert (sample.ids >= config.sinks).all()
        assert (sample.ids < store.indexed_to).all()


def stored(store: KVStore) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values as a step reads them, in float32: of whole numbers with their centres."""
    for rows, centre in store.pieces(0, store.flushed):
        keys = store.layout.keys(rows, torch.float32)
        yield keys if centre is None else keys + centre[:, None], store.layout.values(rows, torch.float32)
    for keys, values in store.blocks(store.flushed):
        yield keys.float(), values.float()
