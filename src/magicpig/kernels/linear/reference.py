"""A few vectors times a matrix of weights, in plain PyTorch; and a matrix in bytes.

Weights are rounded to whole numbers of eight bits with one scale per output channel, symmetric and to the nearest, as
in LLM.int8() (arXiv 2208.07339) without its outliers: the vectors are not rounded to eight bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from magicpig.kernels.base import BYTE_LANE
from magicpig.kernels.library import empty
from magicpig.kernels.rows.reference import from_bytes, to_bytes

_ROWS_AT_ONCE = 1024  # of a matrix that is rounded: as floats they take four times the memory


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (N, K) of floats as numbers (N, K padded with zeros to a multiple of 64) int8 and scales (N,)."""
    N, K = weight.shape
    numbers = empty((N, -(-K // BYTE_LANE) * BYTE_LANE), torch.int8)
    scales = torch.empty(N, dtype=torch.float32, device="cpu")
    for first in range(0, N, _ROWS_AT_ONCE):
        at = slice(first, first + _ROWS_AT_ONCE)
        numbers[at, :K], scales[at] = to_bytes(weight[at])
    return numbers, scales


def linear(x: Tensor, weight: Tensor, scales: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (N, >= K) transposed, its rows times scales (N,), plus bias (N,): (..., N) in x's dtype.

    Computed in float32, or float64 for such x.
    """
    working = torch.promote_types(x.dtype, torch.float32)
    plain = weight[:, : x.shape[-1]]
    plain = plain.to(working) if scales is None else from_bytes(plain, scales.to(working))
    y = x.to(working) @ plain.T
    return (y if bias is None else y + bias.to(working)).to(x.dtype)
