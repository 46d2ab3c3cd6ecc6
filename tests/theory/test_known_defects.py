"""What the implementation released with MagicPIG gets wrong, and must not come back (the part that is mathematics).

Each test shows the right behaviour, and where it is cheap that the wrong formula would be caught.
"""

import math

import pytest
import torch

from magicpig.collision import log_inclusion
from magicpig.kernels.algorithm import attend_full, attend_lsh, cosine
from magicpig.kernels.attend.reference import attend


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_no_epsilon_is_added_to_tiny_inclusion_probabilities():
    # At a right angle with (K, L) = (15, 75) u is 2.6e-6; log(u + 1e-4) would be too large by 3.7.
    log_u = log_inclusion(torch.zeros(1), 15, 75, 2)
    P = 2.0**-15
    leading = math.log(math.comb(75, 2) * P**2)
    # The next terms of the series are of relative size L * P.
    assert log_u.item() == pytest.approx(leading, abs=75 * P)
    state = attend(torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(1, 4), scale=1.0, log_u=log_u)
    assert state.lse.item() == pytest.approx(-leading, abs=75 * P)


@pytest.mark.slow
def test_rare_keys_are_weighted_without_bias(draw_samples):
    # Seven keys at right angles to the query and to one another are sampled independently with u = 2**-14.
    draws, keys = 400_000, torch.eye(8)[1:]
    included = draw_samples(torch.eye(8)[0], keys, K=7, L=2, min_hits=2, draws=draws)
    log_u = log_inclusion(torch.zeros(1), 7, 2, 2)
    assert log_u.exp().item() == pytest.approx(2.0**-14, rel=1e-12)
    mean_weight = float(included.sum() / log_u.exp()) / (7 * draws)
    # The number of samples is Poisson with mean 171: a standard error of 7.6 %, and five of them allowed.
    expected_samples = 7 * draws * 2.0**-14
    assert abs(mean_weight - 1) <= 5 / math.sqrt(expected_samples)
    # The released weight 1 / (u + 1e-4) loses 62 % of the rare keys.
    released = float(included.sum() / (log_u.exp() + 1e-4)) / (7 * draws)
    assert released < 1 - 5 / math.sqrt(expected_samples)


@pytest.mark.parametrize("level", [-90.0, -1e3, -1e4])
def test_exponentials_do_not_break_down_below_minus_88(level):
    # float32 exp underflows below -88 (and the released fast version returns noise); softmax must not notice.
    logits = torch.tensor([level, level - 1.0, level - 100.0])
    state = attend(torch.ones(1, 1), logits[:, None], torch.eye(3), scale=1.0)
    # Rounding of a logit near `level` is its relative size times the spacing of float32.
    rounding = 2 * abs(level) * torch.finfo(torch.float32).eps
    weights = torch.tensor([[1.0, math.exp(-1.0), 0.0]]) / (1 + math.exp(-1.0))
    torch.testing.assert_close(state.output, weights, rtol=rounding, atol=1e-30)
    assert state.lse.item() == pytest.approx(level + math.log1p(math.exp(-1.0)), rel=1e-6)


def test_a_key_along_the_query_is_certain_and_not_nan():
    # Rounding makes many of these cosines larger than one; arccos of such a number is NaN.
    directions = torch.randn(1000, 128, generator=torch.Generator().manual_seed(0))
    cosines = torch.cat([cosine(d[None], 3.0 * d[None]) for d in directions])
    assert (cosines > 1).any()
    log_u = log_inclusion(cosines, 10, 150, 2)
    assert not log_u.isnan().any()
    # float32 cosines within 3e-7 of one are angles below 8e-4: a table is missed with P < K * 8e-4 / pi < 3e-3,
    # and 149 of 150 tables never.
    assert log_u.abs().max() < 1e-12


def test_nothing_that_collides_leaves_exact_attention_over_the_static_tokens():
    query, keys, values = normal(4, 16, seed=0), normal(2, 300, 16, seed=1), normal(2, 300, 16, seed=2)
    state, samples = attend_lsh(query, keys, values, K=16, L=2, min_hits=2, sinks=4, recent=64, stride=1, scale=0.25)
    assert [sample.ids.tolist() for sample in samples] == [[], [], [], []]
    static = [*range(4), *range(300 - 64, 300)]
    expected = attend_full(query, keys[:, static], values[:, static], scale=0.25)
    torch.testing.assert_close(state.output, expected.output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.lse, expected.lse, rtol=1e-12, atol=1e-12)


def test_nothing_that_collides_and_no_static_tokens_give_zero():
    query, keys, values = normal(2, 16, seed=0), normal(1, 300, 16, seed=1), normal(1, 300, 16, seed=2)
    state, _ = attend_lsh(query, keys, values, K=16, L=2, min_hits=2, sinks=0, recent=0, stride=1, scale=0.25)
    assert state.output.eq(0).all()
    assert state.lse.eq(-math.inf).all()


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 67, 68, 69, 70])
def test_prompts_no_longer_than_the_static_set_are_exact_and_never_nan(tokens):
    query, keys, values = (
        normal(6, 16, seed=0),
        normal(2, tokens, 16, seed=1),
        normal(2, tokens, 16, seed=2),
    )
    state, samples = attend_lsh(query, keys, values, K=2, L=200, min_hits=2, sinks=4, recent=64, stride=1, scale=0.25)
    assert state.output.isfinite().all()
    assert state.lse.isfinite().all()
    if tokens <= 68:
        assert all(len(sample.ids) == len(sample.log_u) == 0 for sample in samples)
        exact = attend_full(query, keys, values, scale=0.25)
        torch.testing.assert_close(state.output, exact.output, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state.lse, exact.lse, rtol=1e-12, atol=1e-12)
    else:
        assert all(set(sample.ids.tolist()) <= set(range(4, tokens - 64)) for sample in samples)
