"""What a step says of its own error where nothing can be said: not a number, never zero."""

import math

import pytest
import torch
from torch import Tensor

from magicpig import attend
from magicpig.attention.step import attend_stores
from magicpig.config import Config
from magicpig.store import KVStore

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = {"few tables": {"K": 16, "L": 2}, "equal keys": {"K": 8, "L": 75}}


def step(**settings: int) -> tuple[Tensor, Tensor, Tensor]:
    """A step that hashing draws nothing for: far too few tables, or centred keys that are all zero."""
    q, (k, v) = torch.randn(1, 4, 1, 64), torch.randn(2, 1, 2, 1500, 64)
    if settings["L"] == 75:
        k = k[:, :, :1].expand_as(k).contiguous()
    return q, k, v


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("settings", FEW.values(), ids=FEW.keys())
def test_a_sample_of_nothing_predicts_nothing(settings, kernels):
    q, k, v = step(**settings)
    _, _, info = attend(q, k, v, sampler="lsh", kernels=kernels, **settings)
    empty = torch.tensor([[len(ids) == 0 for ids in info.ids[0]]])
    assert empty.any()
    assert torch.equal(info.predicted_error.isnan(), empty)


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("sampler", ["lsh", "sketch", "full"])
def test_attention_that_is_exact_predicts_no_error(sampler, kernels):
    more = {"K": 16, "L": 2} if sampler == "lsh" else {}
    q, (k, v) = torch.randn(1, 4, 1, 64), torch.randn(2, 1, 2, 68, 64)
    _, _, info = attend(q, k, v, sampler=sampler, kernels=kernels, **more)
    assert info.predicted_error.eq(0).all()


def test_statistics_count_what_is_not_known_apart(isa):
    q, k, v = step(**FEW["few tables"])
    store = KVStore(2, 64, torch.float32, Config(sampler="lsh", K=16, L=2, exact_below=0), sampled=True)
    store.append(k[0], v[0])
    store.settle()
    _, info = attend_stores(q[:, :, 0], [store], scale=0.125)
    unknown = int(info.predicted_error.isnan().sum())
    assert unknown > 0
    predicted = store.stats.predicted
    assert (predicted.count, predicted.unknown) == (4 - unknown, unknown)
    assert sum(predicted.bins) == predicted.count
    if predicted.count == 0:
        assert math.isnan(predicted.mean)
        assert math.isnan(predicted.quantile(0.95))
    both = predicted + predicted
    assert (both.count, both.unknown) == (2 * predicted.count, 2 * unknown)


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("epsilon", [None, 0.05])
def test_values_too_large_to_be_squared_are_said_to_be(epsilon, kernels):
    q, (k, v) = torch.randn(1, 4, 1, 64), torch.randn(2, 1, 2, 1500, 64)
    exact, _, _ = attend(q, k, 1e25 * v, sampler="full")
    output, _, info = attend(q, k, 1e25 * v, budget=100, epsilon=epsilon, kernels=kernels)
    if epsilon is None:
        assert not info.predicted_error.isfinite().any()
    else:  # no sample can say that it is good enough: everything is read
        assert info.rows.eq(5 * 256 - 4).all()
        assert info.predicted_error.eq(0).all()
        torch.testing.assert_close(output / 1e25, exact / 1e25, rtol=1e-4, atol=1e-5)
