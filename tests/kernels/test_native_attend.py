"""Native attention against float64: the rows are rounded as the store rounds them, everything else must be accurate."""

import math

import pytest
import torch
from torch import Tensor

from magicpig.attention.step import attend_stores
from magicpig.collision import log_inclusion
from magicpig.config import Config
from magicpig.kernels import base, cpu
from magicpig.kernels.attend import reference
from magicpig.kernels.rows.reference import from_bytes, to_bytes
from magicpig.store import KVStore
from magicpig.types import AttentionState

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIMS = [1, 40, 64, 80, 96, 128, 192, 256, 512]
GROUPS = [1, 2, 3, 4, 5, 7, 8, 16]
COUNTS = [1, 15, 16, 17, 31, 33, 1000, 4095, 4096, 4097, 9000]

# Of the whole output vector of a head, and absolute in its lse. Sums of 16 or 4096 float32 terms err by far less when
# logits are of order one: about D * 2^-24 in a logit, and the square root of the number of terms times 2^-24 in a sum.
RELATIVE_ERROR = 1e-5
EPS = 2.0**-24


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[*DTYPES.values(), torch.int8], ids=[*DTYPES.keys(), "int8"])
def stored(request: pytest.FixtureRequest) -> torch.dtype:
    """What rows are kept in."""
    return request.param


def rounded(x: Tensor, stored: torch.dtype) -> Tensor:
    """x as rows keep it. What has been int8 once is the same when it becomes so again."""
    return from_bytes(*to_bytes(x)) if stored == torch.int8 else x.to(stored)


def draw(R: int, n: int, D: int, stored: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(R, D), rounded(torch.randn(n, D), stored), rounded(torch.randn(n, D), stored)


def expected(query: Tensor, keys: Tensor, values: Tensor, **settings: object) -> AttentionState:
    return reference.attend(query.double(), keys.double(), values.double(), **settings)


def assert_states_close(state: AttentionState, right: AttentionState, tolerance: float = RELATIVE_ERROR) -> None:
    assert state.output.isfinite().all()
    error = (state.output - right.output).norm(dim=-1) / right.output.norm(dim=-1)
    assert float(error.max()) <= tolerance
    assert float((state.lse - right.lse).abs().max()) <= tolerance * max(1.0, float(right.lse.abs().max()))


def blocks_of(keys: Tensor, values: Tensor, stored: torch.dtype | None = None) -> list[Tensor]:
    return [block.contiguous() for block in cpu.interleave(keys, values, stored).split(base.BLOCK_ROWS)]


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_rows_of_every_width(D, stored, isa):
    query, keys, values = draw(4, 1000, D, stored)
    state = cpu.attend_rows(query, cpu.interleave(keys, values, stored), scale=D**-0.5)
    assert_states_close(state, expected(query, keys, values, scale=D**-0.5))


@pytest.mark.parametrize("R", GROUPS)
def test_groups_of_every_size(R, stored, isa):
    query, keys, values = draw(R, 77, 80, stored)
    state = cpu.attend_rows(query, cpu.interleave(keys, values, stored), scale=0.1)
    assert_states_close(state, expected(query, keys, values, scale=0.1))


@pytest.mark.parametrize("D", HEAD_DIMS[1:])  # of one value the mean may be next to nothing
@pytest.mark.parametrize("n", [1, 47, 4100])
def test_queries_of_bfloat16_meet_rows_of_bfloat16(n, D, isa):
    """They may be multiplied as they are, which is as exact."""
    query, keys, values = draw(5, n, D, torch.bfloat16)
    query = query.bfloat16().float()
    offset = torch.linspace(-4, 4, 5)
    rows = cpu.interleave(keys, values, torch.bfloat16)
    for softcap in (None, 3.0):
        state = cpu.attend_rows(query, rows, scale=D**-0.5, offset=offset, softcap=softcap or 0.0)
        right = expected(query, keys, values, scale=D**-0.5, offset=offset.double(), softcap=softcap)
        assert_states_close(state, right)


@pytest.mark.parametrize("D", [40, 64, 128, 512])
def test_what_one_query_gets_does_not_depend_on_how_many_come_with_it(D, stored, isa):
    """To the bit: more queries than meet a batch of rows at once, some of them of numbers that bfloat16 has."""
    query, keys, values = draw(75, 333, D, stored)
    query[::3] = query[::3].bfloat16().float()
    offset = torch.linspace(-4, 4, 75)
    rows = cpu.interleave(keys, values, stored)
    whole = cpu.attend_rows(query, rows, scale=D**-0.5, offset=offset)
    for first, count in ((0, 1), (1, 1), (3, 2), (7, 3), (10, 7), (31, 5), (40, 35)):
        some = slice(first, first + count)
        state = cpu.attend_rows(query[some], rows, scale=D**-0.5, offset=offset[some])
        assert torch.equal(state.output, whole.output[some])
        assert torch.equal(state.lse, whole.lse[some])


@pytest.mark.parametrize("n", COUNTS)
def test_any_number_of_rows(n, stored, isa):
    query, keys, values = draw(3, n, 64, stored)
    state = cpu.attend_rows(query, cpu.interleave(keys, values, stored), scale=0.125)
    assert_states_close(state, expected(query, keys, values, scale=0.125))


@pytest.mark.parametrize("softcap", [None, 0.5, 30.0], ids=str)
def test_rows_with_an_offset_per_head_and_a_softcap(softcap, stored, isa):
    query, keys, values = draw(7, 333, 96, stored)
    offset = torch.linspace(-40, 40, 7)
    rows = cpu.interleave(keys, values, stored)
    state = cpu.attend_rows(query, rows, scale=0.1, offset=offset, softcap=softcap or 0.0)
    right = expected(query, keys, values, scale=0.1, offset=offset.double(), softcap=softcap)
    # A float32 logit near 40 is rounded by 40 * 2^-24, far below the tolerance; so is a tanh, times the cap.
    assert_states_close(state, right)


def test_no_rows_give_an_empty_state(isa):
    state = cpu.attend_rows(torch.randn(3, 64), torch.empty(0, 128), scale=1.0)
    assert state.output.eq(0).all()
    assert state.lse.eq(-math.inf).all()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits(size, stored, isa):
    # Logits from about 0.9 to 1.1 times 1e4, of one sign: far outside the range of exp, and neither overflow nor
    # underflow may show.
    D = 64
    query, values = torch.ones(2, D), rounded(torch.randn(500, D), stored)
    keys = rounded(1 + 0.1 * torch.rand(500, D), stored)
    scale = size / D
    state = cpu.attend_rows(query, cpu.interleave(keys, values, stored), scale=scale)
    right = expected(query, keys, values, scale=scale)
    # A logit errs by D + 2 roundings of its size; a softmax weight by the difference of two such, relatively.
    error = 1.1 * abs(size) * (D + 2) * EPS
    assert float((state.lse - right.lse).abs().max()) <= error
    assert float((state.output - right.output).abs().max()) <= 2 * error * float(values.abs().max())


def test_logits_so_far_apart_that_one_row_takes_all(isa):
    query = torch.tensor([[1.0]])
    keys = torch.tensor([-1e4, 0.0, 3.0, 1e4, -5.0])[:, None]
    values = torch.arange(5.0)[:, None]
    state = cpu.attend_rows(query, cpu.interleave(keys, values), scale=1.0)
    assert state.output.item() == 3.0
    assert state.lse.item() == 1e4


def test_weights_below_the_underflow_of_exp_add_nothing(isa):
    # The truncating exp of the released implementation returned noise below -88.
    for gap in [80.0, 87.0, 88.0, 89.0, 103.0, 104.0, 1000.0, 1e30]:
        query, keys = torch.tensor([[1.0]]), torch.tensor([[0.0], [-gap]])
        rows = cpu.interleave(keys, torch.tensor([[0.0], [1.0]]))
        assert cpu.attend_rows(query, rows, scale=1.0).output.item() == pytest.approx(math.exp(-gap), abs=2e-38)


def test_the_maximum_may_come_last_or_first(isa):
    for keys in [torch.arange(-50.0, 50.0), torch.arange(50.0, -50.0, -1.0)]:
        values = torch.randn(100, 1)
        state = cpu.attend_rows(torch.ones(1, 1), cpu.interleave(keys[:, None], values), scale=1.0)
        assert_states_close(state, expected(torch.ones(1, 1), keys[:, None], values, scale=1.0))


@pytest.mark.parametrize("row", [0, 5, 16, 99])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_not_hidden(poison, row, dtype, isa):
    query, keys, values = draw(3, 100, 64, dtype)
    values[row, 7] = poison
    state = cpu.attend_rows(query, cpu.interleave(keys, values), scale=0.125)
    assert not state.output[:, 7].isfinite().any()
    assert state.output[:, :7].isfinite().all()


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_samples_of_every_width(D, stored, isa):
    query, keys, values = draw(1, 700, D, stored)
    ids = torch.randperm(700)[:333].sort().values
    log_u = -5 * torch.rand(333)
    state = cpu.attend(query[0], blocks_of(keys, values, stored), ids, log_u, scale=D**-0.5)
    right = expected(query, keys[ids], values[ids], scale=D**-0.5, log_u=log_u.double())
    assert_states_close(state, AttentionState(right.output[0], right.lse[0]))


@pytest.mark.parametrize("n", COUNTS)
def test_samples_of_any_size(n, stored, isa):
    tokens = 10_000  # three blocks, the last one short
    query, keys, values = draw(1, tokens, 64, stored)
    ids = torch.randperm(tokens)[:n].sort().values
    log_u = -5 * torch.rand(n)
    state = cpu.attend(query[0], blocks_of(keys, values, stored), ids, log_u, scale=0.125)
    right = expected(query, keys[ids], values[ids], scale=0.125, log_u=log_u.double())
    assert_states_close(state, AttentionState(right.output[0], right.lse[0]))


def test_a_sample_across_block_boundaries_reads_the_right_rows(dtype, isa):
    keys = torch.zeros(12_300, 40, dtype=dtype)
    values = torch.zeros(12_300, 40, dtype=dtype)
    ids = torch.tensor([0, 1, 4094, 4095, 4096, 4097, 8191, 8192, 8193, 12_287, 12_288, 12_299])
    values[ids, torch.arange(12)] = 1
    state = cpu.attend(torch.randn(40), blocks_of(keys, values), ids, torch.zeros(12), scale=1.0)
    # Twelve equal weights, each to its own column: any wrong row would leave a zero.
    assert torch.allclose(state.output, torch.where(torch.arange(40) < 12, 1 / 12, 0.0), atol=1e-7)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=str)
@pytest.mark.parametrize("offset", [0.0, -35.0])
def test_log_u_is_subtracted_after_the_softcap(softcap, offset, stored, isa):
    query, keys, values = draw(1, 200, 96, stored)
    ids, log_u = torch.arange(200), -20 * torch.rand(200)
    offsets = torch.tensor([offset])
    state = cpu.attend(
        query[0], blocks_of(keys, values, stored), ids, log_u, scale=0.1, offsets=offsets, softcap=softcap or 0.0
    )
    right = expected(
        query, keys, values, scale=0.1, log_u=log_u.double(), offset=torch.tensor([offset]), softcap=softcap
    )
    assert_states_close(state, AttentionState(right.output[0], right.lse[0]))


@pytest.mark.parametrize("n", [1, 31, 33, 4097])
def test_rows_of_a_sample_have_the_offset_of_their_block(n, stored, isa):
    query, keys, values = draw(1, 10_000, 40, stored)
    ids, log_u, offsets = torch.randperm(10_000)[:n].sort().values, -5 * torch.rand(n), torch.tensor([3.0, -20.0, 1.0])
    state = cpu.attend(query[0], blocks_of(keys, values, stored), ids, log_u, scale=0.15, offsets=offsets)
    logits = 0.15 * keys[ids].double() @ query[0].double() + offsets[ids // 4096].double() - log_u.double()
    assert_states_close(state, AttentionState(logits.softmax(0) @ values[ids].double(), logits.logsumexp(0)))


@pytest.mark.parametrize(
    ("D", "n", "softcap"), [(64, n, None) for n in (0, 1, 15, 33, 4097)] + [(D, 333, 3.0) for D in HEAD_DIMS]
)
def test_a_hashed_sample_sees_rows_less_their_centres(D, n, softcap, stored, isa):
    # Centres far longer than what is left of a key: products with the keys themselves would lose its digits.
    query, keys, values = draw(1, 9000, D, torch.float32)
    centres = 30 * torch.nn.functional.normalize(torch.randn(3, D), dim=1)
    keys, values = rounded(keys + centres.repeat_interleave(4096, 0)[:9000], stored), rounded(values, stored)
    offsets, law = torch.tensor([2.0, 0.0, -1.0]), cpu.make_law(6, 40, 2)
    away = keys.double() - centres.double().repeat_interleave(4096, 0)[:9000]
    cosines = torch.nn.functional.cosine_similarity(away, query.double(), dim=-1)
    # At a cosine of -1, all there is besides 1 in one dimension, nothing is ever drawn.
    ids = (torch.rand(9000) + (cosines < -0.9)).argsort()[:n].sort().values
    state, log_u = cpu.attend_hashed(
        query[0], blocks_of(keys, values, stored), ids, law,
        scale=0.2, centres=centres, offsets=offsets, keys_of_a_centre=4096, softcap=softcap or 0.0,
    )  # fmt: skip
    away, cosine = away[ids], cosines[ids]
    seen = cosine > -0.9
    # As for rows without a centre, and the rounding of a difference of numbers near 30.
    allowed = 1.5e-4 + 102 * 60 * EPS
    assert n == 0 or float((log_u - log_inclusion(cosine, 6, 40, 2))[seen].abs().max()) <= allowed
    logits = 0.2 * away @ query[0].double() + offsets[ids // 4096].double()
    logits = (logits if softcap is None else softcap * (logits / softcap).tanh()) - log_u.double()
    right = AttentionState(logits.softmax(0) @ values[ids].double(), logits.logsumexp(0))
    if n == 0:
        assert state.output.eq(0).all()
        assert state.lse.item() == -math.inf
    else:
        assert_states_close(state, right, 3e-5)


def test_a_hashed_sample_without_centres_is_of_the_rows_as_they_are(stored, isa):
    query, keys, values = draw(1, 500, 64, stored)
    ids, law, blocks = torch.arange(0, 500, 3), cpu.make_law(6, 40, 2), blocks_of(keys, values, stored)
    plain, log_u = cpu.attend_hashed(query[0], blocks, ids, law, scale=0.2)
    zero, same = cpu.attend_hashed(query[0], blocks, ids, law, scale=0.2, centres=torch.zeros(1, 64))
    # Sums of another order
    torch.testing.assert_close(log_u, same, rtol=0, atol=1e-4)
    assert_states_close(plain, AttentionState(zero.output.double(), zero.lse.double()), 1e-4)


def test_inclusion_probabilities_far_below_the_range_of_floats(stored, isa):
    # u = e^-300 is no float32 at all; its logarithm is an ordinary one.
    query, keys, values = draw(1, 50, 64, stored)
    log_u = torch.linspace(-300, -290, 50)
    state = cpu.attend(query[0], blocks_of(keys, values, stored), torch.arange(50), log_u, scale=0.125)
    right = expected(query, keys, values, scale=0.125, log_u=log_u.double())
    # Logits near 300 are rounded by 300 * 2^-24 = 2e-5 each.
    error = 300 * EPS * 2
    assert abs(float(state.lse - right.lse[0])) <= error
    assert float((state.output - right.output[0]).abs().max()) <= 2 * error * float(values.abs().max())


def test_an_empty_sample_is_an_empty_state(isa):
    keys = torch.randn(10, 64)
    state = cpu.attend(
        torch.randn(64), blocks_of(keys, keys), torch.empty(0, dtype=torch.int64), torch.empty(0), scale=1.0
    )
    assert state.output.eq(0).all()
    assert state.lse.item() == -math.inf


def test_certain_rows_are_exact_attention(stored, isa):
    query, keys, values = draw(1, 5000, 128, stored)
    rows = cpu.interleave(keys, values, stored)
    sampled = cpu.attend(query[0], blocks_of(keys, values, stored), torch.arange(5000), torch.zeros(5000), scale=0.1)
    exact = cpu.attend_rows(query, rows, scale=0.1)
    right = expected(query, keys, values, scale=0.1)
    for state in [sampled, AttentionState(exact.output[0], exact.lse[0])]:
        assert_states_close(state, AttentionState(right.output[0], right.lse[0]))


@pytest.mark.parametrize("cuts", [[100], [1, 99], [15, 17, 68], [50, 0, 50], [0, 100, 0]], ids=str)
@pytest.mark.parametrize("D", [1, 80, 128])
def test_merging_parts_is_attention_over_all(D, cuts, isa):
    query, keys, values = draw(5, 100, D, torch.float32)
    states = [
        cpu.attend_rows(query, cpu.interleave(k, v), scale=0.3)
        for k, v in zip(keys.split(cuts), values.split(cuts), strict=True)
    ]
    assert_states_close(cpu.merge(states), expected(query, keys, values, scale=0.3))


def test_merging_empty_states_is_empty(isa):
    empty = AttentionState(torch.zeros(2, 64), torch.full((2,), -math.inf))
    state = cpu.merge([empty, empty])
    assert state.output.eq(0).all()
    assert state.lse.eq(-math.inf).all()


def test_merging_parts_of_very_different_weight(isa):
    for low, high in [(-1e4, 1e4), (0.0, 200.0), (-300.0, -100.0)]:
        parts = [
            AttentionState(torch.full((1, 64), 1.0), torch.tensor([low])),
            AttentionState(torch.full((1, 64), 2.0), torch.tensor([high])),
        ]
        for order in [parts, parts[::-1]]:
            state = cpu.merge(order)
            assert state.lse.item() == high
            assert state.output.eq(2.0).all()


def test_merge_is_the_references(isa):
    states = [AttentionState(torch.randn(4, 96), 10 * torch.randn(4)) for _ in range(6)]
    right = reference.merge([AttentionState(s.output.double(), s.lse.double()) for s in states])
    assert_states_close(cpu.merge(states), right)


PAPER = [(10, 150), (9, 120), (8, 75), (10, 170), (10, 220), (11, 300)]


@pytest.mark.parametrize(("K", "L"), PAPER)
def test_the_table_of_the_inclusion_law_interpolates_well(K, L):
    law = cpu.inclusion_law(K, L, 2).double()
    assert law.isfinite().all()  # also at -1, where log u is not: nothing could be interpolated towards it
    cosine = torch.linspace(-0.9, 1.0, 200_001, dtype=torch.float64)
    at = (1 + cosine.sign() * (1 - (1 - cosine.abs()).sqrt())) / 2 * (len(law) - 1)
    low = at.floor().clamp(max=len(law) - 2).long()
    interpolated = law[low] + (at - low) * (law[low + 1] - law[low])
    assert float((interpolated - log_inclusion(cosine, K, L, 2)).abs().max()) < 1e-4


def cone_store(K: int, L: int, min_hits: int, dtype: torch.dtype, tokens: int, D: int = 64) -> tuple[KVStore, Tensor]:
    """A settled store without sinks and window, and queries that point along, across and against its centred keys."""
    config = Config(K=K, L=L, min_hits=min_hits, sinks=0, recent=0, exact_below=0, block=16)
    store = KVStore(1, D, dtype, config, sampled=True)
    direction = torch.randn(D)
    # Cosines with `direction` all over [-1, 1].
    keys = torch.linspace(-6, 6, tokens)[:, None] * direction / direction.norm() + 2.5 * torch.randn(tokens, D) / D**0.5
    store.append(keys[None].to(dtype), torch.randn(1, tokens, D).to(dtype))
    store.settle()
    return store, torch.stack([direction, -direction, torch.randn(D), 1e-3 * direction]).to(dtype)


@pytest.mark.parametrize(("K", "L", "min_hits"), [(10, 150, 2), (8, 75, 2), (1, 40, 2), (4, 100, 3)])
def test_captured_inclusion_probabilities_obey_the_law(K, L, min_hits, dtype, isa):
    store, queries = cone_store(K, L, min_hits, dtype, tokens=2000)
    stored = (
        torch.cat([keys for keys, _ in store.blocks()], dim=1)[0].double() - store.index.tables[0].centre[0].double()
    )
    _, info = attend_stores(queries[None], [store], scale=1.0)
    cosines = []
    for h, query in enumerate(queries.double()):
        ids = info.ids[0][h]
        cosine = torch.nn.functional.cosine_similarity(stored[ids], query[None], dim=-1)
        seen = cosine > -0.9
        error = (info.log_u[0][h] - log_inclusion(cosine, K, L, min_hits))[seen].abs()
        # On top of the table's 1e-4: a float32 cosine of 64 dimensions errs by about 5e-7 (8 roundings of 2^-24), and
        # the slope of log u, min_hits * K / (p * pi * sqrt(1 - c^2)), stays below 102 down to -0.9.
        assert not seen.any() or float(error.max()) < 1.5e-4
        cosines.append(cosine[seen])
    # The test looked somewhere: at keys along the query and at keys across it.
    assert torch.cat(cosines).max() > 0.9
    assert torch.cat(cosines).min() < 0.6


def test_a_key_of_length_zero_counts_as_one_at_a_right_angle(isa):
    # Hashed to code 0 it collides now and then, and must bring neither NaN nor a weight of its own invention.
    config = Config(K=1, L=60, min_hits=2, sinks=0, recent=0, exact_below=0, block=8)
    store = KVStore(1, 64, torch.float32, config, sampled=True)
    keys = torch.randn(1, 104, 64)
    # Of 13 strides the first eight make the centre: numbers whose sum has no rounding, and their mean as a later key.
    keys[0, :64] = keys[0, :64].mul(16).round() / 16
    keys[0, 100] = keys[0, :64].mean(0)
    store.append(keys, torch.randn(1, 104, 64))
    store.settle()
    assert torch.equal(store.index.tables[0].centre[0], keys[0, 100])
    state, info = attend_stores(torch.randn(1, 3, 64), [store], scale=1.0)
    assert state.output.isfinite().all()
    found = [(ids == 100).nonzero() for ids in info.ids[0]]
    assert any(len(at) for at in found)
    for h, at in enumerate(found):
        if len(at):
            assert info.log_u[0][h][at].item() == pytest.approx(
                log_inclusion(torch.zeros(1), 1, 60, 2).item(), abs=1e-6
            )


def test_a_query_of_length_zero_weighs_all_keys_alike(isa):
    store, _ = cone_store(1, 60, 2, torch.float32, tokens=300)
    state, info = attend_stores(torch.zeros(1, 2, 64), [store], scale=1.0)
    assert state.output.isfinite().all()
    # u = P[Binomial(60, 1/2) >= 2] differs from one by 61 * 2^-60.
    assert info.log_u[0][0].abs().max() < 1e-6


def float_patterns() -> Tensor:
    """Floats with all upper halves, and lower halves around every tie of a conversion to sixteen bits."""
    low = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF]
    bits = (torch.arange(65536)[:, None] << 16) | torch.tensor(low)
    return bits.flatten().to(torch.uint32).view(torch.float32)


def assert_same_numbers(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a.isnan(), b.isnan())
    kept = ~b.isnan()
    bits = {2: torch.int16, 4: torch.int32}[b.element_size()]
    assert torch.equal(a[kept].view(bits), b[kept].view(bits))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_half_widens_as_torch_does(half, isa):
    every = torch.arange(65536).to(torch.uint16).view(half)
    assert_same_numbers(cpu.convert(every, torch.float32), every.to(torch.float32))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_floats_round_to_the_nearest_half_ties_to_even(half, isa):
    # All exponents: zeros, denormals, normals, overflow to infinity, infinities, NaN.
    floats = float_patterns()
    assert_same_numbers(cpu.convert(floats, half), floats.to(half))


@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 31, 33, 100])
def test_conversion_of_any_length(n, dtype, isa):
    x = torch.randn(n)
    assert_same_numbers(cpu.convert(x, dtype), x.to(dtype))
    assert_same_numbers(cpu.convert(x.to(dtype), torch.float32), x.to(dtype).float())


def test_rows_and_queries_that_do_not_fit_are_refused():
    rows = cpu.interleave(torch.randn(5, 64), torch.randn(5, 64))
    with pytest.raises(ValueError, match=r"^rows and queries disagree about the head dimension$"):
        cpu.attend_rows(torch.randn(1, 96), rows, scale=1.0)
    with pytest.raises(ValueError, match=r"^rows must be contiguous$"):
        cpu.attend_rows(torch.randn(1, 64), torch.randn(128, 5).T, scale=1.0)
    for D in [0, 513]:
        with pytest.raises(ValueError, match=rf"^head_dim={D} is out of range; allowed: 1 to 512$"):
            base.padded(D)
    with pytest.raises(ValueError, match=r"^dtype=torch.float64 is not supported; allowed: .*float32"):
        cpu.dtype_code(torch.float64)
