"""The estimator: unbiased sums, an error that falls with the square root of the sample, no bias against tails."""

import math

import pytest
import torch

from magicpig.collision import log_inclusion
from magicpig.kernels.algorithm import attend_full, attend_lsh, cosine
from magicpig.kernels.attend.reference import attend
from magicpig.kernels.hash.reference import make_planes

# A normal deviate beyond five standard errors has probability 6e-7; no test below looks at more than a hundred.
STANDARD_ERRORS = 5.0


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_and_standard_error(draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return draws.mean(0), draws.std(0) / math.sqrt(len(draws))


def slope_and_standard_error(x, y, y_errors):
    """Least-squares slope of y over x, and its standard error from those of y."""
    x, y, y_errors = (torch.as_tensor(values, dtype=torch.float64) for values in (x, y, y_errors))
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    return float(weights @ y), float((weights**2 @ y_errors**2).sqrt())


def log_rms_and_standard_error(squares: torch.Tensor) -> tuple[float, float]:
    """log sqrt(mean of squares), and its standard error by the delta method: half the relative one of the mean."""
    mean, error = mean_and_standard_error(squares)
    return 0.5 * math.log(mean), 0.5 * float(error / mean)


@pytest.mark.slow
@pytest.mark.parametrize(("K", "L", "min_hits"), [(6, 40, 1), (6, 40, 2), (5, 40, 3)])
def test_numerator_and_denominator_are_unbiased(K, L, min_hits, draw_samples, numerator_and_denominator):
    query, keys, values = normal(32, seed=0), normal(300, 32, seed=1), normal(300, 7, seed=2) + 1.0
    logits = keys @ query / math.sqrt(32)
    log_u = log_inclusion(cosine(query[None], keys), K, L, min_hits)
    included = draw_samples(query.float(), keys.float(), K=K, L=L, min_hits=min_hits, draws=2000)
    exact = torch.cat([logits.exp() @ values, logits.exp().sum()[None]])

    def bias_and_error(weight_by):
        numerator, denominator = numerator_and_denominator(included, logits, weight_by, values)
        mean, error = mean_and_standard_error(torch.cat([numerator, denominator[:, None]], dim=1))
        return (mean - exact).abs(), error

    bias, error = bias_and_error(log_u)
    assert (bias <= STANDARD_ERRORS * error).all()
    # The bound above means something: it is within a few percent of the sums themselves.
    assert (error <= 0.02 * exact[-1]).all()
    # Negative control: weights a fifth too large on the rarer half of the keys do not pass.
    bias, error = bias_and_error(torch.where(log_u < log_u.median(), log_u - math.log(1.2), log_u))
    assert (bias > STANDARD_ERRORS * error).any()


def test_sums_over_draws_are_those_of_weighted_attention(draw_samples, numerator_and_denominator):
    K, L, min_hits, draws = 5, 20, 2, 25
    query, keys, values = normal(1, 16, seed=3), normal(150, 16, seed=4), normal(150, 6, seed=5)
    keys = keys - keys.mean(0)
    included = draw_samples(query[0], keys, K=K, L=L, min_hits=min_hits, draws=draws)
    log_u = log_inclusion(cosine(query, keys), K, L, min_hits)
    numerator, denominator = numerator_and_denominator(included, 0.25 * keys @ query[0], log_u, values)
    for draw, family in enumerate(make_planes(16, K, L * draws, seed=0).split(L * K, dim=1)):
        state, _ = attend_lsh(
            query,
            keys[None],
            values[None],
            K=K,
            L=L,
            min_hits=min_hits,
            sinks=0,
            recent=0,
            stride=1,
            centre=False,
            scale=0.25,
            planes=family,
        )
        torch.testing.assert_close(state.lse[0].exp(), denominator[draw], rtol=1e-10, atol=0)
        torch.testing.assert_close(state.output[0] * state.lse[0].exp(), numerator[draw], rtol=1e-10, atol=1e-10)


def test_error_falls_as_the_root_of_the_sample_with_oracle_probabilities():
    # Drawing m rows with replacement from softmax itself: the output is the mean of m independent values, so its
    # mean squared error is Var / m and the slope is -1/2 exactly.
    draws, sizes = 300, [8, 16, 32, 64, 128, 256]
    query, keys, values = normal(1, 8, seed=0), normal(2000, 8, seed=1), normal(2000, 3, seed=2)
    exact = attend(query, keys, values, scale=0.7)
    softmax = (0.7 * keys @ query[0]).softmax(-1)
    generator = torch.Generator().manual_seed(3)
    points = []
    for m in sizes:
        picked = torch.multinomial(softmax.expand(draws, -1), m, replacement=True, generator=generator)
        # A row drawn with expectation m * w counts 1 / (m * w), once for each time it was drawn.
        state = attend(
            query.expand(draws, -1),
            keys[picked],
            values[picked],
            scale=0.7,
            log_u=(m * softmax[picked]).log(),
        )
        torch.testing.assert_close(state.lse, exact.lse.expand(draws), rtol=1e-12, atol=1e-12)
        points.append(log_rms_and_standard_error((state.output - exact.output).square().sum(-1)))
    slope, error = slope_and_standard_error([math.log(m) for m in sizes], *zip(*points, strict=True))
    assert error < 0.02
    assert abs(slope + 0.5) <= STANDARD_ERRORS * error


@pytest.mark.slow
def test_error_falls_as_the_root_of_the_sample_with_hashing(draw_samples, numerator_and_denominator):
    # Keys at right angles to the query and to one another are sampled independently, all with the same u: the
    # variance of the denominator is exactly sum(x**2) * (1 - u) / u, and n * u rows are read on average. Corrected
    # for the finite population, 1 - u, the error falls as rows**(-1/2).
    n, K, min_hits, draws = 63, 4, 2, 4000
    query, keys = torch.eye(64)[0], torch.eye(64)[1:]
    logits = normal(n, seed=1)
    log_rows, points = [], []
    for seed, L in enumerate([4, 8, 16, 32]):
        log_u = log_inclusion(torch.zeros(n), K, L, min_hits)
        u = float(log_u[0].exp())
        included = draw_samples(query, keys, K=K, L=L, min_hits=min_hits, draws=draws, seed=10**6 * seed)
        _, denominator = numerator_and_denominator(included, logits, log_u, torch.zeros(n, 1).double())
        squares = (denominator - logits.exp().sum()) ** 2
        mean, error = mean_and_standard_error(squares)
        assert abs(mean - (1 - u) / u * (2 * logits).exp().sum()) <= STANDARD_ERRORS * error
        log_rows.append(math.log(included.sum(-1).double().mean()))
        points.append(log_rms_and_standard_error(squares / (1 - u)))
    slope, error = slope_and_standard_error(log_rows, *zip(*points, strict=True))
    assert error < 0.02
    assert abs(slope + 0.5) <= STANDARD_ERRORS * error


def test_on_a_long_tail_top_k_is_biased_and_sampling_is_not(draw_samples, numerator_and_denominator):
    # Flat attention whose values grow towards the unlikely keys: what top-k leaves out is what counts.
    n, K, L, min_hits, draws = 1000, 6, 40, 2, 200
    query, keys = normal(32, seed=0), normal(n, 32, seed=1)
    logits = keys @ query / 8
    values = torch.stack([-logits, normal(n, seed=2)], dim=1)
    exact = attend_full(query[None], keys[None], values[None], scale=1 / 8).output[0]

    included = draw_samples(query.float(), keys.float(), K=K, L=L, min_hits=min_hits, draws=draws)
    log_u = log_inclusion(cosine(query[None], keys), K, L, min_hits)
    numerator, denominator = numerator_and_denominator(included, logits, log_u, values)
    outputs = numerator / denominator[:, None]
    top = logits.topk(int(included.sum(-1).double().mean())).indices
    top_k = attend(query[None], keys[top], values[top], scale=1 / 8).output[0]

    # The ratio of two unbiased sums has a bias of second order: at most its own error times that of the
    # denominator, relatively (Cauchy-Schwarz).
    mean, error = mean_and_standard_error(outputs)
    second_order = (outputs - exact).square().mean(0).sqrt() * (denominator.std() / denominator.mean())
    assert ((mean - exact).abs() <= STANDARD_ERRORS * error + second_order).all()
    # As many rows, the best ones: still wrong by more than ten times what is left of the sampled mean.
    assert (top_k - exact).norm() > 10 * (mean - exact).norm()
    # And a single draw already beats it.
    assert (outputs - exact).norm(dim=1).median() < 0.5 * (top_k - exact).norm()
