"""The verbs of base.py, compiled: the one border to `_native`. Shapes and dtypes are checked here; the C++ trusts them.

Everything here is CPU memory. Axes: B sequences, H query heads, G key/value heads, N tokens, D head dim, K bits,
L tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from magicpig.collision import log_inclusion
from magicpig.errors import ArgumentError
from magicpig.kernels import _native
from magicpig.kernels._native import HitLaw, LshSampler, SketchSampler, StoreView
from magicpig.kernels.base import (
    BLOCK_ROWS,
    BYTE_LANE,
    LANE,
    LEAST_STRIDE,
    MAX_GROUP,
    MAX_HEAD_DIM,
    MAX_LINEAR,
    SEGMENT_ROWS,
    SKETCH_KEYS,
    Draw,
    SampledHalf,
    Segment,
    SketchSegment,
    SketchWeights,
    StepResult,
    as_rows,
    check_dtype,
    padded,
    row_width,
    sketch_shapes,
    stride_shift,
)
from magicpig.kernels.hash.reference import make_planes
from magicpig.kernels.library import empty, torch_multiplies
from magicpig.kernels.sketch.reference import EXACT_SHARE, LEVEL_DISTANCE, LEVEL_NOISE, make_rotation
from magicpig.types import AttentionState

NAME = "cpu"

_NOWHERE = 1 << 62  # no position is as large
LAW_SIZE: int = _native.LAW_SIZE
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ROW_CODES = {**_CODES, torch.int8: 3}

# The forms of base.py are those of kernels.h.
assert (BLOCK_ROWS, SEGMENT_ROWS, SKETCH_KEYS) == (_native.BLOCK_ROWS, _native.SEGMENT_ROWS, _native.SKETCH_KEYS)
assert (LANE, LEAST_STRIDE, MAX_HEAD_DIM) == (_native.LANE, _native.LEAST_STRIDE, _native.MAX_DIM)
assert (BYTE_LANE, MAX_LINEAR, MAX_GROUP) == (_native.BYTE_LANE, _native.MAX_LINEAR, _native.MAX_GROUP)


def dtype_code(dtype: torch.dtype) -> int:
    """The compiled code's number of a dtype. Raises ArgumentError for one that it does not read."""
    check_dtype(dtype)
    return _CODES[dtype]


def row_code(dtype: torch.dtype) -> int:
    """The same of what rows are kept in: a dtype, or int8 for whole numbers with scales."""
    return _ROW_CODES[dtype] if dtype in _ROW_CODES else dtype_code(dtype)


def make_sampler(head_dim: int, K: int, L: int, seed: int) -> LshSampler:
    """The packed hash directions of a setting."""
    directions = make_planes(head_dim, K, L, seed)
    return LshSampler(head_dim, K, L, directions.data_ptr())


def make_law(K: int, L: int, min_hits: int) -> HitLaw:
    """In how many tables a key must collide, and the table of its inclusion law (collision.py)."""
    law = inclusion_law(K, L, min_hits)
    return HitLaw(min_hits, law.data_ptr())


def make_view(
    dtype: torch.dtype, heads: int, head_dim: int, sinks: int, stride: int, *, layer: int = 0, first_head: int = 0
) -> StoreView:
    """An empty view of a store whose rows are kept in `dtype`.

    stride: tokens that are indexed at once. layer, and first_head, the place of kv head 0 among those of the model:
    with the seed and the position they say what is drawn.
    """
    return StoreView(row_code(dtype), heads, head_dim, sinks, stride_shift(stride), layer, first_head)


def set_rows(
    view: StoreView, blocks: Sequence[Tensor], centres: Sequence[Tensor], tail: Tensor | None, flushed: int
) -> None:
    """Where a view's rows are: blocks (G, capacity, width) of `BLOCK_ROWS` positions, the last perhaps smaller.

    centres: for each block (G, D) float32, what its keys are kept minus; or none. tail: rows (G, n, width) in a float
    dtype, of positions from `flushed` on.
    """
    view.set_blocks([x.data_ptr() for x in blocks], [x.stride(0) * x.element_size() for x in blocks])
    if centres:
        view.set_row_centres([_address(centre) for centre in centres])
    if tail is None:
        view.set_tail(0, 0, 0, _NOWHERE)
    else:
        view.set_tail(dtype_code(tail.dtype), tail.data_ptr(), tail.stride(0) * tail.element_size(), flushed)


def set_sampler(view: StoreView, sampler: LshSampler | SketchSampler | None) -> None:
    """What a view's index was made by, or None: then all of its rows are attended exactly."""
    view.set_sampler(
        sampler if isinstance(sampler, LshSampler) else None,
        sampler if isinstance(sampler, SketchSampler) else None,
    )


def set_policy(
    view: StoreView,
    *,
    budget: float = 512,
    candidates: float = 0.0,
    epsilon: float = 0.0,
    limit: float = EXACT_SHARE,
    seed: int = 0,
    law: HitLaw | None = None,
) -> None:
    """How much a view's next steps draw, and by which luck.

    budget: rows of a kv head and step, of a sketch; below 1 a share of the body. candidates: keys that these are drawn
    from, likewise; 0 as many as the noise of the sketch asks for. epsilon: predicted error that is small enough, or 0
    to draw once. limit: share of the body; where epsilon would take more, all of it is read. law: of hashing, which
    needs one.
    """
    view.set_policy(budget, candidates, epsilon, limit, seed, law)


def mean_keys(rows: Tensor, head_dim: int, row_centres: Tensor | None = None) -> Tensor:
    """The means (G, D) float32 of the keys in rows (G, n, width), n a power of two. The same bits on every machine.

    row_centres: (G, D) float32, what the rows are kept minus.
    """
    heads, n, _ = rows.shape
    _require(rows.stride(2) == 1, "rows must be contiguous in the last dimension")
    _require(n & (n - 1) == 0 and n > 0, f"n={n} is not a power of two")
    means = _zeros(heads, head_dim)
    _native.mean_keys(
        row_code(rows.dtype),
        [rows[g].data_ptr() for g in range(heads)],
        head_dim,
        n,
        rows.stride(1) * rows.element_size(),
        _address(row_centres),
        means.data_ptr(),
    )
    return means


def _address(floats: Tensor | None) -> int:
    """Of contiguous float32 numbers that somebody keeps, or 0."""
    if floats is None:
        return 0
    _require(floats.dtype == torch.float32 and floats.is_contiguous(), "centres must be contiguous float32")
    return floats.data_ptr()


def inclusion_law(K: int, L: int, min_hits: int) -> Tensor:
    """log u, (4097,) float32, on the kernels' axis x = sign(c) (1 - sqrt(1 - |c|)): fine where angles change fast."""
    x = torch.linspace(-1.0, 1.0, LAW_SIZE + 1, dtype=torch.float64, device="cpu")
    x[0] = x[0] + 0.25 * (x[1] - x[0])  # at -1 itself log u is -inf, which cannot be interpolated
    cosine = x.sign() * (1.0 - (1.0 - x.abs()).square())
    return log_inclusion(cosine, K, L, min_hits).to(torch.float32)


def hash_rows(pieces: Sequence[Tensor], sampler: LshSampler, centres: Sequence[Tensor] = ()) -> Tensor:
    """Codes of consecutive keys.

    pieces: tensors (G, n_i, >= Dp) whose last dimension starts with the zero-padded key and is contiguous. centres: for
    each piece (G, D) float32, which is taken off its keys as they are kept; or none.
    Returns (G, L, sum n_i) uint16 codes.
    """
    heads, total = pieces[0].shape[0], sum(piece.shape[1] for piece in pieces)
    codes = empty((heads, sampler.L, total), torch.uint16)
    first = 0
    for i, piece in enumerate(pieces):
        _require(piece.stride(2) == 1, "rows must be contiguous in the last dimension")
        rows = [piece[g].data_ptr() for g in range(heads)]
        _native.hash(
            row_code(piece.dtype),
            padded(sampler.head_dim),
            rows,
            piece.shape[1],
            piece.stride(1) * piece.element_size(),
            _address(centres[i]) if centres else 0,
            sampler,
            codes.data_ptr() + 2 * first,
            total,
        )
        first += piece.shape[1]
    return codes


def hash_queries(query: Tensor, sampler: LshSampler) -> Tensor:
    """Codes (H, L) uint16 of queries (H, D)."""
    rows = _zeros(1, len(query), padded(query.shape[1]))
    rows[0, :, : query.shape[1]] = query
    return hash_rows([rows], sampler)[0].T.contiguous()


def build(codes: Tensor, K: int, first: int, centre: Tensor | None = None) -> Segment:
    """Sorts the codes (G, L, n <= 65536) uint16 of keys `first` .. into buckets."""
    G, L, n = codes.shape
    _require(codes.dtype == torch.uint16 and codes.is_contiguous(), "codes must be contiguous uint16")
    _require(n <= SEGMENT_ROWS, f"a segment holds at most {SEGMENT_ROWS} keys, got {n}")
    segment = _empty_segment(G, L, K, n, first, centre)
    _native.build(codes.data_ptr(), G * L, n, K, segment.offsets.data_ptr(), segment.ids.data_ptr())
    return segment


def extend(a: Segment, b: Segment) -> Segment:
    """The tables of a's keys followed by b's, of the same centre, equal to building them together."""
    _require(b.first == a.first + a.count, "b must begin where a ends")
    _require(a.count + b.count <= SEGMENT_ROWS, f"a segment holds at most {SEGMENT_ROWS} keys")
    G, L, _ = a.ids.shape
    out = _empty_segment(G, L, a.K, a.count + b.count, a.first, a.centre)
    _native.extend(*_parts(a), *_parts(b), G * L, a.K, out.offsets.data_ptr(), out.ids.data_ptr())
    return out


def shorten(a: Segment, count: int) -> Segment:
    """The tables of the first `count` keys of a."""
    _require(0 <= count <= a.count, f"count={count} is out of range; allowed: 0 to {a.count}")
    G, L, _ = a.ids.shape
    out = _empty_segment(G, L, a.K, count, a.first, a.centre)
    _native.shorten(*_parts(a), count, G * L, a.K, out.offsets.data_ptr(), out.ids.data_ptr())
    return out


def lookup(query_codes: Tensor, segment: Segment, head: int, min_hits: int) -> Tensor:
    """Positions (S,) int64, ascending, of the keys of one kv head that share >= min_hits of the (L,) uint16 codes."""
    _require(
        query_codes.dtype == torch.uint16 and query_codes.is_contiguous(),
        "query codes must be contiguous uint16",
    )
    found = torch.empty(segment.count, dtype=torch.int32, device="cpu")
    n = _native.lookup(
        query_codes.data_ptr(),
        segment.K,
        segment.ids.shape[1],
        segment.offsets[head].data_ptr(),
        segment.ids[head].data_ptr(),
        segment.first,
        segment.count,
        min_hits,
        found.data_ptr(),
    )
    return found[:n].to(torch.int64)


def _parts(segment: Segment) -> tuple[int, int, int]:
    return segment.offsets.data_ptr(), segment.ids.data_ptr(), segment.count


def _empty_segment(G: int, L: int, K: int, n: int, first: int, centre: Tensor | None) -> Segment:
    return Segment(empty((G, L, 2**K + 1), torch.uint32), empty((G, L, n), torch.uint16), first, centre)


def set_segments(view: StoreView, segments: Sequence[Segment]) -> None:
    """The tables of a view's keys from position 0 on. Those between two multiples of 65536 have one centre."""
    centres = [segment.centre for segment in segments if segment.centre is not None]
    _require(len(centres) in (0, len(segments)), "either all segments have a centre or none")
    view.set_segments(
        [segment.offsets.data_ptr() for segment in segments],
        [segment.ids.data_ptr() for segment in segments],
        [segment.first for segment in segments],
        [segment.count for segment in segments],
        [_address(centre) for centre in centres],
    )


def make_sketcher(head_dim: int, bits: int, seed: int) -> SketchSampler:
    """The rotation of a setting."""
    rotation = make_rotation(head_dim, seed).contiguous()
    distance = LEVEL_DISTANCE[bits] / head_dim**0.5
    return SketchSampler(head_dim, bits, distance, LEVEL_NOISE[bits], rotation.data_ptr())


def rotate(query: Tensor, sampler: SketchSampler) -> Tensor:
    """Queries (H, D) times the rotation, (H, D) float32: how a sketch meets them."""
    (H, D), width = query.shape, padded(query.shape[1])
    vectors, rotated = _zeros(H, width), _zeros(H, width)
    vectors[:, :D] = query
    _native.rotate(sampler, vectors.data_ptr(), H, rotated.data_ptr())
    return rotated[:, :D].contiguous()


def sketch(
    pieces: Sequence[Tensor],
    sampler: SketchSampler,
    first: int,
    *,
    stride: int,
    centred: bool = True,
    row_centres: Sequence[Tensor] = (),
) -> SketchSegment:
    """The sketch of consecutive keys, at least one stride; the rest as for `sketch_into`."""
    total = sum(piece.shape[1] for piece in pieces)
    segment = new_sketch(pieces[0].shape[0], total, sampler, first, stride)
    sketch_into(segment, 0, pieces, sampler, stride=stride, centred=centred, row_centres=row_centres)
    return segment


def sketch_into(
    segment: SketchSegment,
    at: int,
    pieces: Sequence[Tensor],
    sampler: SketchSampler,
    *,
    stride: int,
    centred: bool = True,
    row_centres: Sequence[Tensor] = (),
) -> None:
    """Sketches consecutive keys into the memory of a segment, as its keys from number `at` on.

    pieces: of whole strides, otherwise as for `hash_rows`. row_centres: for each piece (G, D) float32, what its rows
    are kept minus; or none. centred: False sketches the keys as they come.
    """
    shift = stride_shift(stride)
    for i, piece in enumerate(pieces):
        _require(piece.stride(2) == 1, "rows must be contiguous in the last dimension")
        _require(piece.shape[1] % stride == 0, f"a piece of {piece.shape[1]} keys is not of strides of {stride}")
        _native.sketch(
            row_code(piece.dtype),
            [head.data_ptr() for head in piece],
            piece.shape[1],
            piece.stride(1) * piece.element_size(),
            _address(row_centres[i]) if row_centres else 0,
            sampler,
            at,
            segment.blocks,
            shift,
            centred,
            segment.words.data_ptr(),
            segment.scales.data_ptr(),
            segment.centres.data_ptr(),
        )
        at += piece.shape[1]


def set_sketches(view: StoreView, segments: Sequence[SketchSegment]) -> None:
    """The sketch of a view's keys from position 0 on; all segments but the last are of whole blocks of 64."""
    view.set_sketches(
        [segment.words.data_ptr() for segment in segments],
        [segment.scales.data_ptr() for segment in segments],
        [segment.centres.data_ptr() for segment in segments],
        [segment.first for segment in segments],
        [segment.count for segment in segments],
        [segment.blocks for segment in segments],
    )


def new_sketch(heads: int, keys: int, sampler: SketchSampler, first: int, stride: int) -> SketchSegment:
    """Room for the sketch of `keys` keys."""
    words, scales, centres = (empty(*each) for each in sketch_shapes(heads, keys, sampler, stride))
    return SketchSegment(words, scales, centres, first, keys)


def weigh(
    query: Tensor,
    segments: Sequence[SketchSegment],
    head: int,
    sampler: SketchSampler,
    *,
    stride: int,
    scale: float,
    softcap: float = 0.0,
    sinks: int = 0,
) -> SketchWeights:
    """Weights of one kv head's keys for the queries (R, D) float32 of its group; the first `sinks` have none.

    segments: of all keys, as for `set_sketches`.
    """
    (R, D), counts = query.shape, [segment.count for segment in segments]
    width, blocks = padded(D), sum(-(-count // SKETCH_KEYS) for count in counts)
    lanes, whole = _zeros(R, width), torch.empty(R, width, dtype=torch.int8, device="cpu")
    lanes[:, :D] = query
    weights = torch.empty(blocks * SKETCH_KEYS, dtype=torch.int32, device="cpu")
    offsets = _zeros(R, sum(-(-count // stride) for count in counts))
    log_normalisers = _native.weigh(
        sampler,
        lanes.data_ptr(),
        R,
        scale,
        softcap,
        [segment.words[head].data_ptr() for segment in segments],
        [segment.scales[head].data_ptr() for segment in segments],
        [segment.centres[head].data_ptr() for segment in segments],
        counts,
        sinks,
        stride_shift(stride),
        weights.data_ptr(),
        whole.data_ptr(),
        offsets.data_ptr(),
    )
    unit = 1.0 if softcap > 0 else 2.0**23
    octaves = torch.tensor(log_normalisers, dtype=torch.float64, device="cpu")
    return SketchWeights(weights[: sum(counts)].to(torch.int64), whole[:, :D], offsets / unit, octaves)


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
    narrow = weights.to(torch.int32)
    step, start, ids, log_u = _native.draw(
        narrow.data_ptr(), len(narrow), sinks, budget, seed, layer, head, position, phase
    )
    positions = torch.tensor(ids, dtype=torch.int64, device="cpu")
    return Draw(step, start, positions, torch.tensor(log_u, dtype=torch.float32, device="cpu"))


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
    """Weights (S,) int64 of rows that were drawn with log u (S,), by their logits for the queries (R, D) of a group.

    blocks, ids: as of `attend`; offsets: (R, blocks). See weigh_logits in kernels/sketch/reference.py.
    """
    lanes = _padded_queries(query, blocks[0])
    ids, log_u = ids.to(torch.uint32).contiguous(), log_u.to(torch.float32).contiguous()
    offsets = None if offsets is None else offsets.to(torch.float32).contiguous()
    weights = torch.empty(len(ids), dtype=torch.int32, device="cpu")
    _native.weigh_rows(
        row_code(blocks[0].dtype),
        lanes.shape[1],
        [block.data_ptr() for block in blocks],
        ids.data_ptr(),
        len(ids),
        log_u.data_ptr(),
        lanes.data_ptr(),
        len(query),
        _address(offsets),
        scale,
        softcap,
        weights.data_ptr(),
    )
    return weights.to(torch.int64)


def write_bytes(x: Tensor, rows: Tensor, half: int) -> None:
    """Rounds x (G, n, D), finite, to whole numbers with a scale each, and puts them into rows (G, n, width) of int8.

    half: 0 for keys, 1 for values.
    """
    G, n, D = x.shape
    _require(rows.shape == (G, n, row_width(D, torch.int8)), "rows and vectors disagree about their shape")
    _require(rows.dtype == torch.int8 and rows.stride(2) == 1, "rows must be int8 and contiguous in the last dimension")
    source = x.to(torch.float32).contiguous()
    _native.write_bytes(source.data_ptr(), n, D, [rows[g].data_ptr() for g in range(G)], rows.stride(1), half)


def interleave(keys: Tensor, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows (n, width) = [key | value], zero padded, from keys and values (n, D).

    dtype: int8 rounds them to whole numbers; otherwise it is that of the keys.
    """
    if dtype != torch.int8:
        return as_rows(keys, values)
    n, D = keys.shape
    rows = torch.zeros(1, n, row_width(D, dtype), dtype=dtype, device="cpu")
    write_bytes(keys[None], rows, 0)
    write_bytes(values[None], rows, 1)
    return rows[0]


def attend_rows(
    query: Tensor, rows: Tensor, *, scale: float, offset: Tensor | None = None, softcap: float = 0.0
) -> AttentionState:
    """Exact attention of a group's queries (H, D) over rows (n, width): output (H, D) and lse (H,), float32."""
    lanes = _padded_queries(query, rows)
    offset = _zeros(len(query)) if offset is None else offset.to(torch.float32).contiguous()
    output, lse = torch.empty_like(lanes), _zeros(len(query))
    _native.attend_rows(
        row_code(rows.dtype),
        lanes.shape[1],
        rows.data_ptr(),
        len(rows),
        len(query),
        lanes.data_ptr(),
        offset.data_ptr(),
        scale,
        softcap,
        output.data_ptr(),
        lse.data_ptr(),
    )
    return AttentionState(output[:, : query.shape[1]], lse)


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
    """Attention of one query (D,) over sampled rows, each weighted by 1 / u.

    blocks: row blocks (4096, width) of which the last may be shorter; ids: (S,) positions; log_u: (S,). offsets:
    (blocks,), what joins the logits of the rows of each block.
    """
    lanes = _padded_queries(query[None], blocks[0])
    output, lse = torch.empty_like(lanes), _zeros(1)
    ids, log_u = ids.to(torch.uint32).contiguous(), log_u.to(torch.float32).contiguous()
    offsets = None if offsets is None else offsets.to(torch.float32).contiguous()
    _native.attend(
        row_code(blocks[0].dtype),
        lanes.shape[1],
        [block.data_ptr() for block in blocks],
        ids.data_ptr(),
        len(ids),
        log_u.data_ptr(),
        lanes.data_ptr(),
        _address(offsets),
        scale,
        softcap,
        output.data_ptr(),
        lse.data_ptr(),
    )
    return AttentionState(output[0, : len(query)], lse[0])


def attend_hashed(
    query: Tensor,
    blocks: Sequence[Tensor],
    ids: Tensor,
    law: HitLaw,
    *,
    scale: float,
    centres: Tensor | None = None,
    offsets: Tensor | None = None,
    keys_of_a_centre: int = SEGMENT_ROWS,
    softcap: float = 0.0,
) -> tuple[AttentionState, Tensor]:
    """The same where log u (S,) follows from the law by the cosines of the query and the rows less their centres.

    centres: (n, D) float32, of each `keys_of_a_centre` rows, a power of two; offsets: (n,), what joins the logits of
    rows less a centre. Returns the state and log u.
    """
    lanes = _padded_queries(query[None], blocks[0])
    output, lse, log_u = torch.empty_like(lanes), _zeros(1), _zeros(len(ids))
    ids = ids.to(torch.uint32).contiguous()
    wide = _zeros(0 if centres is None else len(centres), lanes.shape[1])
    if centres is not None:
        wide[:, : centres.shape[1]] = centres
    offsets = _zeros(len(wide)) if offsets is None else offsets.to(torch.float32).contiguous()
    _native.attend_hashed(
        row_code(blocks[0].dtype),
        lanes.shape[1],
        [block.data_ptr() for block in blocks],
        ids.data_ptr(),
        len(ids),
        lanes.data_ptr(),
        wide.data_ptr(),
        len(wide),
        keys_of_a_centre.bit_length() - 1,
        offsets.data_ptr(),
        law,
        scale,
        softcap,
        log_u.data_ptr(),
        output.data_ptr(),
        lse.data_ptr(),
    )
    return AttentionState(output[0, : len(query)], lse[0]), log_u


def attend_many(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float, softcap: float = 0.0, causal: bool = False
) -> AttentionState:
    """Exact attention of query (H, T, D) over keys and values (G, n, D): output (H, T, D) and lse (H, T), float32.

    All of one dtype, contiguous in the last dimension. causal: query t sees the keys up to t alone. Keys, values and
    the terms of the softmax are multiplied as bfloat16 where they are such and the processor multiplies pairs of them.
    """
    (H, T, D), (G, n, _) = query.shape, keys.shape
    _require(H % G == 0 and keys.shape == values.shape and keys.shape[2] == D, "query, keys and values do not fit")
    _require(query.dtype == keys.dtype == values.dtype, "query, keys and values are of different dtypes")
    _require(all(x.stride(2) == 1 for x in (query, keys, values)), "rows must be contiguous in the last dimension")
    output, lse = _nothing(H, T, D), _nothing(H, T)
    _native.attend_many(
        dtype_code(query.dtype),
        H,
        G,
        D,
        T,
        n,
        query.data_ptr(),
        (query.stride(0), query.stride(1)),
        keys.data_ptr(),
        (keys.stride(0), keys.stride(1)),
        values.data_ptr(),
        (values.stride(0), values.stride(1)),
        causal,
        scale,
        softcap,
        output.data_ptr(),
        lse.data_ptr(),
    )
    return AttentionState(output, lse)


def prefers_many(dtype: torch.dtype, *, capped: bool) -> bool:
    """Whether `attend_many` is faster than torch here, whose fused attention knows no softcap (docs/log.md)."""
    form = _native.flash_form()
    if form == "portable":
        return False
    if capped or not torch_multiplies(dtype):
        return True
    if dtype == torch.bfloat16:
        return form == "avx512bf16" and _native.is_amd()
    return dtype == torch.float32 and (form != "avx2" or _native.is_amd())


def merge(states: Sequence[AttentionState]) -> AttentionState:
    """Attention over the union of disjoint sets of keys, from float32 states (H, D), (H,) over each."""
    heads, D = states[0].output.shape
    width = padded(D)
    outputs = _zeros(len(states), heads, width)
    outputs[:, :, :D] = torch.stack([state.output for state in states])
    lses = torch.stack([state.lse for state in states]).to(torch.float32).contiguous()
    output, lse = _zeros(heads, width), _zeros(heads)
    _native.merge(len(states), heads, width, outputs.data_ptr(), lses.data_ptr(), output.data_ptr(), lse.data_ptr())
    return AttentionState(output[:, :D], lse)


def linear(x: Tensor, weight: Tensor, scales: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x (..., K), of up to `MAX_LINEAR` vectors, times weight (N, K) transposed, plus bias (N,): (..., N) in x's dtype.

    scales: (N,) float32, of a weight in int8, whose rows are padded to a multiple of `BYTE_LANE`. bias: in x's dtype.
    All are contiguous. Sums are float32; of int8, x is rounded to 16 bits and a scale for 256 numbers (not `portable`).
    """
    shape, (rows, stride) = x.shape, weight.shape
    columns = shape[-1]
    vectors = x.numel() // columns if columns else shape[:-1].numel()
    lane = 1 if scales is None else BYTE_LANE
    # Not by `_require`: a token asks a hundred times, and messages take longer to make than checks.
    if vectors > MAX_LINEAR:
        raise ArgumentError(f"{vectors} vectors are too many; allowed: {MAX_LINEAR}")
    if stride != -(-columns // lane) * lane:
        raise ArgumentError(f"weight has shape ({rows}, {stride}), x has {columns} columns")
    if (weight.dtype is torch.int8) != (scales is not None):
        raise ArgumentError("weights in int8 have scales, others have none")
    if bias is not None and bias.dtype is not x.dtype:
        raise ArgumentError("bias and x are of different dtypes")
    if not (x.is_contiguous() and weight.is_contiguous() and (bias is None or bias.is_contiguous())):
        raise ArgumentError("x and weight must be contiguous, as bias")
    out = x.new_empty((*shape[:-1], rows))
    _native.linear(
        row_code(weight.dtype),
        weight.data_ptr(),
        _address(scales),
        rows,
        columns,
        stride,
        0 if bias is None else bias.data_ptr(),
        dtype_code(x.dtype),
        x.data_ptr(),
        vectors,
        out.data_ptr(),
    )
    return out


def few_vectors(dtype: torch.dtype) -> int:
    """Up to how many vectors `linear` multiplies by a weight of their own dtype faster than torch (docs/log.md)."""
    portable = _native.isa() == "portable"
    if not portable and not torch_multiplies(dtype):
        return MAX_LINEAR
    if not _native.is_amd():
        return 0 if dtype == torch.float32 else 4
    if portable:
        return 4 if dtype == torch.float32 else 1
    return MAX_LINEAR if dtype == torch.float32 else 8


def convert(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another dtype, through the kernels' own widening and rounding."""
    out = torch.empty_like(x, dtype=dtype)
    _native.convert(dtype_code(x.dtype), x.contiguous().data_ptr(), x.numel(), dtype_code(dtype), out.data_ptr())
    return out


def _zeros(*shape: int) -> Tensor:
    """What the kernels read and write outside rows: float32 in host memory, whatever the caller's defaults are."""
    return torch.zeros(*shape, dtype=torch.float32, device="cpu")


def _padded_queries(query: Tensor, rows: Tensor) -> Tensor:
    _require(rows.is_contiguous(), "rows must be contiguous")
    _require(
        rows.shape[-1] == row_width(query.shape[-1], rows.dtype), "rows and queries disagree about the head dimension"
    )
    out = _zeros(len(query), padded(query.shape[-1]))
    out[:, : query.shape[1]] = query
    return out


def decode_step(
    views: list[StoreView],
    query: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    capture: bool = False,
) -> StepResult:
    """One step of one layer: append, sample, attend, merge. As attention.step.decode_step, which checks; contiguous.

    A sequence whose numbers are not finite is left as it was, and the others are served.
    """
    B, H, D = query.shape
    output = torch.empty(B, H, D, dtype=query.dtype, device="cpu")
    lse, predicted_error = _nothing(B, H), _nothing(B, H)
    faults, samples = _native.decode_step(
        views,
        _CODES[query.dtype],
        H,
        query.data_ptr(),
        0 if keys is None else keys.data_ptr(),
        0 if values is None else values.data_ptr(),
        scale,
        softcap,
        0 if sink_logits is None else sink_logits.data_ptr(),
        output.data_ptr(),
        lse.data_ptr(),
        predicted_error.data_ptr(),
        capture,
    )
    return StepResult(output, lse, predicted_error, faults, _samples(samples))


def sampled_half(
    views: list[StoreView],
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
    """The half of `decode_step` that attends to what is drawn; a merge of it with the other half is the whole.

    prepared: for each sequence what `hash_queries` or `rotate` made of its queries, or None to make it here. exact:
    float32 (B, H, D) and (B, H), the other half; where a store has an epsilon it says when a draw is enough, and
    sink_logits as well. Raises ArgumentError where it is missing then.
    """
    B, H, D = query.shape
    output, spread = _nothing(B, H, D), _nothing(B, H, D + 2)
    lse = _nothing(B, H)
    given: list[Tensor | None] = list(prepared) or [None] * B
    for x in given:
        codes = x is not None and x.dtype == torch.uint16 and x.ndim == 2 and len(x) == H
        rotated = x is not None and x.dtype == torch.float32 and x.shape == (H, D)
        _require(
            x is None or ((codes or rotated) and x.is_contiguous()),
            f"prepared queries must be contiguous: uint16 ({H}, L) or float32 ({H}, {D})",
        )
    other = (None, None) if exact is None else (exact.output.contiguous(), exact.lse.contiguous())
    faults, samples = _native.sampled_half(
        views,
        _CODES[query.dtype],
        H,
        query.data_ptr(),
        0 if keys is None else keys.data_ptr(),
        0 if values is None else values.data_ptr(),
        scale,
        softcap,
        0 if sink_logits is None else sink_logits.data_ptr(),
        [0 if x is None or x.dtype != torch.uint16 else x.data_ptr() for x in given],
        [0 if x is None or x.dtype != torch.float32 else x.data_ptr() for x in given],
        _address(other[0]),
        _address(other[1]),
        output.data_ptr(),
        lse.data_ptr(),
        spread.data_ptr(),
        capture,
    )
    return SampledHalf(AttentionState(output, lse), spread, faults, _samples(samples))


def count_predicted(view: StoreView, errors: Tensor) -> None:
    """Adds predicted errors, of all heads, to what a view counts."""
    view.count_predicted(errors.tolist())


def _samples(found: list[tuple[Any, Any]]) -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.from_numpy(ids).view(torch.int32).to(torch.int64), torch.from_numpy(log_u).view(torch.float32))
        for ids, log_u in found
    ]


def _nothing(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


class _RepeatedStep:
    """`decode_step` again and again for the same shapes and rule; only the output and the faults are kept."""

    def __init__(self, B: int, H: int, D: int, scale: float, softcap: float) -> None:
        self._shape, self._heads, self._scale, self._softcap = (B, 1, H, D), H, scale, softcap
        self._lse, self._predicted_error = torch.empty(2, B, H, dtype=torch.float32, device="cpu")
        self._unread = self._lse.data_ptr(), self._predicted_error.data_ptr()

    def __call__(
        self,
        views: list[StoreView],
        query: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> tuple[Tensor, list[int]]:
        """query (B, H, 1, D), keys and values (B, G, 1, D), contiguous, of one dtype; returns (B, 1, H, D), faults."""
        output = query.new_empty(self._shape)  # the cheapest of the ways to ask for it
        faults, _ = _native.decode_step(
            views,
            _CODES[query.dtype],
            self._heads,
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            self._scale,
            self._softcap,
            0,
            output.data_ptr(),
            *self._unread,
            False,
        )
        return output, faults


repeated_step = _RepeatedStep


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ArgumentError(message)
