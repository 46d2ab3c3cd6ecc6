"""Many independent draws of the hash planes at once, and what the estimator makes of each of them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from magicpig.kernels.hash.reference import hash_vectors, make_planes

# Tables hashed per step: keeps the planes and the bits of a step near 100 MB.
BITS_PER_STEP = 8_000_000


def _draw_samples(query: Tensor, keys: Tensor, *, K: int, L: int, min_hits: int, draws: int, seed: int = 0) -> Tensor:
    """Which of ``keys`` (n, D) each draw samples for ``query`` (D,): bool (draws, n). Keys are not centred here.

    One call of `make_planes` with many times L tables is many families of L tables: they are independent anyway.
    """
    step = max(1, BITS_PER_STEP // ((len(keys) + keys.shape[1]) * L * K))
    included = []
    for start in range(0, draws, step):
        families = min(step, draws - start)
        planes = make_planes(keys.shape[1], K, L * families, seed=seed + start)
        key_codes = hash_vectors(keys, planes, K).unflatten(-1, (families, L))
        query_codes = hash_vectors(query[None], planes, K).unflatten(-1, (families, L))
        included.append(((key_codes == query_codes).sum(-1) >= min_hits).T)
    return torch.cat(included)


def _numerator_and_denominator(
    included: Tensor, logits: Tensor, log_u: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Horvitz-Thompson sums of exp(logit) times value, and of exp(logit), per draw: (draws, Dv) and (draws,)."""
    weights = included.double() * (logits - log_u).exp()
    return weights @ values, weights.sum(-1)


def _keys_at(cosines: Tensor, query: Tensor, seed: int = 0) -> Tensor:
    """One key of length one per cosine (n,), at that cosine to ``query`` (D,) and otherwise in a random direction."""
    unit = query / query.norm()
    across = torch.randn(len(cosines), len(query), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    across -= (across @ unit)[:, None] * unit
    across /= across.norm(dim=-1, keepdim=True)
    return cosines[:, None] * unit + (1 - cosines**2).sqrt()[:, None] * across


@pytest.fixture
def draw_samples() -> Callable[..., Tensor]:
    return _draw_samples


@pytest.fixture
def numerator_and_denominator() -> Callable[..., tuple[Tensor, Tensor]]:
    return _numerator_and_denominator


@pytest.fixture
def keys_at() -> Callable[..., Tensor]:
    return _keys_at
