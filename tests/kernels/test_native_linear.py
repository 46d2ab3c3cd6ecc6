"""A few vectors times a matrix of weights: the kernel against float64, on every level, of every odd size."""

import math

import pytest
import torch
from torch import Tensor

from magicpig.errors import ArgumentError
from magicpig.kernels import base, cpu, reference
from magicpig.kernels.linear.reference import pack

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
KEPT = [*FLOATS, torch.int8]
SHAPES = [(1, 1), (3, 31), (4, 32), (5, 33), (130, 64), (7, 255), (9, 256), (6, 257), (33, 1000), (2, 8192)]  # (N, K)

# Relative to what products of random numbers are: |x| |row| / sqrt(K). A sum of K float32 terms of both signs errs by
# at most about the square root of K times 2^-24 of that, here 6e-6; a vector in 16 bits with a scale for 256 numbers,
# whose largest is some four times their root mean square, by 4 * 2^-15 / sqrt(12) = 4e-5.
ERROR = {True: 6e-6, False: 6e-5}


def kept(N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    weight = torch.randn(N, K)
    return pack(weight) if dtype == torch.int8 else (weight.to(dtype), None)


def assert_close(y: Tensor, x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None = None) -> None:
    assert y.isfinite().all()
    plain = weight[:, : x.shape[1]].double() * (1.0 if scales is None else scales[:, None])
    typical = x.double().norm(dim=1)[:, None] * plain.norm(dim=1) / math.sqrt(x.shape[1])
    error = y.double() - right_of(x, weight, scales, bias)
    assert float(error.norm() / typical.norm()) <= ERROR[scales is None]


def right_of(x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.double()
    return reference.linear(x.double(), weight, scales, bias)


@pytest.mark.parametrize("dtype", KEPT, ids=str)
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("vectors", [1, 3])
def test_matrices_of_every_size(vectors, N, K, dtype, isa):
    x, (weight, scales) = torch.randn(vectors, K), kept(N, K, dtype)
    assert_close(cpu.linear(x, weight, scales), x, weight, scales)


@pytest.mark.parametrize("dtype", KEPT, ids=str)
@pytest.mark.parametrize("vectors", range(1, base.MAX_LINEAR + 1))
def test_every_number_of_vectors(vectors, dtype, isa):
    x, (weight, scales) = torch.randn(vectors, 300), kept(37, 300, dtype)
    assert_close(cpu.linear(x, weight, scales), x, weight, scales)


@pytest.mark.parametrize("dtype", KEPT, ids=str)
@pytest.mark.parametrize("own", FLOATS, ids=str)
def test_vectors_and_bias_in_a_dtype_of_their_own(own, dtype, isa):
    x, bias, (weight, scales) = torch.randn(5, 96).to(own), torch.randn(21).to(own), kept(21, 96, dtype)
    y = cpu.linear(x, weight, scales, bias)
    assert y.dtype == own
    right = right_of(x, weight, scales, bias)
    rounding = torch.finfo(own).eps / 2
    # Rounded once, at the end; the error of one sum in a hundred may be three times that of most.
    sums = 4 * ERROR[scales is None] * math.sqrt(96)
    assert (y.double() - right).abs().le(rounding * right.abs() + sums).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", KEPT, ids=str)
def test_rows_shared_by_threads(threads, dtype, pool):
    torch.set_num_threads(threads)
    x, (weight, scales) = torch.randn(2, 64), kept(5003, 64, dtype)
    bias = torch.randn(5003)
    assert_close(cpu.linear(x, weight, scales, bias), x, weight, scales, bias)


@pytest.mark.parametrize("dtype", KEPT, ids=str)
def test_a_vector_with_few_large_numbers(dtype, isa):
    # Activations have them: a scale for all of a vector would round the others away.
    x, (weight, scales) = torch.randn(1, 2048), kept(64, 2048, dtype)
    x[0, 77] = 1e4
    small = x.clone()
    small[0, :256] = 0
    large = x - small
    error = cpu.linear(x, weight, scales) - right_of(large, weight, scales)
    right = right_of(small, weight, scales)
    # What the piece with the large number is rounded by: half a step of 1e4 * 2^-15, over 256 numbers.
    piece = 1e4 * 2.0**-15 / math.sqrt(12) * right_of(torch.ones(1, 1), weight[:, :1], scales).abs().max() * 16
    assert float((error - right).abs().max()) <= 4 * float(piece) + 1e-2


def test_numbers_that_are_too_small_for_a_scale_count_as_zero(isa):
    weight, scales = pack(torch.ones(3, 70))
    x = torch.full((1, 70), 1e-42)
    assert cpu.linear(x, weight, scales).abs().max() <= 71 * 1e-42
    assert not cpu.linear(torch.zeros(1, 70), weight, scales).any()


@pytest.mark.parametrize("dtype", KEPT, ids=str)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_in_its_own_vector(odd, dtype, isa):
    x, (weight, scales) = torch.ones(3, 300), kept(8, 300, dtype)
    x[1, 299] = odd
    y = cpu.linear(x, weight, scales)
    assert not y[1].isfinite().any()
    assert y[0].isfinite().all()
    assert torch.equal(y[0], y[2])


def test_rows_are_padded_with_zeros():
    numbers, scales = pack(torch.randn(5, 65))
    assert numbers.shape == (5, 128)
    assert not numbers[:, 65:].any()
    assert scales.shape == (5,)


def test_a_row_of_zeros_has_no_scale(isa):
    weight = torch.randn(6, 40)
    weight[2] = 0
    numbers, scales = pack(weight)
    assert not cpu.linear(torch.randn(2, 40), numbers, scales)[:, 2].any()


def test_many_rows_are_packed_as_few_are():
    weight = torch.randn(2500, 33).to(torch.bfloat16)
    numbers, scales = pack(weight)
    for first, last in ((0, 5), (1020, 1030), (2495, 2500)):
        part, part_scales = pack(weight[first:last])
        assert torch.equal(part, numbers[first:last])
        assert torch.equal(part_scales, scales[first:last])


@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (2, 3, 64), (0, 64), (2, 0)], ids=str)
def test_any_shape_of_vectors(shape):
    x, weight = torch.randn(shape), torch.randn(5, shape[-1])
    y = cpu.linear(x, weight)
    assert y.shape == (*shape[:-1], 5)
    torch.testing.assert_close(y, reference.linear(x, weight))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(17, 64), torch.ones(2, 64)), "17 vectors are too many; allowed: 16"),
        ((torch.ones(1, 63), torch.ones(2, 64)), r"weight has shape \(2, 64\), x has 63 columns"),
        ((torch.ones(1, 63), torch.ones(2, 63, dtype=torch.int8), torch.ones(2)), "x has 63 columns"),
        ((torch.ones(1, 64), torch.ones(2, 64, dtype=torch.int8)), "weights in int8 have scales"),
        ((torch.ones(1, 64), torch.ones(2, 64), torch.ones(2)), "weights in int8 have scales"),
        ((torch.ones(1, 64), torch.ones(2, 64), None, torch.ones(2).half()), "bias and x are of different dtypes"),
        ((torch.ones(2, 128)[:, ::2], torch.ones(2, 64)), "x and weight must be contiguous"),
        ((torch.ones(1, 64, dtype=torch.float64), torch.ones(2, 64)), "dtype=torch.float64 is not supported"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        cpu.linear(*arguments)
