"""Weighted attention, its merge, and Algorithm 1 put together from them."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from magicpig.kernels.algorithm import attend_full, attend_lsh, cosine, index_end
from magicpig.kernels.attend.reference import attend, merge, with_sink_logits
from magicpig.kernels.hash.reference import centre_strides, make_planes, segment_centre
from magicpig.types import AttentionState

# Sums of up to 1000 float64 terms of size one err by about 1000 * 2**-53 = 1e-13.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
HEADS, HEAD_DIM, VALUE_DIM = 3, 16, 10


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rows(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return normal(HEADS, HEAD_DIM, seed=0), normal(n, HEAD_DIM, seed=1), normal(n, VALUE_DIM, seed=2)


def assert_states_equal(actual: AttentionState, expected: AttentionState) -> None:
    torch.testing.assert_close(actual.output, expected.output, **EXACT)
    torch.testing.assert_close(actual.lse, expected.lse, **EXACT)


@pytest.mark.parametrize("certain", [None, 0.0], ids=["no log_u", "log_u of zero"])
@pytest.mark.parametrize("n", [1, 15, 17, 1000])
def test_certain_rows_give_softmax_attention(n, certain):
    query, keys, values = rows(n)
    log_u = None if certain is None else torch.full((n,), certain)
    state = attend(query, keys, values, scale=0.25, log_u=log_u)
    expected = scaled_dot_product_attention(query[None], keys[None], values[None], scale=0.25)[0]
    torch.testing.assert_close(state.output, expected, **EXACT)
    torch.testing.assert_close(state.lse, torch.logsumexp(0.25 * query @ keys.T, -1), **EXACT)


def test_a_row_of_probability_a_third_counts_three_times():
    query, keys, values = rows(17)
    u = torch.ones(17, dtype=torch.float64)
    u[4] = 1 / 3
    repeated = torch.tensor([*range(17), 4, 4])
    assert_states_equal(
        attend(query, keys, values, scale=0.25, log_u=u.log()),
        attend(query, keys[repeated], values[repeated], scale=0.25),
    )


def test_heads_may_bring_their_own_rows():
    query = normal(HEADS, HEAD_DIM, seed=0)
    keys, values = normal(HEADS, 15, HEAD_DIM, seed=1), normal(HEADS, 15, VALUE_DIM, seed=2)
    log_u = -normal(HEADS, 15, seed=3).abs()
    together = attend(query, keys, values, scale=0.25, log_u=log_u)
    for h in range(HEADS):
        alone = attend(query[h : h + 1], keys[h], values[h], scale=0.25, log_u=log_u[h])
        assert_states_equal(AttentionState(together.output[h : h + 1], together.lse[h : h + 1]), alone)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_offset_undoes_centring_of_the_keys(softcap):
    # With a softcap the shift no longer cancels: leaving the offset out would change output and lse alike.
    query, keys, values = rows(1000)
    keys = keys + 3.0
    mean = keys.mean(0)
    assert_states_equal(
        attend(query, keys - mean, values, scale=0.25, offset=0.25 * query @ mean, softcap=softcap),
        attend(query, keys, values, scale=0.25, softcap=softcap),
    )


def test_softcap_bounds_logits_before_they_are_weighted():
    query, keys, values = rows(15)
    logits = 2.0 * torch.tanh(query @ keys.T / 2.0) + 1.5
    state = attend(query, keys, values, scale=1.0, softcap=2.0, log_u=torch.full((15,), -1.5))
    torch.testing.assert_close(state.output, logits.softmax(-1) @ values, **EXACT)
    torch.testing.assert_close(state.lse, logits.logsumexp(-1), **EXACT)


def test_a_huge_softcap_changes_nothing():
    query, keys, values = rows(15)
    # tanh(x) = x - x**3 / 3: logits below 20 move by less than 20**3 / (3 * 1e8**2) = 3e-13.
    assert_states_equal(attend(query, keys, values, scale=0.25, softcap=1e8), attend(query, keys, values, scale=0.25))


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_huge_logits_stay_finite_and_a_shift_of_them_all_changes_no_output(offset, dtype):
    query, keys, values = (x.to(dtype) for x in rows(15))
    shifted = attend(query, keys, values, scale=0.25, offset=torch.full((HEADS,), offset))
    plain = attend(query, keys, values, scale=0.25)
    # A logit near 1e4 is rounded to 1e4 * eps, which is the relative error of its weight.
    rounding = 4e4 * torch.finfo(dtype).eps
    torch.testing.assert_close(shifted.output, plain.output, rtol=rounding, atol=rounding)
    torch.testing.assert_close(shifted.lse, plain.lse + offset, rtol=1e-6, atol=rounding)


def test_logits_of_both_signs_and_huge_size_pick_the_largest():
    query = torch.tensor([[1e2], [-1e2]])
    keys, values = torch.tensor([[1e2], [-1e2], [0.0]]), torch.eye(3)
    state = attend(query, keys, values, scale=1.0)
    assert state.output.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert state.lse.tolist() == [1e4, 1e4]


def test_no_rows_give_the_empty_state():
    query, keys, values = rows(0)
    for log_u in [None, torch.empty(0, dtype=torch.float64)]:
        state = attend(query, keys, values, scale=0.25, log_u=log_u, softcap=3.0)
        assert torch.equal(state.output, torch.zeros(HEADS, VALUE_DIM, dtype=torch.float64))
        assert state.lse.eq(-math.inf).all()


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_half_precision_is_computed_in_float32(given, computed):
    query, keys, values = (x.to(given) for x in rows(17))
    state = attend(query, keys, values, scale=0.25, log_u=torch.full((17,), -1.0, dtype=torch.float64))
    assert state.output.dtype == state.lse.dtype == computed
    exact = attend(query.double(), keys.double(), values.double(), scale=0.25, log_u=torch.full((17,), -1.0))
    # Logits below 10 and 17 terms, each a few roundings.
    rounding = 200 * torch.finfo(computed).eps
    torch.testing.assert_close(state.output.double(), exact.output, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("cuts", [[], [0], [1], [7], [17], [3, 3, 8], [0, 1, 2, 16, 17]], ids=str)
def test_merging_any_split_equals_attending_to_all(cuts):
    query, keys, values = rows(17)
    log_u = -normal(17, seed=3).abs()
    bounds = [0, *cuts, 17]
    parts = [
        attend(query, keys[start:stop], values[start:stop], scale=0.25, log_u=log_u[start:stop])
        for start, stop in itertools.pairwise(bounds)
    ]
    assert_states_equal(merge(parts), attend(query, keys, values, scale=0.25, log_u=log_u))


def test_merge_is_associative_and_commutative():
    query, keys, values = rows(30)
    first, second, third = (
        attend(query, keys[part], values[part], scale=1.0) for part in torch.arange(30).split([2, 17, 11])
    )
    together = merge([first, second, third])
    assert_states_equal(merge([merge([first, second]), third]), together)
    assert_states_equal(merge([first, merge([second, third])]), together)
    assert_states_equal(merge([third, first, second]), together)


@pytest.mark.parametrize("lse", [-1e4, 0.0, 1e4])
def test_merge_survives_huge_log_sum_exps(lse):
    output = normal(2, HEADS, VALUE_DIM, seed=5)
    states = [
        AttentionState(output[0], torch.full((HEADS,), lse, dtype=torch.float64)),
        AttentionState(output[1], torch.full((HEADS,), lse + math.log(3.0), dtype=torch.float64)),
    ]
    merged = merge(states)
    torch.testing.assert_close(merged.output, 0.25 * output[0] + 0.75 * output[1], rtol=0, atol=1e-11)
    torch.testing.assert_close(merged.lse, torch.full_like(merged.lse, lse + math.log(4.0)), **EXACT)


def test_parts_may_be_empty_for_some_heads_and_not_for_others():
    full = attend(*rows(15), scale=0.25)
    empty = attend(*rows(0), scale=0.25)
    some = torch.tensor([True, False, True])
    holed = AttentionState(
        torch.where(some[:, None], full.output, empty.output), torch.where(some, full.lse, empty.lse)
    )
    merged = merge([holed, empty])
    assert torch.equal(merged.output, holed.output)
    assert torch.equal(merged.lse, holed.lse)
    assert not merged.output.isnan().any()


def test_a_sink_logit_is_one_more_row_of_value_zero():
    query, keys, values = rows(17)
    sink_logits = torch.tensor([-3.0, 0.5, 40.0])
    logits = torch.cat([0.25 * query @ keys.T, sink_logits.double()[:, None]], dim=-1)
    extended = torch.cat([values, torch.zeros(1, VALUE_DIM)])
    state = with_sink_logits(attend(query, keys, values, scale=0.25), sink_logits)
    torch.testing.assert_close(state.output, logits.softmax(-1) @ extended, **EXACT)
    torch.testing.assert_close(state.lse, logits.logsumexp(-1), **EXACT)


def test_a_sink_logit_alone_gives_zero():
    state = with_sink_logits(attend(*rows(0), scale=0.25), torch.tensor([1.0, -2.0, 3.0]))
    assert state.output.eq(0).all()
    assert state.lse.tolist() == [1.0, -2.0, 3.0]


def cache(G: int, R: int, N: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    return (
        normal(G * R, HEAD_DIM, seed=10, dtype=dtype),
        normal(G, N, HEAD_DIM, seed=11, dtype=dtype),
        normal(G, N, VALUE_DIM, seed=12, dtype=dtype),
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("G", "R"), [(1, 1), (2, 3), (3, 1), (1, 8)])
def test_full_attention_reads_the_kv_head_of_each_query_head(G, R, softcap):
    query, keys, values = cache(G, R, 33)
    state = attend_full(query, keys, values, scale=0.3, softcap=softcap)
    for h in range(G * R):
        logits = 0.3 * keys[h // R] @ query[h]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        torch.testing.assert_close(state.output[h], logits.softmax(-1) @ values[h // R], **EXACT)
        torch.testing.assert_close(state.lse[h], logits.logsumexp(-1), **EXACT)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("sinks", "recent"), [(4, 64), (0, 64), (4, 0), (0, 0), (1, 3)])
@pytest.mark.parametrize(("G", "R"), [(1, 1), (2, 3)])
def test_lsh_attention_is_attention_over_static_tokens_and_reweighted_samples(G, R, sinks, recent, softcap):
    query, keys, values = cache(G, R, 333)
    state, samples = attend_lsh(
        query, keys, values, K=3, L=9, min_hits=2, sinks=sinks, recent=recent, stride=1, scale=0.3, softcap=softcap
    )
    static = [*range(sinks), *range(333 - recent, 333)]
    for h, sample in enumerate(samples):
        assert 0 < len(sample.ids) < 333 - sinks - recent
        assert sinks <= sample.ids.min() <= sample.ids.max() < 333 - recent
        assert sample.ids.diff().gt(0).all()
        assert sample.log_u.le(0).all()
        chosen = torch.cat([torch.tensor(static, dtype=torch.int64), sample.ids])
        log_u = torch.cat([torch.zeros(len(static), dtype=torch.float64), sample.log_u])
        one = attend(
            query[h : h + 1],
            keys[h // R, chosen],
            values[h // R, chosen],
            scale=0.3,
            log_u=log_u,
            softcap=softcap,
        )
        torch.testing.assert_close(state.output[h], one.output[0], **EXACT)
        torch.testing.assert_close(state.lse[h], one.lse[0], **EXACT)


def test_lsh_attention_is_exact_once_everything_is_sampled():
    # K = 1, L = 1024, min_hits = 1: a key at a right angle is missed with probability 2**-1024.
    query, keys, values = cache(2, 2, 200)
    state, samples = attend_lsh(query, keys, values, K=1, L=1024, min_hits=1, sinks=2, recent=5, stride=1, scale=0.25)
    assert all(sample.ids.tolist() == list(range(2, 195)) for sample in samples)
    # The largest 1 - u left, for the key most opposite to a query, bounds the change of any weight.
    slack = max(float(-torch.expm1(sample.log_u).min()) for sample in samples)
    assert slack < 1e-12
    assert_states_equal(state, attend_full(query, keys, values, scale=0.25))


def test_seed_means_the_planes_drawn_from_it():
    query, keys, values = cache(1, 2, 100)
    settings = {"K": 4, "L": 11, "min_hits": 2, "sinks": 1, "recent": 2, "stride": 8, "scale": 0.25}
    seeded, samples = attend_lsh(query, keys, values, **settings, seed=5)
    given, _ = attend_lsh(query, keys, values, **settings, planes=make_planes(HEAD_DIM, 4, 11, seed=5))
    assert torch.equal(seeded.output, given.output)
    _, others = attend_lsh(query, keys, values, **settings, seed=6)
    assert any(not torch.equal(a.ids, b.ids) for a, b in zip(samples, others, strict=True))


def test_sampling_does_not_depend_on_where_the_keys_are_centred():
    query, keys, values = cache(1, 2, 300)
    settings = {"K": 5, "L": 40, "min_hits": 2, "sinks": 4, "recent": 8, "stride": 4, "scale": 0.25}
    _, samples = attend_lsh(query, keys, values, **settings)
    _, moved = attend_lsh(query, keys - 7.0, values, **settings)
    for here, there in zip(samples, moved, strict=True):
        assert here.ids.tolist() == there.ids.tolist()
        torch.testing.assert_close(here.log_u, there.log_u, rtol=1e-9, atol=1e-9)


def test_bfloat16_input_is_attended_at_its_exact_values():
    query, keys, values = cache(2, 2, 300, dtype=torch.bfloat16)
    settings = {"K": 1, "L": 1024, "min_hits": 1, "sinks": 4, "recent": 8, "stride": 4, "scale": 0.25}
    state, _ = attend_lsh(query, keys, values, **settings)
    assert state.output.dtype == torch.float32
    exact = attend_full(query.double(), keys.double(), values.double(), scale=0.25)
    # 300 terms of a few float32 roundings each, on outputs below one.
    torch.testing.assert_close(state.output.double(), exact.output, rtol=0, atol=300 * 2**-23)


def test_an_index_of_one_token_has_a_centred_key_of_zero_at_a_right_angle():
    query, keys, values = cache(1, 3, 3)
    _, samples = attend_lsh(query, keys, values, K=1, L=64, min_hits=1, sinks=0, recent=2, stride=1, scale=0.25)
    for sample in samples:
        assert sample.ids.tolist() == [0]
        assert sample.log_u.item() == pytest.approx(math.log1p(-(2.0**-64)), abs=1e-15)


@pytest.mark.parametrize(
    ("tokens", "end"), [(1, 0), (68, 0), (75, 0), (76, 8), (83, 8), (84, 16), (1000, 928), (1003, 936), (1004, 936)]
)
def test_only_whole_strides_before_the_recent_tokens_are_indexed(tokens, end):
    recent = 68 if tokens < 1000 else 67
    assert index_end(tokens, recent=recent, stride=8) == end
    query, keys, values = cache(1, 2, tokens)
    settings = {"K": 1, "L": 1024, "min_hits": 1, "sinks": 3, "recent": recent, "stride": 8, "scale": 0.25}
    state, samples = attend_lsh(query, keys, values, **settings)
    assert all(sample.ids.tolist() == list(range(3, end)) for sample in samples)
    assert_states_equal(state, attend_full(query, keys, values, scale=0.25))


@pytest.mark.parametrize(
    ("n", "strides"), [(8, 1), (23, 2), (24, 2), (32, 4), (64, 8), (120, 8), (128, 16), (2000, 16)]
)
def test_a_segments_centre_is_the_mean_of_a_power_of_two_of_its_first_strides(n, strides):
    keys = normal(n, 12, seed=0)
    torch.testing.assert_close(segment_centre(keys, 8), keys[: 8 * strides].mean(0), **EXACT)


def test_no_centre_is_of_more_than_one_block_of_keys():
    assert [centre_strides(100, stride) for stride in (8, 256, 512, 1024, 4096)] == [16, 16, 8, 4, 1]


@pytest.mark.parametrize("query_is_zero", [True, False], ids=["zero query", "zero keys"])
def test_zero_vectors_have_cosine_zero(query_is_zero):
    query = torch.zeros(1, 4) if query_is_zero else torch.ones(1, 4)
    keys = torch.ones(3, 4) if query_is_zero else torch.zeros(3, 4)
    assert cosine(query, keys).tolist() == [0.0, 0.0, 0.0]


def test_cosine_is_that_of_the_angle():
    angles = torch.linspace(0, math.pi, 19, dtype=torch.float64)
    keys = 5.0 * torch.stack([angles.cos(), angles.sin()], dim=-1)
    torch.testing.assert_close(cosine(torch.tensor([[0.01, 0.0]]).double(), keys), angles.cos(), **EXACT)


def test_query_heads_that_share_no_kv_head_evenly_are_refused():
    query, keys, values = cache(1, 5, 10)
    keys, values = keys.expand(2, -1, -1), values.expand(2, -1, -1)
    with pytest.raises(ValueError, match=r"^query must have a multiple of the 2 key/value heads, got 5$"):
        attend_full(query, keys, values, scale=1.0)
    with pytest.raises(ValueError, match=r"^query must have a multiple of the 2 key/value heads, got 5$"):
        attend_lsh(query, keys, values, K=1, L=2, min_hits=1, sinks=0, recent=0, scale=1.0)
