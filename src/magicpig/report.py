"""What decoding read and what a cache holds, in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

ERROR_BINS, BINS_PER_OCTAVE = 128, 8  # bin i: up to 2^((i + 1) / 8 - 12), below and above included


def error_bin(error: float) -> int:
    """The bin of a finite predicted error."""
    wanted = math.ceil(BINS_PER_OCTAVE * (math.log2(max(error, 1e-9)) + 12)) - 1
    return min(max(wanted, 0), ERROR_BINS - 1)


@dataclass(frozen=True)
class PredictedErrors:
    """The predicted errors of the sampled heads of all steps: how many, their sum, the largest, and a histogram.

    unknown: how many more there are that say nothing, since nothing was drawn or the prediction is not finite.
    """

    count: int
    unknown: int
    sum: float
    largest: float
    bins: tuple[int, ...]  # see error_bin

    @property
    def mean(self) -> float:
        """NaN where none is known."""
        return self.sum / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The error that this share of the known ones is below: the upper end of its bin, 9 % above at most."""
        if self.count == 0:
            return math.nan
        wanted, seen = share * self.count, 0
        for i, heads in enumerate(self.bins):
            seen += heads
            if seen >= wanted:
                return min(self.largest, float(2.0 ** ((i + 1) / BINS_PER_OCTAVE - 12)))
        return self.largest

    def __add__(self, other: PredictedErrors) -> PredictedErrors:
        return PredictedErrors(
            self.count + other.count,
            self.unknown + other.unknown,
            self.sum + other.sum,
            max(self.largest, other.largest),
            tuple(a + b for a, b in zip(self.bins, other.bins, strict=True)),
        )


@dataclass
class StepStats:
    """What decoding read, since the store was made; counted per query head.

    sampled_rows of body_rows were read in `steps` steps, those of samples included that an epsilon did not take;
    max_share is the largest share in any step and head. whole_bodies: how often a head read all.
    """

    steps: int
    sampled_rows: int
    body_rows: int
    max_share: float
    whole_bodies: int
    predicted: PredictedErrors

    @property
    def mean_share(self) -> float:
        return self.sampled_rows / self.body_rows if self.body_rows else 0.0


@dataclass(frozen=True)
class LayerReport:
    """One layer, all sequences of the batch together.

    kind: "sampled", "dense" (full attention that stays exact) or "sliding" (the stock cache of transformers).
    tokens: tokens held. indexed: of these, the ones that are sampled; the others are read by every step.
    sampled_share_mean, sampled_share_max: of the indexed keys, the share that a query head read in a decode step;
    None before the first sampled step.
    predicted_error_mean, _p95, _max: of the relative error that each step and query head predicted of its own output;
    None before that, and for samplers for comparison, which predict nothing.
    predicted_error_unknown: the share of steps and heads that could not say: nothing was drawn, or values are huge;
    the others leave these out.
    epsilon: the error that was asked for, None without one. all_read: the share of steps and heads in which it took
    all of the indexed keys; None without one, and before the first sampled step.
    kv_bytes: memory of keys and values. index_bytes: memory of the hash tables, or of what else finds keys. What
    sequences share is counted once.
    full_step_bytes: keys and values that one step of full attention over `tokens` reads.
    read_step_bytes: keys and values that one step reads now, at the mean share; query heads that share a key/value
    head are counted as if no two of them drew the same row, unless they share their sample.
    """

    layer: int
    kind: str
    tokens: int
    indexed: int
    sampled_share_mean: float | None
    sampled_share_max: float | None
    predicted_error_mean: float | None
    predicted_error_p95: float | None
    predicted_error_max: float | None
    predicted_error_unknown: float | None
    kv_bytes: int
    index_bytes: int
    full_step_bytes: int
    read_step_bytes: int
    epsilon: float | None = None
    all_read: float | None = None


def _mean(numbers: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    known = [x for x in numbers if x is not None]
    return sum(known) / len(known) if known else None


def _largest(numbers: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    return max((x for x in numbers if x is not None), default=None)


@dataclass(frozen=True)
class CacheReport:
    """Layer by layer; the totals, under the same names, are properties."""

    layers: tuple[LayerReport, ...]

    @property
    def tokens(self) -> int:
        """Of the longest layer, all sequences together."""
        return max((layer.tokens for layer in self.layers), default=0)

    @property
    def sampled_share_mean(self) -> float | None:
        """Mean over the layers that sample, None if none has yet."""
        return _mean(x.sampled_share_mean for x in self.layers)

    @property
    def sampled_share_max(self) -> float | None:
        """Largest of any layer, step and head; None if no layer has sampled yet."""
        return _largest(x.sampled_share_max for x in self.layers)

    @property
    def predicted_error_mean(self) -> float | None:
        """Mean over the layers that predict one."""
        return _mean(x.predicted_error_mean for x in self.layers)

    @property
    def predicted_error_p95(self) -> float | None:
        """That of the layer where it is largest."""
        return _largest(x.predicted_error_p95 for x in self.layers)

    @property
    def predicted_error_max(self) -> float | None:
        """Largest of any layer, step and head."""
        return _largest(x.predicted_error_max for x in self.layers)

    @property
    def predicted_error_unknown(self) -> float | None:
        """Mean over the layers that predict one."""
        return _mean(x.predicted_error_unknown for x in self.layers)

    @property
    def epsilon(self) -> float | None:
        """The largest that was asked for in any layer."""
        return _largest(x.epsilon for x in self.layers)

    @property
    def all_read(self) -> float | None:
        """Mean over the layers that have an epsilon."""
        return _mean(x.all_read for x in self.layers)

    @property
    def kv_bytes(self) -> int:
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def index_bytes(self) -> int:
        return sum(layer.index_bytes for layer in self.layers)

    @property
    def full_step_bytes(self) -> int:
        return sum(layer.full_step_bytes for layer in self.layers)

    @property
    def read_step_bytes(self) -> int:
        return sum(layer.read_step_bytes for layer in self.layers)
