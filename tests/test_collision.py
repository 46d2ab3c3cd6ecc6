"""The collision law against scipy's binomial distribution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from magicpig.collision import collision_probability, log_inclusion

PAPER_SETTINGS = [(10, 150), (9, 120), (8, 75), (10, 170), (10, 220), (11, 300)]
# Dense where the law is hard: at the ends, where P is 0 or 1 up to rounding, and through everything between.
COSINES = torch.cat(
    [
        torch.linspace(-1.0, 1.0, 4001, dtype=torch.float64),
        1.0 - torch.logspace(-15, -2, 53, dtype=torch.float64),
        -1.0 + torch.logspace(-15, -2, 53, dtype=torch.float64),
    ]
).sort()[0]

laws = st.integers(1, 16).flatmap(
    lambda K: st.integers(1, 1024).flatmap(lambda L: st.integers(1, min(L, 127)).map(lambda min_hits: (K, L, min_hits)))
)


def assert_log_probabilities_close(actual: torch.Tensor, expected: np.ndarray) -> None:
    """Relative error of the probabilities themselves, wherever float64 can hold them.

    The largest exponents, near L * |log(1 - P)| < 1e5, are known to 1e5 * 2**-52 = 2e-11.
    """
    held = expected > math.log(np.finfo(np.float64).tiny)
    np.testing.assert_allclose(actual.numpy()[held], expected[held], rtol=1e-12, atol=2e-11)


@pytest.mark.parametrize(("K", "L"), PAPER_SETTINGS)
@pytest.mark.parametrize("min_hits", [1, 2, 3, 5])
def test_log_inclusion_agrees_with_scipy_at_the_papers_settings(K, L, min_hits):
    P = collision_probability(COSINES).numpy() ** K
    expected = binom.logsf(min_hits - 1, L, P)
    assert_log_probabilities_close(log_inclusion(COSINES, K, L, min_hits), expected)


@pytest.mark.parametrize(
    ("K", "L", "min_hits"),
    [(1, 1, 1), (1, 2, 2), (16, 1024, 1), (16, 1024, 127), (1, 1024, 127), (4, 20, 20), (3, 5, 4)],
)
def test_log_inclusion_agrees_with_scipy_at_the_limits_of_the_settings(K, L, min_hits):
    P = collision_probability(COSINES).numpy() ** K
    assert_log_probabilities_close(log_inclusion(COSINES, K, L, min_hits), binom.logsf(min_hits - 1, L, P))


@given(law=laws, cosine=st.floats(-1.0, 1.0))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_log_inclusion_agrees_with_scipy_everywhere(law, cosine):
    K, L, min_hits = law
    cosine = torch.tensor([cosine], dtype=torch.float64)
    P = collision_probability(cosine).numpy() ** K
    assert_log_probabilities_close(log_inclusion(cosine, K, L, min_hits), binom.logsf(min_hits - 1, L, P))


@pytest.mark.parametrize(("K", "L"), PAPER_SETTINGS)
def test_probability_of_missing_is_accurate_when_inclusion_is_nearly_certain(K, L):
    # 1 - u is below 1e-3 here and down to 1e-200; -log u is 1 - u to first order, and expm1 gives it exactly.
    cosine = torch.linspace(0.93, 0.9999, 50, dtype=torch.float64)
    P = collision_probability(cosine).numpy() ** K
    missed = binom.cdf(1, L, P)
    assert missed.max() < 1e-3
    np.testing.assert_allclose(-torch.expm1(log_inclusion(cosine, K, L, 2)).numpy(), missed, rtol=1e-10)


def test_two_of_l_is_the_closed_form_of_the_paper():
    P = collision_probability(COSINES) ** 10
    closed = 1 - (1 - P) ** 150 - 150 * P * (1 - P) ** 149
    # The closed form itself loses everything below 150 roundings of 1.
    torch.testing.assert_close(log_inclusion(COSINES, 10, 150, 2).exp(), closed, rtol=0, atol=150 * 2.3e-16)


def test_tiny_inclusion_probabilities_keep_their_relative_accuracy():
    # P = p**K is 1e-12: u is then C(L, 2) P**2 to a relative error of L * P.
    cosine = torch.tensor([math.cos(math.pi * (1 - 1e-12 ** (1 / 16)))], dtype=torch.float64)
    expected = math.log(math.comb(300, 2)) + 2 * math.log(1e-12)
    assert log_inclusion(cosine, 16, 300, 2).item() == pytest.approx(expected, abs=1e-9)


@given(law=laws, cosines=st.tuples(st.floats(-1.0, 1.0), st.floats(-1.0, 1.0)))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_inclusion_grows_with_the_cosine_and_never_exceeds_one(law, cosines):
    low, high = log_inclusion(torch.tensor(sorted(cosines), dtype=torch.float64), *law).tolist()
    # Equal up to the rounding of the largest exponents, as in assert_log_probabilities_close.
    assert low <= high + 2e-11 * max(1.0, abs(high) if high > -math.inf else 1.0)
    assert high <= 0.0


@given(law=laws, cosine=st.floats(-1.0, 1.0))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_asking_for_more_hits_never_makes_inclusion_likelier(law, cosine):
    K, L, min_hits = law
    cosine = torch.tensor([cosine], dtype=torch.float64)
    if min_hits > 1:
        assert log_inclusion(cosine, K, L, min_hits) <= log_inclusion(cosine, K, L, min_hits - 1) + 2e-11


@pytest.mark.parametrize("excess", [1e-7, 1e-3, 10.0, math.inf])
def test_cosines_beyond_one_are_clamped(excess):
    beyond = torch.tensor([1.0 + excess, -1.0 - excess], dtype=torch.float64)
    assert log_inclusion(beyond, 10, 150, 2).tolist() == [0.0, -math.inf]
    assert collision_probability(beyond).tolist() == [1.0, 0.0]


def test_only_opposite_vectors_have_probability_zero():
    nearly = torch.tensor([-1.0, math.nextafter(-1.0, 0.0)], dtype=torch.float64)
    log_u = log_inclusion(nearly, 16, 2, 2)
    assert log_u[0] == -math.inf
    assert log_u[1].isfinite()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_shape_is_kept_and_the_result_is_float64(shape, dtype):
    cosine = torch.linspace(-0.9, 0.9, math.prod(shape)).reshape(shape).to(dtype)
    log_u = log_inclusion(cosine, 10, 150, 2)
    assert log_u.shape == shape
    assert log_u.dtype == torch.float64
    # Each element is computed on its own, whatever its neighbours need.
    for value, alone in zip(log_u.flatten(), cosine.flatten(), strict=True):
        assert value == pytest.approx(log_inclusion(alone, 10, 150, 2).item(), rel=1e-13)


def test_the_argument_is_left_alone():
    cosine = torch.tensor([2.0, 0.5], dtype=torch.float64)
    log_inclusion(cosine, 10, 150, 2)
    assert cosine.tolist() == [2.0, 0.5]


@pytest.mark.parametrize(
    ("K", "L", "min_hits", "named"),
    [(0, 150, 2, "K"), (10, 150, 0, "min_hits"), (10, 150, 151, "min_hits"), (10, 0, 1, "min_hits")],
)
def test_impossible_settings_are_refused(K, L, min_hits, named):
    with pytest.raises(ValueError, match=f"^{named} must be"):
        log_inclusion(torch.zeros(1), K, L, min_hits)
