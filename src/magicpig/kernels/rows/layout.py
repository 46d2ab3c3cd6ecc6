"""Where things lie in a row: one token of one key/value head, `[key | value]`, each padded with zeros to Dp.

Rows of whole numbers (int8) end with two float32, the scales of the key and of the value. Everything that looks inside
a row in Python does it here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from magicpig.kernels.base import Kernels, load_kernels, padded, row_width
from magicpig.kernels.rows.reference import from_bytes

LARGEST_QUANTISED = 2.0**127  # of the largest floats, the scale times 127 may be infinite


@dataclass(frozen=True)
class RowLayout:
    """Rows of keys and values of `head_dim` that are read as `dtype` and kept as `stored`: the same, or int8."""

    head_dim: int
    dtype: torch.dtype
    stored: torch.dtype
    kernels: Kernels = field(default_factory=load_kernels, compare=False)

    @property
    def width(self) -> int:
        """Elements of a row."""
        return row_width(self.head_dim, self.stored)

    @property
    def nbytes(self) -> int:
        return self.width * self.stored.itemsize

    @property
    def bytes_read(self) -> int:
        """What attention needs of a row: all of it but the padding."""
        padding = padded(self.head_dim) - self.head_dim
        return self.nbytes - 2 * padding * self.stored.itemsize

    @property
    def quantised(self) -> bool:
        return self.stored == torch.int8

    def fits(self, x: Tensor) -> bool:
        """Whether all entries of keys or values are finite, and still are when they have been stored."""
        x = x.to(self.dtype)
        return bool((x.abs() <= LARGEST_QUANTISED if self.quantised else torch.isfinite(x)).all())

    def keys(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """(G, n, D) of rows (G, n, width), in `dtype`, by default the model's; a view if nothing has to be computed."""
        return self._half(rows, 0, dtype or self.dtype)

    def values(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As `keys`."""
        return self._half(rows, 1, dtype or self.dtype)

    def write_keys(self, rows: Tensor, keys: Tensor) -> None:
        """Puts keys (G, n, D) of any float dtype into rows (G, n, width)."""
        self._write(rows, keys, 0)

    def write_values(self, rows: Tensor, values: Tensor) -> None:
        """As `write_keys`."""
        self._write(rows, values, 1)

    def _half(self, rows: Tensor, half: int, dtype: torch.dtype) -> Tensor:
        first = half * padded(self.head_dim)
        x = rows[:, :, first : first + self.head_dim]
        if not self.quantised:
            return x.to(dtype)
        scales = rows[:, :, -2 * torch.float32.itemsize :].view(torch.float32)
        return from_bytes(x, scales[:, :, half]).to(dtype)

    def _write(self, rows: Tensor, x: Tensor, half: int) -> None:
        if self.quantised:
            self.kernels.write_bytes(x, rows, half)
        else:
            first = half * padded(self.head_dim)
            rows[:, :, first : first + self.head_dim] = x
