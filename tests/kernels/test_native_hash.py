"""Native codes against the reference's: the same wherever a sum is not within rounding of zero, on every level."""

import pytest
import torch
from torch import Tensor

from magicpig.attention.step import attend_stores
from magicpig.config import Config
from magicpig.kernels import base, cpu, library
from magicpig.kernels.hash.reference import hash_vectors, make_planes
from magicpig.samplers import sampler_of
from magicpig.settings import IndexSpec
from magicpig.store import KVStore

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIMS = [1, 16, 64, 80, 96, 128, 192, 256, 512]


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def random_keys(G: int, n: int, D: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(G, n, D).to(dtype)


def padded_rows(keys: Tensor, width: int | None = None) -> Tensor:
    """Keys (G, n, D) zero padded to Dp, at the start of rows of `width` >= Dp elements; the rest would hash wrongly."""
    G, n, D = keys.shape
    Dp = base.padded(D)
    rows = torch.full((G, n, width or Dp), 77.0, dtype=keys.dtype)
    rows[:, :, :D] = keys
    rows[:, :, D:Dp] = 0
    return rows


def native_codes(keys: Tensor, K: int, L: int, seed: int = 0, width: int | None = None) -> Tensor:
    """(G, n, L) int64."""
    sampler = cpu.make_sampler(keys.shape[2], K, L, seed)
    return cpu.hash_rows([padded_rows(keys, width)], sampler).to(torch.int64).mT


def bits_of(codes: Tensor, K: int) -> Tensor:
    return ((codes[..., None] >> torch.arange(K)) & 1).flatten(-2).bool()


def assert_codes_right(codes: Tensor, keys: Tensor, K: int, L: int, isa: str, seed: int = 0) -> None:
    x = keys.to(torch.float32).to(torch.bfloat16).to(torch.float64)
    planes = make_planes(keys.shape[2], K, L, seed).to(torch.float64)
    projections = x @ planes
    # A float32 sum of D products errs by at most D * 2^-24 * sum |x_i w_i| (to first order, hence D + 2), in any order.
    rounding = (keys.shape[2] + 2) * 2.0**-24 * (x.abs() @ planes.abs())
    decided = projections.abs() > rounding
    # Random projections hardly ever are that small: a bound that leaves out more would hide errors.
    assert decided.float().mean() > 0.99
    wrong = (bits_of(codes, K) != (projections > 0)) & decided
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} bits on {isa}"


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_codes_are_the_references(D, dtype, isa):
    K, L = 10, 13  # 130 directions: two full tiles of 64 and a piece of a third
    keys = random_keys(2, 53, D, dtype)
    assert_codes_right(native_codes(keys, K, L), keys, K, L, isa)


@pytest.mark.parametrize(
    ("K", "L"), [(1, 1), (1, 150), (5, 77), (8, 75), (10, 150), (11, 300), (12, 17), (15, 9), (16, 8)]
)
def test_codes_of_every_width_are_the_references(K, L, isa):
    keys = random_keys(1, 49, 64, torch.float32)
    codes = native_codes(keys, K, L, seed=K)
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 2**K
    assert_codes_right(codes, keys, K, L, isa, seed=K)


@pytest.mark.parametrize("n", [1, 5, 47, 48, 49, 193, 1000])
def test_any_number_of_keys(n, isa):
    K, L = 9, 21
    keys = random_keys(3, n, 80, torch.bfloat16)
    assert_codes_right(native_codes(keys, K, L), keys, K, L, isa)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_codes_are_those_of_the_reference_function_where_no_projection_is_near_zero(scale, isa):
    # float32 keys with all their bits: what is hashed of them is bfloat16, on every level. A float32 sum of D products
    # errs by at most (D + 2) * 2^-24 of the sum of magnitudes: a projection farther from zero has one sign everywhere.
    K, L, D = 8, 30, 96
    keys = scale * torch.randn(1, 300, D)
    planes = make_planes(D, K, L, seed=0)
    rounded = keys[0].to(torch.bfloat16).double()
    projections, magnitude = rounded @ planes.double(), rounded.abs() @ planes.double().abs()
    clear = (projections.abs() > (D + 2) * 2.0**-24 * magnitude).unflatten(-1, (L, K)).all(-1)
    assert clear.float().mean() > 0.99
    codes = native_codes(keys, K, L)[0]
    assert torch.equal(codes[clear], hash_vectors(keys[0], planes, K)[clear])
    # Not the ids of unrounded keys: these differ in a bit of a thousand.
    unrounded = (keys[0].double() @ planes.double() > 0) != (projections > 0)
    assert 1e-4 < unrounded.float().mean() < 1e-2


def test_a_zero_vector_has_code_zero(isa, dtype):
    keys = torch.zeros(2, 7, 80, dtype=dtype)
    assert native_codes(keys, 11, 14).eq(0).all()


@pytest.mark.parametrize("D", [64, 80])
def test_what_follows_a_key_in_its_row_is_not_hashed(D, isa, dtype):
    keys = random_keys(2, 50, D, dtype)
    codes = native_codes(keys, 10, 13)
    for extra in [1, 7, 64, 96]:
        assert torch.equal(native_codes(keys, 10, 13, width=base.padded(D) + extra), codes)


def test_codes_do_not_depend_on_how_keys_are_cut_into_pieces(isa):
    K, L = 10, 7
    rows = padded_rows(random_keys(2, 500, 96, torch.bfloat16))
    sampler = cpu.make_sampler(96, K, L, 0)
    whole = cpu.hash_rows([rows], sampler).to(torch.int64)
    for cuts in [[1, 499], [47, 48, 49, 356], [499, 1], [192, 193, 115]]:
        # Pieces of a larger block are strided views, as those of a store are.
        assert torch.equal(cpu.hash_rows(rows.split(cuts, dim=1), sampler).to(torch.int64), whole)


def test_every_pool_computes_the_same_codes(pool):
    keys = random_keys(2, 700, 128, torch.bfloat16)
    codes = native_codes(keys, 10, 20)
    library.use_pool("serial")
    assert torch.equal(codes, native_codes(keys, 10, 20))


@pytest.mark.parametrize("D", [1, 64, 80])
def test_keys_are_hashed_minus_a_centre(D, isa, dtype):
    keys, centre, sampler = random_keys(2, 50, D, dtype), torch.randn(2, D), cpu.make_sampler(D, 10, 13, 0)
    codes = cpu.hash_rows([padded_rows(keys)], sampler, [centre]).to(torch.int64).mT
    assert torch.equal(codes, native_codes(keys.float() - centre[:, None], 10, 13))


def test_seeds_draw_different_directions():
    keys = random_keys(1, 20, 64, torch.float32)
    agree = (native_codes(keys, 1, 1000, seed=0) == native_codes(keys, 1, 1000, seed=1)).float().mean()
    # Signs of independent directions agree half of the time; per direction the 20 keys are far from independent, so
    # the deviation is bounded by that of 1000 fair coins: 5 / (2 sqrt(1000)).
    assert abs(float(agree) - 0.5) < 0.08


@pytest.mark.parametrize("D", [1, 64, 80, 192])
def test_queries_are_hashed_as_keys_are(D, isa, dtype):
    # A query equal to a stored key less the centre agrees with it in all 127 tables, which min_hits asks for. One bit
    # that came out differently would lose the key; others have no chance of 127 agreements unless they are the same.
    config = Config(K=16, L=127, min_hits=127, sinks=2, recent=3, exact_below=0, block=8)
    store = KVStore(1, D, dtype, config, sampled=True)
    store.append(random_keys(1, 105, D, dtype), random_keys(1, 105, D, dtype))
    store.settle()
    assert store.settled
    stored = torch.cat([keys for keys, _ in store.blocks()], dim=1)[0].float() - store.index.tables[0].centre[0]
    for position in [2, 50, 95]:
        _, info = attend_stores(stored[None, position : position + 1], [store], scale=1.0)
        found = info.ids[0][0]
        assert position in found.tolist()
        same_side = torch.nn.functional.cosine_similarity(stored[found].float(), stored[position].float(), dim=-1)
        assert same_side.min() > 0.9999
    if D > 1:  # on a line half of all vectors share every sign
        _, info = attend_stores(torch.randn(1, 1, D).to(dtype), [store], scale=1.0)
        assert info.ids[0][0].tolist() == []


def test_one_sampler_serves_every_store_of_a_setting():
    first, again, other = (IndexSpec.of(Config(K=10, L=20, seed=seed)) for seed in (0, 0, 1))
    assert sampler_of(first, 64) is sampler_of(again, 64)
    assert sampler_of(first, 64) is not sampler_of(other, 64)
