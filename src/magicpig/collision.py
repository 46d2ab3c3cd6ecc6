"""The collision law of SimHash: angle -> p -> p**K -> P[at least ``min_hits`` of ``L`` tables collide].

Knows angles and probabilities; knows nothing of keys, queries or tables. Everything is float64. Inclusion
probabilities are natural logarithms: the estimator divides by them, and they get so small that any epsilon
added to them would decide the result.
"""

import math

import torch
from torch import Tensor

from magicpig.errors import ArgumentError

_LOG_HALF = -math.log(2.0)
_LOG_NEGLIGIBLE = math.log(torch.finfo(torch.float64).eps) - 4.0


def collision_probability(cosine: Tensor) -> Tensor:
    """Probability that two vectors lie on the same side of a random hyperplane through the origin.

    ``1 - angle / pi`` (Goemans and Williamson 1995; as a hash family, Charikar 2002). Cosines that rounding
    has pushed outside [-1, 1] are clamped. Any shape, returns float64.
    """
    # arccos(-c) is pi - arccos(c) without the cancellation near c = -1.
    return torch.arccos(-_clamped(cosine)) / math.pi


def log_inclusion(cosine: Tensor, K: int, L: int, min_hits: int) -> Tensor:
    """Natural log of u = P[Binomial(L, p**K) >= min_hits], the probability that a key is sampled.

    ``cosine`` is that between query and (centred) key, in any shape; the result is float64 of the same shape,
    with a relative error near 1e-13 in u for u -> 0 and in 1 - u for u -> 1. It is -inf only where u is zero:
    for opposite vectors. MagicPIG (arXiv 2410.16179) is the case ``min_hits`` = 2.
    Raises ArgumentError unless K >= 1 and 1 <= min_hits <= L.
    """
    if K < 1:
        raise ArgumentError(f"K must be at least 1, got {K}")
    if not 1 <= min_hits <= L:
        raise ArgumentError(f"min_hits must be between 1 and L = {L}, got {min_hits}")
    log_hit = K * _log_collision_probability(cosine)
    log_miss = _log_one_minus_exp(log_hit)

    # Sum the smaller tail: "fewer than min_hits" when a key is probably sampled, "at least" when it is rare.
    log_fewer = _log_binomial_pmf(0, L, log_hit, log_miss)
    for hits in range(1, min_hits):
        log_fewer = torch.logaddexp(log_fewer, _log_binomial_pmf(hits, L, log_hit, log_miss))
    rare = log_fewer > _LOG_HALF
    log_u = _log_one_minus_exp(log_fewer.clamp(max=0.0))
    log_u[rare] = _log_upper_tail(min_hits, L, log_hit[rare], log_miss[rare])
    return log_u


def _clamped(cosine: Tensor) -> Tensor:
    return cosine.to(torch.float64).clamp(-1.0, 1.0)


def _log_collision_probability(cosine: Tensor) -> Tensor:
    cosine = _clamped(cosine)
    near = torch.log1p(-torch.arccos(cosine) / math.pi)
    return torch.where(cosine > 0.0, near, collision_probability(cosine).log())


def _log_one_minus_exp(log_p: Tensor) -> Tensor:
    """log(1 - p) from log p <= 0 without cancellation at either end (Maechler 2012, "log1mexp")."""
    return torch.where(log_p > _LOG_HALF, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p)))


def _log_upper_tail(min_hits: int, L: int, log_hit: Tensor, log_miss: Tensor) -> Tensor:
    """log P[hits >= min_hits] where that tail is the smaller one, so that its terms only decrease."""
    total = _log_binomial_pmf(min_hits, L, log_hit, log_miss)
    for hits in range(min_hits + 1, L + 1):
        term = _log_binomial_pmf(hits, L, log_hit, log_miss)
        if torch.all(term <= total + _LOG_NEGLIGIBLE):
            break
        total = torch.logaddexp(total, term)
    return total


def _log_binomial_pmf(hits: int, L: int, log_hit: Tensor, log_miss: Tensor) -> Tensor:
    term = torch.full_like(log_hit, math.log(math.comb(L, hits)))
    # A factor to the power zero is one, even where its logarithm is -inf.
    if hits > 0:
        term += hits * log_hit
    if hits < L:
        term += (L - hits) * log_miss
    return term
