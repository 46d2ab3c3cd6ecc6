"""The verbs of base.py in plain PyTorch: slow and obvious, what every faster implementation is compared with.

Each verb is that of a folder beside this file, brought to the form in which stores keep rows, tables and sketches.
Computes in float64. The algorithm from top to bottom, without stores, is algorithm.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from magicpig.collision import log_inclusion
from magicpig.errors import ArgumentError
from magicpig.kernels.algorithm import cosine, no_sample
from magicpig.kernels.attend import reference as rows_of_attention
from magicpig.kernels.base import (
    BLOCK_ROWS,
    SEGMENT_ROWS,
    SKETCH_KEYS,
    Draw,
    SampledHalf,
    Segment,
    SketchSegment,
    SketchWeights,
    StepResult,
    check_dtype,
    padded,
    sketch_words,
    stride_shift,
)
from magicpig.kernels.flash import reference as many
from magicpig.kernels.hash.reference import hash_vectors, make_planes
from magicpig.kernels.linear import reference as layers
from magicpig.kernels.rows.reference import halves, to_bytes
from magicpig.kernels.sketch import reference as sketches
from magicpig.kernels.tables import reference as tables
from magicpig.report import ERROR_BINS, error_bin
from magicpig.types import AttentionState

NAME = "reference"

_LARGEST = {torch.int8: 2.0**127, torch.float16: 65504.0}  # of larger numbers a scale times 127 may be infinite


@dataclass(frozen=True)
class Planes:
    """The hash directions of a setting, (D, L * K)."""

    head_dim: int
    K: int
    L: int
    directions: Tensor


@dataclass(frozen=True)
class Law:
    """In how many tables a key must collide, and how probable that is."""

    K: int
    L: int
    min_hits: int

    def log_u(self, cosines: Tensor) -> Tensor:
        return log_inclusion(cosines, self.K, self.L, self.min_hits)


@dataclass(frozen=True)
class Rotation:
    """The rotation of a setting, (D, D) float64."""

    head_dim: int
    bits: int
    matrix: Tensor

    @property
    def words(self) -> int:
        return sketch_words(self.head_dim, self.bits)


@dataclass
class _Policy:
    budget: float = 512
    candidates: float = 0.0
    epsilon: float = 0.0
    limit: float = sketches.EXACT_SHARE
    seed: int = 0
    law: Law | None = None


@dataclass(eq=False)
class View:
    """What is known of a store: its tensors."""

    dtype: torch.dtype
    heads: int
    head_dim: int
    sinks: int
    stride: int
    layer: int
    first_head: int
    length: int = 0
    indexed_to: int = 0
    steps: int = 0
    sampled_rows: int = 0
    body_rows: int = 0
    max_share: float = 0.0
    whole_bodies: int = 0
    errors: list[float] = field(default_factory=list)
    blocks: Sequence[Tensor] = ()
    centres: Sequence[Tensor] = ()
    tail: Tensor | None = None
    flushed: int = 0
    segments: Sequence[Segment] = ()
    sketches: Sequence[SketchSegment] = ()
    sampler: Planes | Rotation | None = None
    policy: _Policy = field(default_factory=_Policy)

    @property
    def sampling(self) -> bool:
        return self.indexed_to > self.sinks

    @property
    def body(self) -> int:
        return self.indexed_to - self.sinks

    @property
    def predicted(self) -> tuple[int, int, float, float, list[int]]:
        known = [error for error in self.errors if math.isfinite(error)]
        bins = [0] * ERROR_BINS
        for error in known:
            bins[error_bin(error)] += 1
        return len(known), len(self.errors) - len(known), math.fsum(known), max(known, default=0.0), bins

    def rows(self, head: int) -> tuple[Tensor, Tensor]:
        """All keys and values (length, D) float64 of one kv head, as they are kept."""
        keys, values = [], []
        for i, block in enumerate(self.blocks):
            n = max(0, min(BLOCK_ROWS, self.flushed - i * BLOCK_ROWS, self.length - i * BLOCK_ROWS))
            k, v = halves(block[head, :n], self.head_dim)
            keys.append(k + self.centres[i][head].double() if self.centres else k)
            values.append(v)
        if self.tail is not None and self.length > self.flushed:
            k, v = halves(self.tail[head, : self.length - self.flushed], self.head_dim)
            keys.append(k)
            values.append(v)
        empty = torch.zeros(0, self.head_dim, dtype=torch.float64, device="cpu")
        return torch.cat([empty, *keys]), torch.cat([empty, *values])


def make_view(
    dtype: torch.dtype, heads: int, head_dim: int, sinks: int, stride: int, *, layer: int = 0, first_head: int = 0
) -> View:
    """An empty view of a store whose rows are kept in `dtype`; see cpu.py."""
    stride_shift(stride)
    return View(dtype, heads, head_dim, sinks, stride, layer, first_head)


def set_rows(
    view: View, blocks: Sequence[Tensor], centres: Sequence[Tensor], tail: Tensor | None, flushed: int
) -> None:
    """Where a view's rows are; see cpu.py."""
    view.blocks, view.centres, view.tail, view.flushed = list(blocks), list(centres), tail, flushed


def set_segments(view: View, segments: Sequence[Segment]) -> None:
    """The tables of a view's keys from position 0 on."""
    view.segments = list(segments)


def set_sketches(view: View, segments: Sequence[SketchSegment]) -> None:
    """The sketch of a view's keys from position 0 on."""
    view.sketches = list(segments)


def set_sampler(view: View, sampler: Planes | Rotation | None) -> None:
    """What a view's index was made by."""
    view.sampler = sampler


def set_policy(
    view: View,
    *,
    budget: float = 512,
    candidates: float = 0.0,
    epsilon: float = 0.0,
    limit: float = sketches.EXACT_SHARE,
    seed: int = 0,
    law: Law | None = None,
) -> None:
    """How much a view's next steps draw, and by which luck; see cpu.py."""
    view.policy = _Policy(budget, candidates, epsilon, limit, seed, law)


# --- rows -------------------------------------------------------------------------------------------------------------


def write_bytes(x: Tensor, rows: Tensor, half: int) -> None:
    """Rounds x (G, n, D) to whole numbers with a scale each, into rows of int8; half: 0 for keys, 1 for values."""
    D = x.shape[2]
    numbers, scales = to_bytes(x.to(torch.float32))
    rows[:, :, half * padded(D) : half * padded(D) + D] = numbers
    rows[:, :, -2 * torch.float32.itemsize :].view(torch.float32)[:, :, half] = scales


def mean_keys(rows: Tensor, head_dim: int, row_centres: Tensor | None = None) -> Tensor:
    """The means (G, D) float32 of the keys in rows (G, n, width)."""
    means = torch.stack([_keys(head, head_dim).mean(0) for head in rows])
    return (means if row_centres is None else means + row_centres.double()).float()


def _keys(rows: Tensor, head_dim: int) -> Tensor:
    """Keys (n, D) float64 of rows (n, >= Dp) that may have no values."""
    return halves(rows, head_dim)[0] if rows.dtype == torch.int8 else rows[:, :head_dim].double()


# --- hash, tables -----------------------------------------------------------------------------------------------------


def make_sampler(head_dim: int, K: int, L: int, seed: int) -> Planes:
    """The hash directions of a setting."""
    return Planes(head_dim, K, L, make_planes(head_dim, K, L, seed))


def make_law(K: int, L: int, min_hits: int) -> Law:
    """In how many tables a key must collide, and how probable that is."""
    return Law(K, L, min_hits)


def hash_rows(pieces: Sequence[Tensor], sampler: Planes, centres: Sequence[Tensor] = ()) -> Tensor:
    """Codes (G, L, sum n_i) uint16 of consecutive keys; see cpu.py."""
    found = []
    for i, piece in enumerate(pieces):
        keys = torch.stack([_keys(head, sampler.head_dim) for head in piece])
        keys = keys - centres[i].double()[:, None] if centres else keys
        found.append(hash_vectors(keys, sampler.directions, sampler.K).mT)
    return torch.cat(found, 2).to(torch.uint16)


def hash_queries(query: Tensor, sampler: Planes) -> Tensor:
    """Codes (H, L) uint16 of queries (H, D)."""
    return hash_vectors(query.double(), sampler.directions, sampler.K).to(torch.uint16)


def build(codes: Tensor, K: int, first: int, centre: Tensor | None = None) -> Segment:
    """Sorts the codes (G, L, n <= 65536) uint16 of keys `first` .. into buckets."""
    return _segment([tables.build(head.to(torch.int64).T, K) for head in codes], first, centre)


def extend(a: Segment, b: Segment) -> Segment:
    """The tables of a's keys followed by b's, of the same centre."""
    pairs = zip(_tables(a), _tables(b), strict=True)
    return _segment([tables.extend(older, newer) for older, newer in pairs], a.first, a.centre)


def shorten(a: Segment, count: int) -> Segment:
    """The tables of the first `count` keys of a."""
    return _segment([tables.shorten(head, count) for head in _tables(a)], a.first, a.centre)


def lookup(query_codes: Tensor, segment: Segment, head: int, min_hits: int) -> Tensor:
    """Positions (S,) int64, ascending, of the keys of one kv head that share >= min_hits of the (L,) uint16 codes."""
    found = tables.lookup(query_codes.to(torch.int64), *_tables(segment)[head], min_hits)
    return found + segment.first


def _tables(segment: Segment) -> list[tables.Tables]:
    heads = zip(segment.offsets.to(torch.int64), segment.ids.to(torch.int64), strict=True)
    return [tables.Tables(offsets, ids) for offsets, ids in heads]


def _segment(heads: Sequence[tables.Tables], first: int, centre: Tensor | None) -> Segment:
    offsets = torch.stack([head.offsets for head in heads]).to(torch.uint32)
    return Segment(offsets, torch.stack([head.ids for head in heads]).to(torch.uint16), first, centre)


# --- sketch, score, draw ----------------------------------------------------------------------------------------------


def make_sketcher(head_dim: int, bits: int, seed: int) -> Rotation:
    """The rotation of a setting."""
    return Rotation(head_dim, bits, sketches.make_rotation(head_dim, seed).double())


def rotate(query: Tensor, sampler: Rotation) -> Tensor:
    """Queries (H, D) times the rotation, (H, D) float32."""
    return (query.double() @ sampler.matrix).float()


def sketch_into(
    segment: SketchSegment,
    at: int,
    pieces: Sequence[Tensor],
    sampler: Rotation,
    *,
    stride: int,
    centred: bool = True,
    row_centres: Sequence[Tensor] = (),
) -> None:
    """Sketches consecutive keys, whole strides, into a segment, as its keys from number `at` on; see cpu.py."""
    D = sampler.head_dim
    for i, piece in enumerate(pieces):
        n = piece.shape[1]
        for g, head in enumerate(piece):
            keys = _keys(head, D)
            keys = keys + row_centres[i][g].double() if row_centres else keys
            centres = sketches.stride_centres(keys, stride) if centred else torch.zeros_like(keys[::stride])
            sketch = sketches.quantise(keys - centres.repeat_interleave(stride, 0), sampler.matrix, sampler.bits)
            segment.centres[g, at // stride : (at + n) // stride, :D] = centres.to(torch.bfloat16)
            segment.scales[g, at : at + n] = sketch.scales.to(torch.float16)
            words = sketches.pack_words(sketch.levels, sampler.bits)
            number = torch.arange(at, at + n, dtype=torch.int64, device="cpu")
            segment.words[g, number // SKETCH_KEYS, :, number % SKETCH_KEYS] = words
        at += n


def weigh(
    query: Tensor,
    segments: Sequence[SketchSegment],
    head: int,
    sampler: Rotation,
    *,
    stride: int,
    scale: float,
    softcap: float = 0.0,
    sinks: int = 0,
) -> SketchWeights:
    """Weights of one kv head's keys for the queries (R, D) of its group; the first `sinks` have none."""
    return _weigh(query, rotate(query, sampler), segments, head, sampler, stride, scale, softcap, sinks)


def _weigh(
    query: Tensor,
    rotated: Tensor,
    segments: Sequence[SketchSegment],
    head: int,
    sampler: Rotation,
    stride: int,
    scale: float,
    softcap: float,
    sinks: int,
) -> SketchWeights:
    D, bits = sampler.head_dim, sampler.bits
    levels = torch.cat([sketches.unpack_words(s.words[head], D, bits)[: s.count] for s in segments])
    scales = torch.cat([s.scales[head, : s.count] for s in segments]).double()
    centres = torch.cat([s.centres[head, : -(-s.count // stride), :D] for s in segments]).double()
    offset = scale * query.double() @ centres.T
    each = offset.repeat_interleave(stride, 1)[:, : len(levels)]
    whole, unit = sketches.quantise_rotated(rotated.double())
    cap = softcap or None
    scores = sketches.score(whole, unit, sketches.Sketch(levels, scales), scale=scale, offset=each, softcap=cap)
    octaves, _ = sketches.log_normalisers(scores, sinks)
    per_logit = 1.0 if softcap > 0 else 1 / math.log(2)
    return SketchWeights(sketches.weigh(scores, sinks), whole.to(torch.int8), (offset * per_logit).float(), octaves)


def draw(
    weights: Tensor,
    budget: int,
    *,
    seed: int,
    layer: int = 0,
    head: int,
    position: int,
    phase: int = 1,
    sinks: int = 0,
) -> Draw:
    """The sample of one kv head by the weights (n,) of its keys, as a decode step draws it in phase 1 or 2."""
    weights = weights.to(torch.int64).clone()
    weights[:sinks] = 0
    step = sketches.step_for(weights, budget)
    start = sketches.start_for(seed, layer, head, position, sketches.draw_number(phase, budget), step)
    ids, log_u = sketches.pick(weights, step, start)
    return Draw(step, start, ids, log_u.float())


def weigh_rows(
    query: Tensor,
    blocks: Sequence[Tensor],
    ids: Tensor,
    log_u: Tensor,
    *,
    scale: float,
    offsets: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Weights (S,) int64 of rows that were drawn with log u (S,), by their logits; see cpu.py."""
    keys, _ = _picked(blocks, ids, query.shape[1])
    logits = scale * (query.double() @ keys.T)
    if offsets is not None:
        logits = logits + offsets.double()[:, ids // BLOCK_ROWS]
    return sketches.weigh_logits(_capped(logits, softcap), log_u)


# --- attend, merge ----------------------------------------------------------------------------------------------------


def attend_rows(
    query: Tensor, rows: Tensor, *, scale: float, offset: Tensor | None = None, softcap: float = 0.0
) -> AttentionState:
    """Exact attention of a group's queries (H, D) over rows (n, width): output (H, D) and lse (H,), float32."""
    keys, values = halves(rows, query.shape[1])
    return _float(_attend(query, keys, values, scale, softcap, offset=offset))


def attend(
    query: Tensor,
    blocks: Sequence[Tensor],
    ids: Tensor,
    log_u: Tensor,
    *,
    scale: float,
    offsets: Tensor | None = None,
    softcap: float = 0.0,
) -> AttentionState:
    """Attention of one query (D,) over sampled rows, each weighted by 1 / u; see cpu.py."""
    keys, values = _picked(blocks, ids, len(query))
    logits = scale * (keys @ query.double())
    if offsets is not None:
        logits = logits + offsets.double()[ids // BLOCK_ROWS]
    return _float(_softmax(_capped(logits, softcap) - log_u.double(), values))


def attend_hashed(
    query: Tensor,
    blocks: Sequence[Tensor],
    ids: Tensor,
    law: Law,
    *,
    scale: float,
    centres: Tensor | None = None,
    offsets: Tensor | None = None,
    keys_of_a_centre: int = SEGMENT_ROWS,
    softcap: float = 0.0,
) -> tuple[AttentionState, Tensor]:
    """The same where log u (S,) follows from the law by the cosines of the query and the rows less their centres."""
    keys, values = _picked(blocks, ids, len(query))
    centred = keys if centres is None else keys - centres.double()[ids // keys_of_a_centre]
    log_u = law.log_u(cosine(query.double()[None], centred))
    logits = scale * (centred @ query.double())
    if offsets is not None:
        logits = logits + offsets.double()[ids // keys_of_a_centre]
    return _float(_softmax(_capped(logits, softcap) - log_u, values)), log_u.float()


def linear(x: Tensor, weight: Tensor, scales: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (N, K or padded) transposed, its rows times scales (N,) if any, plus bias: (..., N)."""
    return layers.linear(x, weight, scales, bias)


def attend_many(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float, softcap: float = 0.0, causal: bool = False
) -> AttentionState:
    """Exact attention of query (H, T, D) over keys and values (G, n, D): output (H, T, D) and lse (H, T), float32."""
    state = many.attend_many(
        query.double(), keys.double(), values.double(), scale=scale, softcap=softcap, causal=causal
    )
    return _float(state)


def prefers_many(dtype: torch.dtype, *, capped: bool) -> bool:
    """Never: torch is faster."""
    del dtype, capped
    return False


def few_vectors(dtype: torch.dtype) -> int:
    """None: torch is faster."""
    del dtype
    return 0


def merge(states: Sequence[AttentionState]) -> AttentionState:
    """Attention over the union of disjoint sets of keys, from float32 states (H, D), (H,) over each."""
    return _float(rows_of_attention.merge([AttentionState(s.output.double(), s.lse.double()) for s in states]))


def _picked(blocks: Sequence[Tensor], ids: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    rows = [blocks[i // BLOCK_ROWS][i % BLOCK_ROWS] for i in ids.tolist()]
    none = blocks[0][:0]
    return halves(torch.stack(rows) if rows else none, head_dim)


def _softmax(logits: Tensor, values: Tensor) -> AttentionState:
    return AttentionState(logits.softmax(-1) @ values, logits.logsumexp(-1))


def _capped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float,
    *,
    log_u: Tensor | None = None,
    offset: Tensor | None = None,
) -> AttentionState:
    cap = softcap or None
    return rows_of_attention.attend(query.double(), keys, values, scale=scale, log_u=log_u, offset=offset, softcap=cap)


def _float(state: AttentionState) -> AttentionState:
    return AttentionState(state.output.float(), state.lse.float())


# --- all of it in one -------------------------------------------------------------------------------------------------


def decode_step(
    views: list[View],
    query: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    capture: bool = False,
) -> StepResult:
    """One step of one layer: append, sample, attend, merge; see cpu.py."""
    B, H, D = query.shape
    faults = _append(views, query, keys, values)
    output = torch.full((B, H, D), math.nan, dtype=torch.float64, device="cpu")
    lse, predicted = torch.full((2, B, H), math.nan, dtype=torch.float64, device="cpu")
    samples = [_no_sample() for _ in range(B * H)]
    for b, view in enumerate(views):
        if faults[b]:
            continue
        step = _Heads(view, query[b], None, scale, softcap, sink_logits)
        exact = step.exact()
        sampled = step.sampled(exact)
        whole = step.with_sinks(rows_of_attention.merge([exact, sampled.state]))
        output[b], lse[b], predicted[b] = whole.output, whole.lse, sampled.error(whole)
        samples[b * H : (b + 1) * H] = sampled.samples
        step.count(sampled.samples)
        if view.sampling:
            view.errors += predicted[b].float().tolist()
    found = faults if any(faults) else []
    return StepResult(output.to(query.dtype), lse.float(), predicted.float(), found, samples if capture else [])


def sampled_half(
    views: list[View],
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
) -> SampledHalf:
    """The half of `decode_step` that attends to what is drawn; see cpu.py."""
    B, H, D = query.shape
    if exact is None and any(isinstance(view.sampler, Rotation) and view.policy.epsilon > 0 for view in views):
        raise ArgumentError("exact is missing: a store with an epsilon draws until the whole output is good enough")
    faults = _append(views, query, keys, values)
    output = torch.full((B, H, D), math.nan, dtype=torch.float64, device="cpu")
    spread = torch.full((B, H, D + 2), math.nan, dtype=torch.float64, device="cpu")
    lse = torch.full((B, H), math.nan, dtype=torch.float64, device="cpu")
    samples = [_no_sample() for _ in range(B * H)]
    for b, view in enumerate(views):
        if faults[b]:
            continue
        step = _Heads(view, query[b], prepared[b] if prepared else None, scale, softcap, sink_logits)
        other = None if exact is None else AttentionState(exact.output[b].double(), exact.lse[b].double())
        sampled = step.sampled(other)
        output[b], lse[b], spread[b] = sampled.state.output, sampled.state.lse, sampled.spread()
        samples[b * H : (b + 1) * H] = sampled.samples
        step.count(sampled.samples)
    state = AttentionState(output.float(), lse.float())
    return SampledHalf(state, spread.float(), faults if any(faults) else [], samples if capture else [])


def count_predicted(view: View, errors: Tensor) -> None:
    """Adds predicted errors, of all heads, to what a view counts."""
    view.errors += errors.flatten().tolist()


def repeated_step(
    B: int, H: int, D: int, scale: float, softcap: float
) -> Callable[[list[View], Tensor, Tensor, Tensor], tuple[Tensor, list[int]]]:
    """`decode_step` again and again: query (B, H, 1, D), keys and values (B, G, 1, D); (B, 1, H, D) and faults."""

    def step(views: list[View], query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, list[int]]:
        q, k, v = (x[:, :, 0] for x in (query, keys, values))
        result = decode_step(views, q, k, v, scale=scale, softcap=softcap)
        return result.output[:, None], result.faults

    return step


def _no_sample() -> tuple[Tensor, Tensor]:
    sample = no_sample(torch.float32)
    return sample.ids, sample.log_u


def _append(views: list[View], query: Tensor, keys: Tensor | None, values: Tensor | None) -> list[int]:
    """Writes the new rows of the sequences without a fault; the faults of all."""
    check_dtype(query.dtype)
    faults = []
    for b, view in enumerate(views):
        dtypes = [view.dtype] if view.tail is None else [view.dtype, view.tail.dtype]
        most = min(_LARGEST.get(dtype, math.inf) for dtype in dtypes)
        new = [(1, query[b], math.inf)]
        if keys is not None and values is not None:
            new += [(2, keys[b], most), (3, values[b], most)]
        wrong = [n for n, x, limit in new if not (x.isfinite() & (x.double().abs() <= limit)).all()]
        faults.append(wrong[0] if wrong else 0)
        if wrong or keys is None or values is None:
            continue
        assert view.tail is not None
        row = view.tail[:, view.length - view.flushed]
        row[:, : view.head_dim] = keys[b]
        row[:, padded(view.head_dim) : padded(view.head_dim) + view.head_dim] = values[b]
        view.length += 1
    return faults


@dataclass
class _Sampled:
    """What the heads of a sequence drew: for each its rows and log u; and their state, (H, D) and (H,)."""

    state: AttentionState
    samples: list[tuple[Tensor, Tensor]]
    values: list[Tensor]
    weights: list[Tensor]  # shares of the rows in the state
    sampling: bool

    def spread(self) -> Tensor:
        """(H, D + 2): see SampledHalf."""
        heads = []
        for (_, log_u), values, weights in zip(self.samples, self.values, self.weights, strict=True):
            doubt = torch.where(log_u.double() < 0, -torch.expm1(log_u.double()) * weights.square(), 0.0)
            square = (doubt * values.square().sum(-1)).sum()
            heads.append(torch.cat([doubt @ values, square[None], doubt.sum()[None]]))
        return torch.stack(heads)

    def error(self, whole: AttentionState) -> Tensor:
        """The predicted error (H,) of the whole: NaN where nothing is known."""
        half = SampledHalf(self.state, self.spread(), [], [])
        error = half.predicted_error(whole).double()
        empty = torch.tensor([len(ids) == 0 for ids, _ in self.samples], dtype=torch.bool, device="cpu")
        return torch.where(empty & self.sampling, math.nan, error)


class _Heads:
    """The heads of one sequence in one step. prepared: codes or rotated queries, made elsewhere."""

    def __init__(
        self,
        view: View,
        query: Tensor,
        prepared: Tensor | None,
        scale: float,
        softcap: float,
        sink_logits: Tensor | None,
    ) -> None:
        self.view, self.query, self.prepared = view, query.double(), prepared
        self.scale, self.softcap, self.sink_logits = scale, softcap, sink_logits
        self.group = len(query) // view.heads
        self.rows = [view.rows(g) for g in range(view.heads)]
        self.tried = [0] * view.heads  # rows of draws that were not good enough

    def exact(self) -> AttentionState:
        """Over the rows that are never drawn."""
        view = self.view
        position = torch.arange(view.length, dtype=torch.int64, device="cpu")
        static = (position < view.sinks) | (position >= view.indexed_to) | (not view.sampling)
        return self._over([(position[static], None)] * len(self.query))[0]

    def with_sinks(self, state: AttentionState) -> AttentionState:
        if self.sink_logits is None:
            return state
        return rows_of_attention.with_sink_logits(state, self.sink_logits.double())

    def sampled(self, exact: AttentionState | None) -> _Sampled:
        """Over what is drawn. exact: the state over the other rows, where an epsilon asks for it."""
        view, samples = self.view, [_no_sample() for _ in self.query]
        if view.sampling and isinstance(view.sampler, Planes):
            samples = self._collisions(view.sampler)
        if view.sampling and isinstance(view.sampler, Rotation):
            for g in range(view.heads):
                at = slice(g * self.group, (g + 1) * self.group)
                own = None if exact is None else AttentionState(exact.output[at], exact.lse[at])
                samples[at] = [self._drawn(view.sampler, g, own)] * self.group
        return self._sampled(samples, range(len(self.query)))

    def count(self, samples: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Adds a step to the view's counts."""
        view = self.view
        view.steps += 1
        if view.sampling:
            sizes = [len(ids) for ids, _ in samples]
            tried = [self.tried[h // self.group] for h in range(len(sizes))]
            view.sampled_rows += sum(min(size + more, view.body) for size, more in zip(sizes, tried, strict=True))
            view.whole_bodies += sizes.count(view.body)
            view.body_rows += view.body * len(sizes)
            view.max_share = max(view.max_share, max(sizes) / view.body)

    def _sampled(self, samples: Sequence[tuple[Tensor, Tensor]], heads: Iterable[int]) -> _Sampled:
        state, values, weights = self._over(samples, heads)
        return _Sampled(state, list(samples), values, weights, self.view.sampling)

    def _over(
        self, samples: Sequence[tuple[Tensor, Tensor | None]], heads: Iterable[int] | None = None
    ) -> tuple[AttentionState, list[Tensor], list[Tensor]]:
        """Of some heads, each over its own rows: the states, their values, and the shares of the rows."""
        states, values, weights = [], [], []
        for h, (ids, log_u) in zip(range(len(self.query)) if heads is None else heads, samples, strict=True):
            keys, own = (x[ids] for x in self.rows[h // self.group])
            logits = _capped(self.scale * (keys @ self.query[h]), self.softcap)
            logits = logits if log_u is None else logits - log_u.double()
            states.append(_softmax(logits, own))
            values.append(own)
            weights.append(logits.softmax(-1))
        lse = torch.stack([state.lse for state in states])
        return AttentionState(torch.stack([state.output for state in states]), lse), values, weights

    def _collisions(self, planes: Planes) -> list[tuple[Tensor, Tensor]]:
        view, law = self.view, self.view.policy.law
        assert law is not None
        codes = hash_queries(self.query, planes) if self.prepared is None else self.prepared
        samples = []
        for h, query in enumerate(self.query):
            g, found, cosines = h // self.group, [], []
            for segment in view.segments:
                ids = lookup(codes[h], segment, g, law.min_hits)
                ids = ids[ids >= view.sinks]
                keys = self.rows[g][0][ids]
                centred = keys if segment.centre is None else keys - segment.centre[g].double()
                found.append(ids)
                cosines.append(cosine(query[None], centred))
            if not found:
                samples.append(_no_sample())
                continue
            samples.append((torch.cat(found), law.log_u(torch.cat(cosines)).float()))
        return samples

    def _drawn(self, rotation: Rotation, g: int, exact: AttentionState | None) -> tuple[Tensor, Tensor]:
        """The sample of one kv head. exact: of its group."""
        view, policy = self.view, self.view.policy
        heads = range(g * self.group, (g + 1) * self.group)
        query = self.query[heads.start : heads.stop]
        rotated = rotate(query, rotation) if self.prepared is None else self.prepared[heads.start : heads.stop]
        rule = view.stride, self.scale, self.softcap, view.sinks
        weights = _weigh(query, rotated, view.sketches, g, rotation, *rule).weights
        budget = _count(policy.budget, view.body)
        scales = torch.cat([s.scales[g, : s.count] for s in view.sketches])
        noise = sketches.score_noise(query, scales, rotation.bits, scale=self.scale, sinks=view.sinks)
        keys = self.rows[g][0]

        def logits(ids: Tensor) -> Tensor:
            return _capped(self.scale * (query @ keys[ids].T), self.softcap)

        def start(number: int, step: int) -> int:
            return sketches.start_for(policy.seed, view.layer, view.first_head + g, view.length, number, step)

        rows = first = sketches.first_rows(budget, policy.epsilon)
        while True:
            if rows > first and rows > policy.limit * view.body:
                ids = torch.arange(view.sinks, view.indexed_to, dtype=torch.int64, device="cpu")
                return ids, torch.zeros(view.body, dtype=torch.float32, device="cpu")
            if policy.candidates:
                candidates = -(-rows * _count(policy.candidates, view.body) // budget)
            else:
                candidates = sketches.candidates_by_noise(rows, noise)
            if policy.epsilon > 0 and rows == first:
                candidates = max(candidates, sketches.FIRST_CANDIDATES * rows)
            drawn = sketches.draw(weights, logits, rows, candidates, start)
            sample = drawn.ids, drawn.log_u.float()
            if policy.epsilon <= 0:
                return sample
            assert exact is not None
            sampled = self._sampled([sample] * self.group, heads)
            whole = rows_of_attention.merge([exact, sampled.state])
            if self.sink_logits is not None:
                sinks = self.sink_logits[heads.start : heads.stop].double()
                whole = rows_of_attention.with_sink_logits(whole, sinks)
            errors = sampled.error(whole)
            if sketches.is_enough(float(errors.max()), policy.epsilon, first=rows == first):
                return sample
            self.tried[g] += len(drawn.ids)
            rows = sketches.more_rows(rows, drawn, logits(drawn.candidates), errors, policy.epsilon)


def _count(number: float, body: int) -> int:
    """How many of `body` keys are meant: below 1 a share of them."""
    wanted = number if number >= 1 else number * body
    return min(max(round(min(wanted, body)), 1), body)
