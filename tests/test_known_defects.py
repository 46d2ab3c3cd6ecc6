"""What the implementation released with MagicPIG gets wrong, and must not come back (the part that is code).

The part that is mathematics is in tests/theory/test_known_defects.py. Each test would fail on the defect it names.
"""

import math

import pytest
import torch
from torch import Tensor

from magicpig.attention.step import attend_stores, decode_step
from magicpig.config import Config
from magicpig.kernels import base, cpu, library
from magicpig.kernels.attend.reference import attend
from magicpig.store import KVStore

G, D = 2, 64


def token(B: int = 1, heads: int = G, head_dim: int = D) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, heads, head_dim), torch.randn(B, heads, head_dim), torch.randn(B, heads, head_dim)


def store_of(tokens: int, config: Config) -> KVStore:
    store = KVStore(G, D, torch.float32, config, sampled=True)
    store.append(torch.randn(G, tokens, D), torch.randn(G, tokens, D))
    return store


def assert_exact(query: Tensor, store: KVStore, output: Tensor, lse: Tensor, scale: float) -> None:
    keys = torch.cat([k for k, _ in store.blocks()], 1)
    values = torch.cat([v for _, v in store.blocks()], 1)
    for g in range(G):
        right = attend(query[0, g : g + 1].double(), keys[g].double(), values[g].double(), scale=scale)
        torch.testing.assert_close(output[0, g].double(), right.output[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[0, g].double(), right.lse[0], rtol=1e-5, atol=1e-5)


def test_generated_tokens_are_indexed_and_their_buffer_has_no_end():
    # Released: generated tokens go to a buffer of 256, never hashed; the 257th is written past its end.
    store = store_of(200, Config(K=4, L=20, exact_below=0, block=8))
    for i in range(1000):
        query, keys, values = token()
        decode_step(query, keys, values, [store], scale=0.125)
        assert store.length == 201 + i
        assert 64 <= store.length - store.indexed_to <= 64 + 256
    assert store.indexed_to > 200
    _, info = attend_stores(query, [store], scale=0.125)
    assert all((ids >= 200).any() for ids in info.ids[0])
    assert sum(k.shape[1] for k, _ in store.blocks()) == 1200


@pytest.mark.parametrize("tokens", [1, 69, 500, 2046])
def test_short_prompts_stay_exact_by_default(tokens):
    # Released: 98 % of the keys of a prompt of 100 tokens are left out as of one of 100 000.
    store = store_of(tokens, Config(sampler="lsh"))
    query, keys, values = token()
    state = decode_step(query, keys, values, [store], scale=0.125)
    assert not store.settled
    assert_exact(query, store, state.output, state.lse, 0.125)


def test_generation_that_grows_long_begins_to_sample():
    store = store_of(2040, Config(sampler="lsh"))
    for _ in range(20):
        decode_step(*token(), [store], scale=0.125)
    assert store.settled
    assert store.stats.body_rows > 0


@pytest.mark.parametrize("tokens", [*range(1, 8), 63, 64, 65, 66, 67, 68, 69, 70])
def test_prompts_no_longer_than_the_static_set_are_exact_and_never_nan(tokens):
    # Released: the mean over an empty body of a prompt of up to 68 tokens is 0 / 0.
    store = store_of(tokens, Config(K=1, L=1024, min_hits=1, exact_below=0, block=8))
    store.settle()
    for _ in range(10):
        query, keys, values = token()
        state = decode_step(query, keys, values, [store], scale=0.125)
        assert state.output.isfinite().all()
        assert state.lse.isfinite().all()
        if not store.settled:
            assert_exact(query, store, state.output, state.lse, 0.125)


def test_a_query_that_meets_no_key_reads_the_static_tokens():
    # Released: undefined behaviour, a softmax over nothing.
    store = store_of(500, Config(K=16, L=2, exact_below=0, block=8))
    store.settle()
    query = torch.randn(1, G, D)
    state, info = attend_stores(query, [store], scale=0.125)
    assert info.rows.eq(0).all()
    static = [*range(4), *range(432, 500)]
    keys, values = (torch.cat(x, 1) for x in zip(*store.blocks(), strict=True))
    for g in range(G):
        right = attend(
            query[0, g : g + 1].double(),
            keys[g, static].double(),
            values[g, static].double(),
            scale=0.125,
        )
        torch.testing.assert_close(state.output[0, g].double(), right.output[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(state.lse[0, g].double(), right.lse[0], rtol=1e-5, atol=1e-5)


def test_keys_along_the_query_are_certain_and_not_nan(isa):
    # Released: arccos of a cosine that rounding has made larger than one.
    config = Config(K=8, L=20, sinks=0, recent=0, exact_below=0, block=8)
    store = store_of(304, config)
    store.settle()
    keys = next(store.blocks())[0]
    for position in range(0, 300, 3):
        # Any length: the cosine is one up to a rounding either way.
        query = (keys[:, position] - store.index.tables[0].centre)[None] * (1 + position / 7)
        state, info = attend_stores(query, [store], scale=0.01)
        assert state.output.isfinite().all()
        for ids, log_u in zip(info.ids[0], info.log_u[0], strict=True):
            assert log_u[ids == position].abs().item() < 1e-6


@pytest.fixture(scope="module")
def two_gigabytes():
    # [136 heads, 4096 positions, 512 + 512 floats]: the rows of head 128 begin at 2^31 bytes.
    heads, head_dim = 136, 512
    store = KVStore(heads, head_dim, torch.float32, Config(), sampled=False)
    nothing = torch.zeros(1, 1, 1).expand(heads, base.BLOCK_ROWS - 1, head_dim)
    store.append(nothing, nothing)
    query, _, values = token(heads=heads, head_dim=head_dim)
    store.append(query[0, :, None], values[0, :, None])
    return store, query, values


@pytest.mark.slow
def test_rows_more_than_two_gigabytes_into_a_block_are_read(isa, two_gigabytes):
    store, query, values = two_gigabytes
    state, _ = attend_stores(query, [store], scale=1.0)
    assert store.nbytes().rows > 2**31
    # The new key is the query: exp(|q|^2), about e^500, against 4095 zeros.
    torch.testing.assert_close(state.output, values)
    torch.testing.assert_close(state.lse, query.square().sum(-1))
    stored_keys, stored_values = next(store.blocks())
    assert torch.equal(stored_keys[:, -1], query[0])
    assert torch.equal(stored_values[:, -1], values[0])


def test_sampled_rows_more_than_two_gigabytes_into_the_store_are_read(isa):
    head_dim = 512
    blocks = [library.empty((base.BLOCK_ROWS, 2 * head_dim), torch.float32) for _ in range(147)]
    assert sum(block.nbytes for block in blocks) > 2**31
    ids = torch.tensor([0, 65_535, 65_536, 131_072, 524_287, 524_288, 600_000])
    rows = torch.randn(len(ids), 2 * head_dim)
    for position, row in zip(ids.tolist(), rows, strict=True):
        blocks[position // base.BLOCK_ROWS][position % base.BLOCK_ROWS] = row
    query = torch.randn(head_dim)
    state = cpu.attend(query, blocks, ids, torch.zeros(len(ids)), scale=0.04)
    right = attend(query[None].double(), rows[:, :head_dim].double(), rows[:, head_dim:].double(), scale=0.04)
    torch.testing.assert_close(state.output.double(), right.output[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.lse.double(), right.lse[0], rtol=1e-5, atol=1e-5)


def test_consecutive_rows_of_more_than_two_gigabytes_are_read_to_the_end():
    head_dim, n = 512, 600_000
    rows = library.empty((n, 2 * head_dim), torch.float32)
    assert rows.nbytes > 2**31
    rows[-1] = 1.0
    state = cpu.attend_rows(torch.ones(1, head_dim), rows, scale=1.0)
    # One logit of 512 against zeros.
    assert state.output.eq(1.0).all()
    assert state.lse.item() == 512.0


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 17])
def test_any_number_of_threads_gives_the_same_result(threads):
    # Released: 64 threads in a header line, and a schedule for batch * heads == 32.
    stores = [store_of(700, Config(K=4, L=20, exact_below=0, block=8)) for _ in range(3)]
    for store in stores:
        store.settle()
    query = torch.randn(3, G, D)
    before = torch.get_num_threads()
    right, _ = attend_stores(query, stores, scale=0.125)
    try:
        torch.set_num_threads(threads)
        state, _ = attend_stores(query, stores, scale=0.125)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(state.output, right.output)
    assert torch.equal(state.lse, right.lse)


def test_no_instruction_set_beyond_the_compilers_is_needed():
    # Released: AVX-512 or nothing.
    assert "portable" in library.isa_levels(True)


def test_the_index_of_a_key_takes_two_bytes_per_table():
    # Released: 600 bytes per key and kv head for (10, 150), more than bfloat16 keys and values of 128 dimensions.
    config = Config(sampler="lsh", exact_below=0, block=8)
    sizes = []
    for tokens in [2064, 4064]:
        store = store_of(tokens, config)
        store.settle()
        sizes.append(store.nbytes().index)
    assert sizes[1] - sizes[0] == G * 2000 * 150 * 2


def test_weights_of_rare_keys_are_not_cut_off(isa):
    # Released: log(u + 1e-4) and an exp that is garbage below -88. u is e^-20 to e^-300 here.
    keys, values = torch.zeros(100, D), torch.randn(100, D)
    blocks = [cpu.interleave(keys, values)]
    for lowest in [-20.0, -100.0, -300.0]:
        log_u = torch.linspace(lowest, lowest + 5, 100)
        state = cpu.attend(torch.randn(D), blocks, torch.arange(100), log_u, scale=1.0)
        weights = (-log_u.double()).softmax(0)
        # Log probabilities of this size are rounded by 300 * 2^-24 each.
        torch.testing.assert_close(state.output.double(), weights @ values.double(), rtol=1e-4, atol=1e-4)
        assert state.lse.item() == pytest.approx((-log_u.double()).logsumexp(0).item(), rel=1e-6)
        assert math.isfinite(state.lse.item())
