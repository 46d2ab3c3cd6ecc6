"""A `Block` of rows, filled in order and shared by reference.

What lies before `filled` is final. So stores that were forked read the same block, and the first of them to go on may
write behind `filled`; the others copy what they hold of it.
"""

from __future__ import annotations

from torch import Tensor

from magicpig.kernels.arena import Memory


class Block:
    """Up to 4096 consecutive positions of every kv head: tensors [G, capacity, ...], filled in order.

    filled: rows that are final. shared: other stores may read it, so a store may only write what lies behind `filled`.
    centre: (G, D) float32 that was taken off the keys before they were rounded to whole numbers, or None.
    """

    __slots__ = ("centre", "filled", "memory", "shared")

    def __init__(self, memory: Memory, filled: int = 0, centre: Tensor | None = None) -> None:
        self.memory = memory
        self.filled = filled
        self.shared = False
        self.centre = centre

    @property
    def rows(self) -> Tensor:
        return self.memory.tensor

    @property
    def capacity(self) -> int:
        return self.memory.tensor.shape[1]

    def writable(self, row: int, end: int) -> bool:
        """Whether a store that holds the first `row` rows may write [row, end) here."""
        return end <= self.capacity and (not self.shared or self.filled == row)
