"""How often a key is really sampled, over draws of the hash planes, against the collision law.

All statistics are exact or asymptotic laws at a level of one in a thousand per test. The negative controls show
that the same tests refuse laws that are slightly wrong.
"""

import pytest
import torch
from scipy.stats import binomtest, chi2

from magicpig.collision import log_inclusion
from magicpig.kernels.algorithm import attend_lsh, cosine
from magicpig.kernels.hash.reference import make_planes, segment_centre

LEVEL = 1e-3
SETTINGS = [(4, 20, 1), (4, 20, 2), (4, 20, 3), (8, 75, 2), (10, 150, 1), (10, 150, 2), (10, 150, 3)]
QUERY = torch.randn(32, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
COSINES = torch.cat([torch.linspace(-0.6, 0.9, 22), torch.tensor([-1.0, 1.0])]).double()


def smallest_p_value(included, u):
    """Smallest p-value of the exact two-sided binomial tests of every key, times their number (Bonferroni)."""
    draws, n = included.shape
    hits = included.sum(0).tolist()
    return n * min(binomtest(k, draws, p).pvalue for k, p in zip(hits, u.tolist(), strict=True))


def chi_square_p_value(included, u):
    """P-value of the sum of squared standardised counts over keys whose draws are independent of one another."""
    draws, n = included.shape
    per_key = draws // n
    # Key i looks at its own share of the draws only: all keys of one draw see the same planes.
    hits = torch.stack([included[i * per_key : (i + 1) * per_key, i].sum() for i in range(n)]).double()
    expected = per_key * u
    return chi2.sf(float(((hits - expected) ** 2 / (expected * (1 - u))).sum()), n)


def cosines_of_shares(K, L, min_hits):
    """Cosines at which the law puts u at twelve levels between 0.08 and 0.92."""
    grid = torch.linspace(-0.9, 0.99, 1000, dtype=torch.float64)
    levels = torch.linspace(0.08, 0.92, 12, dtype=torch.float64)
    return grid[torch.searchsorted(log_inclusion(grid, K, L, min_hits).exp(), levels)]


@pytest.mark.slow
@pytest.mark.parametrize(("K", "L", "min_hits"), SETTINGS)
def test_every_key_is_sampled_as_often_as_the_law_says(K, L, min_hits, draw_samples, keys_at):
    keys = keys_at(COSINES, QUERY)
    included = draw_samples(QUERY.float(), keys.float(), K=K, L=L, min_hits=min_hits, draws=1000)
    u = log_inclusion(COSINES, K, L, min_hits).exp()
    # Where u is 1 or 0 nothing is left to chance: every table collides, or none does.
    assert included[:, COSINES == 1.0].all()
    assert not included[:, COSINES == -1.0].any()
    inner = COSINES.abs() < 1
    assert smallest_p_value(included[:, inner], u[inner]) >= LEVEL


@pytest.mark.slow
@pytest.mark.parametrize(("K", "L", "min_hits"), SETTINGS)
def test_chi_square_over_keys_accepts_the_law(K, L, min_hits, draw_samples, keys_at):
    cosines = cosines_of_shares(K, L, min_hits)
    included = draw_samples(
        QUERY.float(),
        keys_at(cosines, QUERY).float(),
        K=K,
        L=L,
        min_hits=min_hits,
        draws=100 * len(cosines),
        seed=10**6,
    )
    u = log_inclusion(cosines, K, L, min_hits).exp()
    # The usual condition for the normal approximation: five expected hits and five expected misses.
    assert 100 * min(u.min(), 1 - u.max()) >= 5
    assert chi_square_p_value(included, u) >= LEVEL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("K", "L", "min_hits", "shift"),
    [(9, 75, 2, 0.0), (8, 60, 2, 0.0), (8, 75, 1, 0.0), (8, 75, 3, 0.0), (8, 75, 2, 0.05)],
    ids=["one bit more", "a fifth fewer tables", "one hit fewer", "one hit more", "cosines off by 0.05"],
)
def test_a_law_that_is_slightly_wrong_is_refused(K, L, min_hits, shift, draw_samples, keys_at):
    cosines = cosines_of_shares(8, 75, 2)
    included = draw_samples(
        QUERY.float(), keys_at(cosines, QUERY).float(), K=8, L=75, min_hits=2, draws=100 * len(cosines)
    )
    wrong = log_inclusion(cosines + shift, K, L, min_hits).exp()
    assert smallest_p_value(included, wrong) < LEVEL
    assert chi_square_p_value(included, wrong) < LEVEL


def test_many_draws_at_once_are_the_algorithm_repeated(draw_samples):
    K, L, min_hits, draws, sinks, recent = 5, 30, 2, 40, 3, 9
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (1, 200))
    indexed = key[: 200 - recent]
    centred = (indexed - segment_centre(indexed, 1))[sinks:]
    included = draw_samples(query[0], centred, K=K, L=L, min_hits=min_hits, draws=draws, seed=4)

    planes = make_planes(16, K, L * draws, seed=4)
    for draw, family in enumerate(planes.split(L * K, dim=1)):
        _, [sample] = attend_lsh(
            query,
            key[None],
            key[None],
            K=K,
            L=L,
            min_hits=min_hits,
            sinks=sinks,
            recent=recent,
            stride=1,
            scale=0.25,
            planes=family,
        )
        assert torch.equal(sample.ids - sinks, included[draw].nonzero().squeeze(-1))
        law = log_inclusion(cosine(query, centred), K, L, min_hits)
        torch.testing.assert_close(sample.log_u, law[included[draw]], rtol=1e-12, atol=1e-12)
