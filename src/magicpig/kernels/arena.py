"""Memory that stores and indexes are made of: counted once however many of them share it, and with a limit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from magicpig.errors import ArgumentError, InsufficientMemoryError
from magicpig.kernels import base, library

SMALLEST_BLOCK = 256  # rows; capacities are powers of two from here to base.BLOCK_ROWS


def block_capacity(rows: int) -> int:
    """The smallest allowed capacity for `rows` rows: powers of two from SMALLEST_BLOCK to a full block."""
    return min(base.BLOCK_ROWS, max(SMALLEST_BLOCK, 1 << (rows - 1).bit_length()))


class Memory:
    """A tensor whose bytes count in its arena for as long as this object lives, however many stores hold it."""

    __slots__ = ("__weakref__", "_arena", "nbytes", "tensor")

    def __init__(self, tensor: Tensor, arena: Arena) -> None:
        self.tensor = tensor
        self.nbytes = tensor.nbytes
        self._arena = arena
        arena.used += self.nbytes

    def __del__(self) -> None:
        self._arena.used -= self.nbytes


class Arena:
    """Where blocks and indexes come from. limit: bytes that may be in use at a time; None for all there is."""

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 0:
            raise ArgumentError(f"limit={limit} must not be negative")
        self.limit = limit
        self.used = 0

    def check(self, nbytes: int) -> None:
        """Raises InsufficientMemoryError if `nbytes` more would be too many."""
        if self.limit is not None and self.used + nbytes > self.limit:
            raise InsufficientMemoryError(
                f"{nbytes} more bytes of keys, values and indexes do not fit: {self.used} are in use and the limit is "
                f"{self.limit}"
            )

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Memory:
        """Zeroed memory, as of `library.empty`. Raises InsufficientMemoryError at the limit."""
        elements = 1
        for size in shape:
            elements *= size
        self.check(elements * dtype.itemsize)
        return Memory(library.empty(shape, dtype), self)

    def hold(self, tensor: Tensor) -> Memory:
        """Counts a tensor that was made elsewhere: by a kernel, or mapped from a file."""
        self.check(tensor.nbytes)
        return Memory(tensor, self)


UNLIMITED = Arena()
"""The arena of stores that are not given another one."""


def unique_bytes(memories: Iterable[Memory]) -> int:
    """Bytes of all of these, each counted once."""
    return sum({id(memory): memory.nbytes for memory in memories}.values())
