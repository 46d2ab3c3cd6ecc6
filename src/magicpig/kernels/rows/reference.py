"""Vectors as whole numbers of eight bits and one scale each, in plain PyTorch.

Symmetric rounding to the nearest, one scale per token and head, as KV caches are commonly quantised, for example in
KIVI (arXiv 2402.02750), which says why keys suffer more from it than values: a few coordinates are large in all of
them. The store takes the mean off the keys before, and these coordinates with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # below it there is no inverse; such vectors count as zero


def to_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` (..., D) as int8 (..., D) in -127 .. 127 times a scale (...), float32 or float64."""
    working = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = working.abs().amax(-1) / LARGEST
    scale = torch.where(scale >= SMALLEST_SCALE, scale, 0.0)
    numbers = working / torch.where(scale > 0, scale, torch.inf)[..., None]
    return numbers.round().to(torch.int8), scale


def from_bytes(numbers: Tensor, scale: Tensor) -> Tensor:
    """What `to_bytes` kept of x: (..., D), in the dtype of the scales."""
    return numbers.to(scale.dtype) * scale[..., None]


def halves(rows: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values (n, D), float64, of rows (n, width) as a store keeps them, in floats or in bytes."""
    scales = 2 * torch.float32.itemsize if rows.dtype == torch.int8 else 0
    width = (rows.shape[1] - scales) // 2
    keys, values = rows[:, :head_dim].double(), rows[:, width : width + head_dim].double()
    if scales:
        scale = rows[:, -scales:].contiguous().view(torch.float32).double()
        keys, values = keys * scale[:, :1], values * scale[:, 1:]
    return keys, values
