"""Why keys are centred: in two opposite cones nothing collides until they are."""

import math

import pytest
import torch

from magicpig.collision import log_inclusion
from magicpig.kernels.algorithm import attend_lsh, cosine
from magicpig.kernels.hash.reference import segment_centre

N, HEAD_DIM = 1000, 128
K, L, MIN_HITS = 10, 150, 2


@pytest.fixture
def cones() -> tuple[torch.Tensor, torch.Tensor]:
    """A query (1, D) and keys (N, D) about opposite axes, as attention heads have them (MagicPIG, section 3)."""
    generator = torch.Generator().manual_seed(0)
    axis = torch.randn(HEAD_DIM, generator=generator)
    query = 2.0 * axis + torch.randn(1, HEAD_DIM, generator=generator)
    keys = -2.0 * axis + torch.randn(N, HEAD_DIM, generator=generator)
    assert cosine(query, keys).max() < -0.6
    return query, keys


def expected_share(query: torch.Tensor, keys: torch.Tensor) -> float:
    return float(log_inclusion(cosine(query, keys), K, L, MIN_HITS).exp().mean())


def test_without_centring_nearly_nothing_is_sampled(cones, draw_samples):
    query, keys = cones
    assert expected_share(query, keys) < 1e-6
    included = draw_samples(query[0], keys, K=K, L=L, min_hits=MIN_HITS, draws=30)
    # The law expects less than 30 * 1000 * 1e-6 = 0.03 samples; three or more have probability below 1e-5.
    assert included.sum() <= 2


def test_with_centring_the_share_is_the_expected_one(cones):
    query, keys = cones
    expected = expected_share(query, keys - segment_centre(keys, 8))
    # Near-orthogonal keys: MagicPIG reports 2 % for (10, 150) (table 9).
    assert 0.01 < expected < 0.04
    shares = []
    for seed in range(30):
        _, [sample] = attend_lsh(
            query,
            keys[None],
            keys[None],
            K=K,
            L=L,
            min_hits=MIN_HITS,
            sinks=0,
            recent=0,
            stride=8,
            scale=HEAD_DIM**-0.5,
            seed=seed,
        )
        shares.append(len(sample.ids) / N)
    shares = torch.tensor(shares, dtype=torch.float64)
    # Samples of one draw are correlated, draws are not: five empirical standard errors of the mean of 30. (A
    # t-distribution with 29 degrees of freedom is beyond five with probability 3e-5.)
    assert abs(shares.mean() - expected) <= 5 * shares.std() / math.sqrt(30)


def test_centring_looks_at_indexed_keys_alone(cones):
    query, keys = cones
    settings = {"K": 6, "L": 60, "min_hits": 2, "sinks": 4, "recent": 64, "stride": 8, "scale": HEAD_DIM**-0.5}
    moved = keys.clone()
    moved[-64:] -= 777.0
    _, [sample] = attend_lsh(query, keys[None], keys[None], **settings)
    _, [other] = attend_lsh(query, moved[None], keys[None], **settings)
    assert len(sample.ids) > 0
    assert torch.equal(sample.ids, other.ids)
    assert torch.equal(sample.log_u, other.log_u)
