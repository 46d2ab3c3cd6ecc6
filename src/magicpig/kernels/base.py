"""The verbs that a store, a sampler and a step are made of, whoever computes them; and the forms of what they exchange.

`load_kernels` gives an implementation: compiled code for processors (cpu.py), or plain PyTorch, slow and obvious
(reference.py). Nothing above this folder imports one of them by name. Rows, tables and sketches are tensors of the same
form for both, so a store that one has filled can be read by the other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from magicpig.errors import ArgumentError, EnvironmentVariableError
from magicpig.types import AttentionState

LANE = 32  # rows are padded to a multiple of this, in elements
BLOCK_ROWS = 4096  # of one block of a store
SEGMENT_ROWS = 65536  # keys of one segment of tables: ids have 16 bits
SKETCH_KEYS = 64  # of one block of a sketch
LEAST_STRIDE = 8  # keys that have a centre in common, at least
BYTE_LANE = 64  # rows of a matrix of weights in int8 are padded to a multiple of this
MAX_LINEAR = 16  # vectors that are multiplied by a matrix of weights at a time
MAX_HEAD_DIM = 512
MAX_GROUP = 256  # query heads of one key/value head
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

KernelsName = Literal["cpu", "reference"]


def check_dtype(dtype: torch.dtype) -> None:
    """Raises ArgumentError for a dtype that kernels do not read."""
    if dtype not in DTYPES:
        raise ArgumentError(f"dtype={dtype} is not supported; allowed: {', '.join(map(str, DTYPES))}")


def padded(head_dim: int) -> int:
    """Elements a key or value of `head_dim` takes in a row. Raises ArgumentError when it is out of range."""
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ArgumentError(f"head_dim={head_dim} is out of range; allowed: 1 to {MAX_HEAD_DIM}")
    return -(-head_dim // LANE) * LANE


def row_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a row `[key | value]`, and of the two scales behind them where it is of int8."""
    return 2 * padded(head_dim) + (2 * torch.float32.itemsize if dtype == torch.int8 else 0)


def stride_shift(stride: int) -> int:
    """The logarithm of a stride. Raises ArgumentError for one that the kernels do not know."""
    if not LEAST_STRIDE <= stride <= BLOCK_ROWS or stride & (stride - 1):
        raise ArgumentError(
            f"stride={stride} is not allowed; allowed: powers of two from {LEAST_STRIDE} to {BLOCK_ROWS}"
        )
    return stride.bit_length() - 1


def sketch_words(head_dim: int, bits: int) -> int:
    """32-bit words of the codes of a key. Codes of three bits are two planes, of two bits and of one."""
    return sum(-(-head_dim * width // 32) for width in ((2, 1) if bits == 3 else (bits,)))


def sketch_shapes(
    heads: int, keys: int, sampler: SketchSampler, stride: int
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of the words, scales and centres of `keys` keys."""
    blocks = -(-keys // SKETCH_KEYS)
    return (
        ((heads, blocks, sampler.words, SKETCH_KEYS), torch.int32),
        ((heads, blocks * SKETCH_KEYS), torch.float16),
        ((heads, -(-blocks * SKETCH_KEYS // stride), padded(sampler.head_dim)), torch.bfloat16),
    )


def as_rows(keys: Tensor, values: Tensor) -> Tensor:
    """Rows (n, width) = [key | value], zero padded, from keys and values (n, D) of one float dtype."""
    (n, D), width = keys.shape, padded(keys.shape[1])
    rows = torch.zeros(n, 2 * width, dtype=keys.dtype, device="cpu")
    rows[:, :D] = keys
    rows[:, width : width + D] = values
    return rows


def interleave_heads(keys: Tensor) -> Tensor:
    """Keys (G, n, D) as `mean_keys` and the index read them: zero padded, (G, n, Dp)."""
    rows = torch.zeros(*keys.shape[:2], padded(keys.shape[2]), dtype=keys.dtype, device="cpu")
    rows[:, :, : keys.shape[2]] = keys
    return rows


@dataclass(frozen=True)
class Segment:
    """The bucket tables of `count` consecutive keys from position `first` on. Never changed once built.

    offsets: (G, L, 2^K + 1) uint32 bucket starts; ids: (G, L, count) uint16 relative positions, bucket by bucket.
    centre: (G, D) float32, what the keys were hashed minus; None for as they are.
    """

    offsets: Tensor
    ids: Tensor
    first: int
    centre: Tensor | None = None

    @property
    def count(self) -> int:
        return self.ids.shape[2]

    @property
    def K(self) -> int:
        return (self.offsets.shape[2] - 1).bit_length() - 1

    @property
    def nbytes(self) -> int:
        return self.offsets.nbytes + self.ids.nbytes


@dataclass(frozen=True)
class SketchSegment:
    """The sketch of `count` consecutive keys from position `first` on, in blocks of 64. Never changed once made.

    words: (G, blocks, words, 64) int32, the codes; scales: (G, blocks * 64) float16; centres: (G, strides, Dp)
    bfloat16, of as many strides as have room in the blocks. There may be more in them than `count` keys.
    """

    words: Tensor
    scales: Tensor
    centres: Tensor
    first: int
    count: int

    @property
    def blocks(self) -> int:
        return self.words.shape[1]

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes + self.centres.nbytes


@dataclass(frozen=True)
class SketchWeights:
    """What a sketch says of n keys to the R heads of a group: weights (n,) int64.

    query: (R, D) int8, the whole numbers of the rotated queries; offsets: (R, strides), what centres add to scores, in
    octaves, or to logits where there is a softcap; log_normalisers: (R,) float64, the score in octaves to which
    each head gives a weight of one.
    """

    weights: Tensor
    query: Tensor
    offsets: Tensor
    log_normalisers: Tensor


@dataclass(frozen=True)
class Draw:
    """step and start of the walk; ids: (S,) int64; log_u: (S,) float32."""

    step: int
    start: int
    ids: Tensor
    log_u: Tensor


FAULTS = ("", "query", "keys", "values")
"""By number, which of its tensors kept a sequence out of a step; it has entries that are not finite, or do not fit."""


@dataclass(frozen=True)
class StepResult:
    """output (B, H, D) in the query's dtype; lse and predicted_error (B, H) float32; NaN for a sequence with a fault.

    faults[b]: a number of `FAULTS`; empty when there are none. samples[b * H + h] = (ids, log_u) when asked for.
    """

    output: Tensor
    lse: Tensor
    predicted_error: Tensor
    faults: list[int]
    samples: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SampledHalf:
    """The half of a step that attends to what is drawn. Merged with that over the exact rows it is the whole.

    state: output (B, H, D) and lse (B, H), float32; zeros and -inf where nothing was drawn. spread: (B, H, D + 2)
    float32, sums over the sample of (1 - u) w^2 times value, value^2 and 1, w being the share of a row in this state:
    see `predicted_error`. faults, samples: as of a `StepResult`; the state of a sequence with a fault is NaN.
    """

    state: AttentionState
    spread: Tensor
    faults: list[int]
    samples: list[tuple[Tensor, Tensor]]

    def predicted_error(self, whole: AttentionState) -> Tensor:
        """What the sample says of the relative error of the merged state (B, H, D): (B, H) float32, 0 of no sample.

        As kernels/attend/reference.py, with the square multiplied out.
        """
        output = whole.output.double()
        share = (self.state.lse.double() - whole.lse.double()).exp()
        values, square, total = self.spread.double().split([output.shape[-1], 1, 1], -1)
        norm = output.square().sum(-1)
        away = square[..., 0] - 2 * (output * values).sum(-1) + norm * total[..., 0]
        error = share * (away.clamp(min=0) / norm).sqrt()
        return torch.where(total[..., 0] == 0, 0.0, error).float()


class HashSampler(Protocol):
    """The hash directions of a setting, as one implementation keeps them."""

    @property
    def head_dim(self) -> int: ...
    @property
    def K(self) -> int: ...
    @property
    def L(self) -> int: ...


class SketchSampler(Protocol):
    """The rotation of a setting, as one implementation keeps it. words: of a key, see `sketch_words`."""

    @property
    def head_dim(self) -> int: ...
    @property
    def bits(self) -> int: ...
    @property
    def words(self) -> int: ...


class View(Protocol):
    """What one implementation knows of a store: where things are, lengths, and counts since its creation."""

    length: int
    indexed_to: int
    steps: int
    sampled_rows: int
    body_rows: int
    max_share: float
    whole_bodies: int

    @property
    def predicted(self) -> tuple[int, int, float, float, list[int]]:
        """Count, unknown, sum, largest and bins of report.PredictedErrors."""
        ...


class Kernels(Protocol):
    """The verbs. A module is an implementation. Axes: B sequences, H query heads, G key/value heads, R = H / G, N
    tokens, D head dim, K bits, L tables. Everything in and out is in host memory; `Any` stands for what an
    implementation made itself: a view, a sampler, a law.
    """

    NAME: str  # for `load_kernels`

    # --- a store, as a step sees it ---

    def make_view(
        self,
        dtype: torch.dtype,
        heads: int,
        head_dim: int,
        sinks: int,
        stride: int,
        *,
        layer: int = 0,
        first_head: int = 0,
    ) -> View: ...
    def set_rows(
        self, view: Any, blocks: Sequence[Tensor], centres: Sequence[Tensor], tail: Tensor | None, flushed: int
    ) -> None: ...
    def set_segments(self, view: Any, segments: Sequence[Segment]) -> None: ...
    def set_sketches(self, view: Any, segments: Sequence[SketchSegment]) -> None: ...
    def set_sampler(self, view: Any, sampler: Any) -> None: ...
    def set_policy(
        self,
        view: Any,
        *,
        budget: float = 512,
        candidates: float = ...,
        epsilon: float = 0.0,
        limit: float = ...,
        seed: int = 0,
        law: Any = None,
    ) -> None: ...

    # --- rows ---

    def write_bytes(self, x: Tensor, rows: Tensor, half: int) -> None: ...
    def mean_keys(self, rows: Tensor, head_dim: int, row_centres: Tensor | None = None) -> Tensor: ...

    # --- hash, tables ---

    def make_sampler(self, head_dim: int, K: int, L: int, seed: int) -> HashSampler: ...
    def make_law(self, K: int, L: int, min_hits: int) -> Any: ...
    def hash_rows(self, pieces: Sequence[Tensor], sampler: Any, centres: Sequence[Tensor] = ()) -> Tensor: ...
    def hash_queries(self, query: Tensor, sampler: Any) -> Tensor: ...
    def build(self, codes: Tensor, K: int, first: int, centre: Tensor | None = None) -> Segment: ...
    def extend(self, a: Segment, b: Segment) -> Segment: ...
    def shorten(self, a: Segment, count: int) -> Segment: ...
    def lookup(self, query_codes: Tensor, segment: Segment, head: int, min_hits: int) -> Tensor: ...

    # --- weights ---

    def linear(self, x: Tensor, weight: Tensor, scales: Tensor | None = None, bias: Tensor | None = None) -> Tensor: ...
    def few_vectors(self, dtype: torch.dtype) -> int: ...

    # --- sketch, score, draw ---

    def make_sketcher(self, head_dim: int, bits: int, seed: int) -> SketchSampler: ...
    def rotate(self, query: Tensor, sampler: Any) -> Tensor: ...
    def sketch_into(
        self,
        segment: SketchSegment,
        at: int,
        pieces: Sequence[Tensor],
        sampler: Any,
        *,
        stride: int,
        centred: bool = True,
        row_centres: Sequence[Tensor] = (),
    ) -> None: ...
    def weigh(
        self,
        query: Tensor,
        segments: Sequence[SketchSegment],
        head: int,
        sampler: Any,
        *,
        stride: int,
        scale: float,
        softcap: float = 0.0,
        sinks: int = 0,
    ) -> SketchWeights: ...
    def draw(
        self,
        weights: Tensor,
        budget: int,
        *,
        seed: int,
        layer: int = 0,
        head: int,
        position: int,
        phase: int = 1,
        sinks: int = 0,
    ) -> Draw: ...
    def weigh_rows(
        self,
        query: Tensor,
        blocks: Sequence[Tensor],
        ids: Tensor,
        log_u: Tensor,
        *,
        scale: float,
        offsets: Tensor | None = None,
        softcap: float = 0.0,
    ) -> Tensor: ...

    # --- attend, merge, and all of it in one ---

    def attend_many(
        self, query: Tensor, keys: Tensor, values: Tensor, *, scale: float, softcap: float = 0.0, causal: bool = False
    ) -> AttentionState: ...
    def prefers_many(self, dtype: torch.dtype, *, capped: bool) -> bool: ...

    def attend_rows(
        self, query: Tensor, rows: Tensor, *, scale: float, offset: Tensor | None = None, softcap: float = 0.0
    ) -> AttentionState: ...
    def attend(
        self,
        query: Tensor,
        blocks: Sequence[Tensor],
        ids: Tensor,
        log_u: Tensor,
        *,
        scale: float,
        offsets: Tensor | None = None,
        softcap: float = 0.0,
    ) -> AttentionState: ...
    def attend_hashed(
        self,
        query: Tensor,
        blocks: Sequence[Tensor],
        ids: Tensor,
        law: Any,
        *,
        scale: float,
        centres: Tensor | None = None,
        offsets: Tensor | None = None,
        keys_of_a_centre: int = SEGMENT_ROWS,
        softcap: float = 0.0,
    ) -> tuple[AttentionState, Tensor]: ...
    def merge(self, states: Sequence[AttentionState]) -> AttentionState: ...
    def decode_step(
        self,
        views: list[Any],
        query: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
        *,
        scale: float,
        softcap: float = 0.0,
        sink_logits: Tensor | None = None,
        capture: bool = False,
    ) -> StepResult: ...
    def sampled_half(
        self,
        views: list[Any],
        query: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
        *,
        scale: float,
        softcap: float = 0.0,
        sink_logits: Tensor | None = None,
        prepared: Sequence[Tensor | None] = (),
        exact: AttentionState | None = None,
        capture: bool = False,
    ) -> SampledHalf: ...
    def count_predicted(self, view: Any, errors: Tensor) -> None: ...
    def repeated_step(
        self, B: int, H: int, D: int, scale: float, softcap: float
    ) -> Callable[[list[Any], Tensor, Tensor, Tensor], tuple[Tensor, list[int]]]: ...


def load_kernels(name: str | None = None) -> Kernels:
    """The implementation of that name; by default MAGICPIG_KERNELS, or "cpu".

    Raises ArgumentError for a name that there is none of, EnvironmentVariableError where that is the environment's.
    """
    if name is None:
        name = os.environ.get("MAGICPIG_KERNELS") or "cpu"
        if name not in (names := get_args(KernelsName)):
            raise EnvironmentVariableError(f"MAGICPIG_KERNELS={name} is not one of {', '.join(names)}")
    if name == "cpu":
        from magicpig.kernels import cpu

        return cpu
    if name == "reference":
        from magicpig.kernels import reference

        return reference
    raise ArgumentError(f"kernels={name!r} is not one of {', '.join(map(repr, get_args(KernelsName)))}")
