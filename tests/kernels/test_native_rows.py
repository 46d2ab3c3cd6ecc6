"""Rows in whole numbers: the kernel against the reference, which is small enough to be read; and both against x."""

import math

import pytest
import torch
from torch import Tensor

from magicpig.kernels import base, cpu, library
from magicpig.kernels.rows.layout import RowLayout
from magicpig.kernels.rows.reference import from_bytes, to_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = [1, 7, 15, 32, 33, 64, 80, 128, 512]


def written(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Numbers (G, n, Dp) and scales (G, n) of one half of rows whose memory was full of something else."""
    G, n, D = x.shape
    rows = torch.full((G, n, base.row_width(D, torch.int8)), 77, dtype=torch.int8)
    before = rows.clone()
    cpu.write_bytes(x, rows, half)
    width = base.padded(D)
    other = slice((1 - half) * width, (2 - half) * width)
    assert torch.equal(rows[:, :, other], before[:, :, other])
    scales = rows[:, :, 2 * width :].view(torch.float32)
    assert torch.equal(scales[:, :, 1 - half], before[:, :, 2 * width :].view(torch.float32)[:, :, 1 - half])
    return rows[:, :, half * width : (half + 1) * width], scales[:, :, half]


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("D", WIDTHS)
def test_numbers_and_scales_are_the_references(D, half, isa):
    x = torch.randn(2, 301, D) * torch.logspace(-30, 30, 301)[:, None]
    numbers, scales = written(x, half)
    right_numbers, right_scales = to_bytes(x)
    assert torch.equal(scales, right_scales)
    # A number may round the other way where x / scale lies within a few roundings of a half.
    off = (numbers[:, :, :D].int() - right_numbers.int()).abs()
    tie = ((x / right_scales[:, :, None]).frac().abs() - 0.5).abs() < 127 * 2.0**-22
    assert off.max() <= 1
    assert not off[~tie].any()
    assert not numbers[:, :, D:].any()


@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
def test_any_number_of_rows_on_any_pool(n, pool):
    x = torch.randn(3, n, 40)
    numbers, scales = written(x, 0)
    assert torch.equal(scales, to_bytes(x)[1])
    assert float((numbers[:, :, :40].int() - to_bytes(x)[0].int()).abs().float().mean()) < 1e-3


def test_no_number_is_further_from_its_own_than_half_a_scale():
    x = torch.randn(1000, 96) ** 3
    numbers, scale = to_bytes(x)
    assert torch.equal(numbers.int().abs().amax(1), torch.full((1000,), 127))  # the range is used up
    assert float(((from_bytes(numbers, scale) - x).abs() / scale[:, None]).max()) <= 0.5 + 127 * 2.0**-23


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-37, 1.4e-36])
def test_vectors_without_a_scale_are_zero(size, isa):
    # The scale of the last would be below the normal floats, whose inverse need not be one.
    x = torch.full((1, 3, 16), size)
    numbers, scales = written(x, 0)
    assert torch.equal(from_bytes(numbers, scales), torch.zeros(1, 3, 32))
    assert torch.equal(from_bytes(*to_bytes(x)), torch.zeros(1, 3, 16))


def test_the_largest_floats_that_fit_have_a_scale(isa):
    x = torch.full((1, 1, 16), 2.0**127)
    layout = RowLayout(16, torch.float32, torch.int8)
    assert layout.fits(x)
    assert not layout.fits(1.5 * x)  # 127 times its scale may be infinite
    x[0, 0, 3] = -1.0
    numbers, scales = written(x, 1)
    assert from_bytes(numbers, scales)[0, 0, :16].isfinite().all()
    assert numbers[0, 0, :4].tolist() == [127, 127, 127, 0]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_a_layout_reads_what_it_wrote(stored):
    dtype = torch.bfloat16 if stored == torch.int8 else stored
    layout = RowLayout(40, dtype, stored)
    rows = library.empty((2, 9, layout.width), stored)
    keys, values = torch.randn(2, 9, 40), torch.randn(2, 9, 40)
    layout.write_keys(rows, keys)
    layout.write_values(rows, values)
    # Half a scale, which is at most 4 / 127 here, and half a unit of bfloat16.
    for read, right in ((layout.keys(rows), keys), (layout.values(rows), values)):
        assert read.dtype == dtype
        assert float((read.float() - right).abs().max()) < 4 / 254 + 4 * 2.0**-8
    assert rows.nbytes == 18 * layout.nbytes
    assert layout.bytes_read == layout.nbytes - 2 * 24 * stored.itemsize


def test_rows_in_bytes_are_little_more_than_half_of_bfloat16():
    for D in (64, 96, 128, 256):
        whole, half = (RowLayout(D, torch.bfloat16, stored).nbytes for stored in (torch.bfloat16, torch.int8))
        assert half / whole <= 0.54


def test_what_does_not_fit_is_refused():
    rows = torch.zeros(2, 5, base.row_width(40, torch.int8), dtype=torch.int8)
    for x in (torch.zeros(2, 4, 40), torch.zeros(1, 5, 40), torch.zeros(2, 5, 8)):
        with pytest.raises(ValueError, match=r"^rows and vectors disagree about their shape$"):
            cpu.write_bytes(x, rows, 0)
    with pytest.raises(ValueError, match=r"^rows must be int8 and contiguous in the last dimension$"):
        cpu.write_bytes(torch.zeros(2, 5, 40), rows.to(torch.int16), 0)


def test_a_scale_is_a_natural_number_of_no_bits_lost():
    numbers = torch.arange(-127, 128, dtype=torch.int8)
    assert torch.equal(to_bytes(from_bytes(numbers, torch.tensor(math.pi)))[0], numbers)
