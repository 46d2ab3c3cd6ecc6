"""The values that travel between the verbs. No behaviour lives here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionState:
    """Softmax attention over some set of keys, in a form that can be merged with that over another set.

    output: (..., H, D) the weighted mean of the values; zeros when the set is empty.
    lse: (..., H) natural logarithm of the sum of the exponentials; -inf when the set is empty.
    """

    output: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Sample:
    """The keys one query head drew.

    ids: (S,) int64 token positions, ascending.
    log_u: (S,) natural logarithm of each key's inclusion probability, by which its weight is divided.
    """

    ids: Tensor
    log_u: Tensor


@dataclass(frozen=True)
class StepInfo:
    """What one attention step looked at.

    ids[b][h], log_u[b][h]: the `Sample` of query head h of sequence b (empty where attention was exact).
    rows: (B, G) int64, distinct sampled rows read per key/value head (the exact set is not counted).
    predicted_error: (B, H), what the sample says of the relative L2 error of the output, one standard error; 0 where
    attention was exact. NaN says that nothing is known: where nothing was drawn although keys were left out, and where
    the sampler is one for comparison. Not finite where values are too large to be squared.
    """

    ids: list[list[Tensor]]
    log_u: list[list[Tensor]]
    rows: Tensor
    predicted_error: Tensor


@dataclass(frozen=True)
class MemoryUse:
    """Bytes held: `rows` for keys and values, `index` for what the sampler needs to find them."""

    rows: int
    index: int

    @property
    def total(self) -> int:
        return self.rows + self.index

    def __add__(self, other: MemoryUse) -> MemoryUse:
        return MemoryUse(self.rows + other.rows, self.index + other.index)
