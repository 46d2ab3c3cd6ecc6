"""One request, one layer: its keys and values, and the index that finds the keys a query should look at.

Rows are addressed by position. They lie in blocks of 4096, `[G, capacity, key | value]`; only the last block is ever
moved, while it is small. Rows stay as they came: centres, which hashes and sketches need, belong to the index. How far
that reaches follows from the length alone: whole strides of `block` tokens, so that `recent` tokens are left.

    [0, sinks)             exact
    [sinks, indexed_to)    sampled, once there are `exact_below` tokens
    [indexed_to, length)   exact: the recent window, and what does not fill a stride yet.

With `kv_dtype="int8"`, rows become whole numbers a stride at a time; until then they are in the tail, as they came.

Index segments are never changed: an append builds a new last segment, so forks share everything and copy rows only
where they write. Knows nothing of attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from magicpig.config import Config
from magicpig.errors import NotFiniteError
from magicpig.kernels import native
from magicpig.kernels._native import HitLaw, LshSampler, SketchSampler
from magicpig.kernels.hash.reference import centre_strides
from magicpig.kernels.pages import PAGE_ROWS, page_ranges
from magicpig.kernels.rows.layout import RowLayout
from magicpig.types import MemoryUse

SMALLEST_BLOCK = 256  # rows; doubles up to native.BLOCK_ROWS
YOUNG = 4096  # keys: segments that end between multiples of this are merged on every append, others only with equals
PREDICTING = ("lsh", "sketch")  # samplers whose steps predict their own error
_NEVER = 1 << 62

S = TypeVar("S", native.Segment, native.SketchSegment)


@lru_cache(maxsize=8)
def shared_sampler(head_dim: int, K: int, L: int, seed: int) -> LshSampler:
    """The hash directions, shared by every layer, head and request with the same setting."""
    return native.make_sampler(head_dim, K, L, seed)


@lru_cache(maxsize=32)
def shared_law(K: int, L: int, min_hits: int) -> HitLaw:
    """The law by which keys are found, shared in the same way."""
    return native.make_law(K, L, min_hits)


@lru_cache(maxsize=8)
def shared_sketcher(head_dim: int, bits: int, seed: int) -> SketchSampler:
    """The rotation, shared in the same way."""
    return native.make_sketcher(head_dim, bits, seed)


@dataclass(frozen=True)
class PredictedErrors:
    """The predicted errors of the sampled heads of all steps: how many, their sum, the largest, and a histogram.

    unknown: how many more there are that say nothing, since nothing was drawn or the prediction is not finite.
    """

    count: int
    unknown: int
    sum: float
    largest: float
    bins: tuple[int, ...]  # see PredictedErrors in kernels/native/step.h

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
                return min(self.largest, float(2.0 ** ((i + 1) / 8 - 12)))
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

    sampled_rows of body_rows were read in `steps` steps; max_share is the largest share in any step and head.
    """

    steps: int
    sampled_rows: int
    body_rows: int
    max_share: float
    predicted: PredictedErrors

    @property
    def mean_share(self) -> float:
        return self.sampled_rows / self.body_rows if self.body_rows else 0.0


class _Block:
    """Rows `[G, capacity, width]`. `shared`: some other store may read them, so they must be copied before a write.

    centre: (G, D) float32, what keys in whole numbers are kept minus: the mean of the block's first stride.
    """

    __slots__ = ("centre", "rows", "shared")

    def __init__(self, rows: Tensor, centre: Tensor | None = None) -> None:
        self.rows = rows
        self.shared = False
        self.centre = centre

    @property
    def capacity(self) -> int:
        return self.rows.shape[1]


class KVStore:
    """Keys and values of one request in one layer.

    kv_heads: G; head_dim: D (1 to 512); dtype: float32, bfloat16 or float16, that of the model, in which rows are kept
    unless `config.kv_dtype` says int8.
    sampled: False keeps every row exact forever (dense layers).
    layer, and first_head, the place of kv head 0 among those of the model: with the seed and the position they say what
    a step draws.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        config: Config,
        *,
        sampled: bool,
        layer: int = 0,
        first_head: int = 0,
    ) -> None:
        if kv_heads < 1:
            raise ValueError(f"kv_heads={kv_heads} must be at least 1")
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.config = config
        self.sampled = sampled and config.sampler != "full"
        self.layer, self.first_head = layer, first_head
        native.check_threads()
        native.dtype_code(dtype)
        native.padded(head_dim)
        self.layout = RowLayout(head_dim, dtype, torch.int8 if config.kv_dtype == "int8" else dtype)
        self.view = native.make_view(
            self.layout.stored, kv_heads, head_dim, config.sinks, config.block, layer=layer, first_head=first_head
        )
        self._blocks: list[_Block] = []
        self._tail: Tensor | None = None  # (G, stride, width) in `dtype`, of rows that will be whole numbers
        self._tail_from = 0
        self._sampler: LshSampler | SketchSampler | None = None
        self._segments: tuple[native.Segment, ...] = ()
        self._sketches: tuple[native.SketchSegment, ...] = ()
        # `page_ranges` of the body, for Quest
        self.pages = torch.empty(2, kv_heads, 0, head_dim, dtype=dtype, device="cpu")
        if self.layout.quantised:
            self._set_tail(0)
        self._schedule()

    @property
    def length(self) -> int:
        """Tokens stored."""
        return int(self.view.length)

    @property
    def indexed_to(self) -> int:
        """Positions [sinks, indexed_to) are sampled; all others are exact."""
        return int(self.view.indexed_to)

    @property
    def settled(self) -> bool:
        """Whether there is a body to sample from."""
        return self.indexed_to > 0

    @property
    def sampler(self) -> LshSampler | SketchSampler | None:
        """What the index is made by; None for samplers that need none (samplers.py), and where everything is exact."""
        config = self.config
        if self._sampler is None and self.sampled:
            if config.sampler == "sketch":
                self._sampler = shared_sketcher(self.head_dim, config.sketch_bits(self.head_dim), config.seed)
            elif config.sampler == "lsh":
                self._sampler = shared_sampler(self.head_dim, config.K, config.L, config.seed)
        return self._sampler

    @property
    def segments(self) -> tuple[native.Segment, ...]:
        return self._segments

    @property
    def stats(self) -> StepStats:
        view = self.view
        count, unknown, total, largest, bins = view.predicted
        predicted = PredictedErrors(count, unknown, total, largest, tuple(bins))
        return StepStats(view.steps, view.sampled_rows, view.body_rows, view.max_share, predicted)

    def blocks(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Views (keys (G, n, D), values (G, n, D)) of [begin, end) in position order; of int8 rows copies."""
        for rows, centre in self._pieces(begin, self.length if end is None else end):
            if rows.dtype != torch.int8:
                yield self._float_layout.keys(rows), self._float_layout.values(rows)
                continue
            keys = self.layout.keys(rows, torch.float32)
            yield (keys if centre is None else keys + centre[:, None]).to(self.dtype), self.layout.values(rows)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Positions besides multiples of 4096 at which rows go on in other memory."""
        return () if self._tail is None else (self._tail_from,)

    def rows(self, head: int) -> list[Tensor]:
        """The rows of one kv head as the kernels read them: blocks (capacity, width), key and value side by side."""
        return [block.rows[head] for block in self._blocks]

    def count_drawn(self, sample_sizes: Sequence[int]) -> None:
        """Adds to `stats` what the query heads read that the native step did not see."""
        view = self.view
        view.sampled_rows += sum(sample_sizes)
        view.max_share = max(view.max_share, max(sample_sizes) / (self.indexed_to - self.config.sinks))

    def nbytes(self) -> MemoryUse:
        """Bytes of memory held, shared parts included."""
        rows = sum(block.rows.nbytes for block in self._blocks) + (0 if self._tail is None else self._tail.nbytes)
        index = sum(segment.nbytes for segment in self._segments) + sum(sketch.nbytes for sketch in self._sketches)
        return MemoryUse(rows, index + self.pages.nbytes)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Stores T >= 1 more tokens: keys and values (G, T, D), finite, of any float dtype. Indexes nothing yet."""
        T = self._check(keys, values)
        keys, values = keys.detach().to("cpu"), values.detach().to("cpu", self.dtype)
        for name, x in (("keys", keys), ("values", values)):
            if not self.layout.fits(x):
                kept = self.layout.stored
                raise NotFiniteError(f"{name} has entries that are not finite, or too large for the store's {kept}")
        done = 0
        while done < T:
            done += self._append_some(keys[:, done:], values[:, done:])

    def make_room(self, tokens: int = 1) -> None:
        """Makes the row at `length` writable (`writable_to`), allocating or copying a shared block if need be."""
        if self.layout.quantised:
            self._empty_tail()
            self.writable_to = self._tail_from + self.config.block
        else:
            self.writable_to = self._make_block(self.length, tokens)

    def settle(self) -> None:
        """Indexes what there is to index. Does nothing in a dense layer, when short, or when done before."""
        self.index_due()

    def index_due(self) -> None:
        """Brings the index up to where the length says it ends. Call when `length` reaches `due`."""
        self._index(self._index_end(self.length))
        self._schedule()

    def crop(self, length: int) -> None:
        """Forgets every token from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length} is out of range; allowed: 0 to {self.length}")
        if self.layout.quantised:
            self._crop_tail(length)
        self.view.length = length
        del self._blocks[length // native.BLOCK_ROWS + 1 :]  # the next token's block stays
        self._blocks_changed()
        if self._index_end(length) < self.indexed_to:
            # The newest rows become exact again: a store keeps a recent window whenever it has the tokens.
            self._index(self._index_end(length))
        self._schedule()

    def fork(self, config: Config | None = None, *, sampled: bool = True) -> KVStore:
        """A store that starts with the same tokens and goes its own way. Copies nothing until one of the two writes.

        config, sampled: as of a new store, to go on by another setting; a ValueError once this store has settled, and
        for another `kv_dtype`.
        """
        if config is None:
            config, sampled = self.config, self.sampled
        elif self.settled:
            raise ValueError("a store that has settled is indexed by its config; fork with another one before that")
        elif config.kv_dtype != self.config.kv_dtype or (
            self.layout.quantised and (config.centre, config.block) != (self.config.centre, self.config.block)
        ):
            raise ValueError(
                "rows that are there stay as they are: kv_dtype, and centre and block of int8 rows, cannot change"
            )
        other = KVStore(
            self.kv_heads,
            self.head_dim,
            self.dtype,
            config,
            sampled=sampled,
            layer=self.layer,
            first_head=self.first_head,
        )
        for block in self._blocks:
            block.shared = True
        other._blocks = list(self._blocks)
        other.view.length = self.length
        other._blocks_changed()
        if self._tail is not None:
            other._tail = self._tail.clone()
            other._set_tail(self._tail_from)
        if self.settled:
            other._set_segments(self._segments)
            other._set_sketches(self._sketches)
            other.pages = self.pages
            other._set_indexed_to(self.indexed_to)
        self.writable_to = 0
        other._schedule()
        return other

    def _check(self, keys: Tensor, values: Tensor) -> int:
        for name, x in (("keys", keys), ("values", values)):
            if x.ndim != 3 or x.shape[0] != self.kv_heads or x.shape[2] != self.head_dim or x.shape != keys.shape:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; expected ({self.kv_heads}, T, {self.head_dim}), both alike"
                )
            if not x.dtype.is_floating_point:
                raise ValueError(f"{name} has dtype {x.dtype}; expected a floating point type")
        if keys.shape[1] < 1:
            raise ValueError(f"keys has shape {tuple(keys.shape)}; there must be at least one token")
        return keys.shape[1]

    @property
    def _float_layout(self) -> RowLayout:
        """Of rows as they came."""
        return RowLayout(self.head_dim, self.dtype, self.dtype) if self.layout.quantised else self.layout

    def _index_end(self, length: int) -> int:
        """Where the index of so many tokens ends: a multiple of a stride, or 0."""
        config = self.config
        if not self.sampled or length < config.exact_below:
            return 0
        end = max(0, length - config.recent) // config.block * config.block
        return end if end > config.sinks else 0

    def _pieces(self, begin: int, end: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The rows (G, n, width) of [begin, end), block by block and then of the tail, and what they are kept minus."""
        stored = min(end, self._tail_from) if self._tail is not None else end
        while begin < stored:
            block, row = divmod(begin, native.BLOCK_ROWS)
            n = min(stored - begin, native.BLOCK_ROWS - row)
            yield self._blocks[block].rows[:, row : row + n], self._blocks[block].centre
            begin += n
        if self._tail is not None and begin < end:
            yield self._tail[:, begin - self._tail_from : end - self._tail_from], None

    def _append_some(self, keys: Tensor, values: Tensor) -> int:
        """Stores the first of these tokens, as many as go into one piece of memory; returns how many that are."""
        T = keys.shape[1]
        if not self.layout.quantised:
            self.make_room(T)
            block, row = divmod(self.length, native.BLOCK_ROWS)
            n = min(T, self._blocks[block].capacity - row)
            rows = self._blocks[block].rows[:, row : row + n]
            self.layout.write_keys(rows, keys[:, :n])
            self.layout.write_values(rows, values[:, :n])
            self.view.length += n
            return n
        self._empty_tail()
        stride, at = self.config.block, self.length - self._tail_from
        if at == 0 and stride <= T:
            n = min(T // stride * stride, native.BLOCK_ROWS - self.length % native.BLOCK_ROWS)
            # Rounded to the model's dtype first, as those that wait in the tail are.
            self._quantise(keys[:, :n].to(self.dtype), values[:, :n])
            self.view.length += n
            self._set_tail(self.length)
            return n
        assert self._tail is not None
        n = min(T, stride - at)
        self._float_layout.write_keys(self._tail[:, at : at + n], keys[:, :n])
        self._float_layout.write_values(self._tail[:, at : at + n], values[:, :n])
        self.view.length += n
        return n

    def _make_block(self, position: int, tokens: int) -> int:
        """Makes the row at a position writable, the next one of its block; returns the end of what then is."""
        block, row = divmod(position, native.BLOCK_ROWS)
        if block == len(self._blocks):
            wanted = block_capacity(tokens if block == 0 else native.BLOCK_ROWS)
            self._blocks.append(_Block(self._new_rows(wanted)))
            self._blocks_changed()
        elif self._blocks[block].shared or row == self._blocks[block].capacity:
            old = self._blocks[block]
            capacity = old.capacity if row < old.capacity else block_capacity(row + max(tokens, row))
            self._replace(block, capacity, row)
        return block * native.BLOCK_ROWS + self._blocks[block].capacity

    def _empty_tail(self) -> None:
        """Turns the rows of a full tail into whole numbers."""
        if self._tail is not None and self.length == self._tail_from + self.config.block:
            rows = self._tail
            self._quantise(self._float_layout.keys(rows), self._float_layout.values(rows))
            self._set_tail(self.length)

    def _quantise(self, keys: Tensor, values: Tensor) -> None:
        """Writes whole strides, (G, n, D) in `dtype`, from `_tail_from` on; they lie in one block."""
        done, n, stride = 0, keys.shape[1], self.config.block
        while done < n:
            position = self._tail_from + done
            index, row = divmod(position, native.BLOCK_ROWS)
            here = min(n - done, self._make_block(position, n - done) - position)
            block = self._blocks[index]
            if self.config.centre and row == 0:
                first = native.interleave_heads(keys[:, done : done + stride])
                block.centre = native.mean_keys(first, self.head_dim)
                self._blocks_changed()
            new = keys[:, done : done + here].float()
            rows = block.rows[:, row : row + here]
            self.layout.write_keys(rows, new if block.centre is None else new - block.centre[:, None])
            self.layout.write_values(rows, values[:, done : done + here])
            done += here

    def _set_tail(self, first: int) -> None:
        """The tail, which is empty or not, begins at this position."""
        if self._tail is None:
            width = native.row_width(self.head_dim, self.dtype)
            self._tail = native.empty((self.kv_heads, self.config.block, width), self.dtype)
        self._tail_from = first
        stride = self._tail.stride(0) * self._tail.element_size()
        self.view.set_tail(native.dtype_code(self.dtype), self._tail.data_ptr(), stride, first)

    def _crop_tail(self, length: int) -> None:
        """Rows of a stride that is no longer whole go back to the tail, as they have been rounded."""
        self._empty_tail()
        first = length // self.config.block * self.config.block
        if first >= self._tail_from:
            return
        pieces = list(self.blocks(first, length))
        self._set_tail(first)
        assert self._tail is not None
        for keys, values in pieces:
            self._float_layout.write_keys(self._tail[:, : length - first], keys)
            self._float_layout.write_values(self._tail[:, : length - first], values)

    def _replace(self, block: int, capacity: int, rows_kept: int) -> None:
        """Moves a block's first rows to memory of this store alone."""
        rows = self._new_rows(capacity)
        rows[:, :rows_kept] = self._blocks[block].rows[:, :rows_kept]
        self._blocks[block] = _Block(rows, self._blocks[block].centre)
        self._blocks_changed()

    def _new_rows(self, capacity: int) -> Tensor:
        return native.empty((self.kv_heads, capacity, self.layout.width), self.layout.stored)

    def _blocks_changed(self) -> None:
        self.writable_to = 0
        self.view.set_blocks(
            [block.rows.data_ptr() for block in self._blocks],
            [block.rows.stride(0) * block.rows.element_size() for block in self._blocks],
        )
        if self.layout.quantised:
            # One that was made just now has no centre yet, and no rows.
            centres = [block.centre for block in self._blocks if block.centre is not None]
            self.view.set_row_centres([centre.data_ptr() for centre in centres])

    def _index(self, end: int) -> None:
        """Moves the end of the body, and brings the index that its sampler needs up to it."""
        if end == self.indexed_to:
            return
        if self.layout.quantised:
            self._empty_tail()
        if self.config.sampler == "lsh":
            self._index_tables(end)
        elif self.config.sampler == "sketch":
            self._index_sketch(end)
        elif self.config.sampler == "quest":
            self._index_pages(end)
        self._set_indexed_to(end)

    def _set_indexed_to(self, end: int) -> None:
        self.view.indexed_to = end
        config = self.config
        native.set_sampler(self.view, self.sampler)
        law = shared_law(config.K, config.L, config.min_hits) if config.sampler == "lsh" else None
        native.set_policy(self.view, budget=config.budget, epsilon=config.epsilon or 0.0, seed=config.seed, law=law)

    def _index_tables(self, end: int) -> None:
        """Keys between two multiples of 65536 are hashed minus one centre; when that changes, they are hashed anew."""
        sampler, config = self.sampler, self.config
        assert isinstance(sampler, LshSampler)
        segments, begin = list(self._segments), self.indexed_to
        first = min(begin, end) // native.SEGMENT_ROWS * native.SEGMENT_ROWS
        if min(begin, end) > first and self._centre_strides(first, begin) != self._centre_strides(first, end):
            segments, begin = [segment for segment in segments if segment.first < first], first

        def build(begin: int, n: int) -> native.Segment:
            pieces = list(self._pieces(begin, begin + n))
            centre = self._hash_centre(begin // native.SEGMENT_ROWS * native.SEGMENT_ROWS, end)
            off = [self._off_rows(centre, kept) for _, kept in pieces]
            codes = native.hash_rows([rows for rows, _ in pieces], sampler, [x for x in off if x is not None])
            return native.build(codes, config.K, begin, centre)

        self._set_segments(_moved(segments, begin, end, build, native.extend, native.shorten))

    def _centre_strides(self, first: int, end: int) -> int:
        """How many strides make the centre of the keys from `first`, a multiple of 65536, on, of those before `end`."""
        if not self.config.centre:
            return 0
        return centre_strides(min(end - first, native.SEGMENT_ROWS) // self.config.block, self.config.block)

    def _hash_centre(self, first: int, end: int) -> Tensor | None:
        strides = self._centre_strides(first, end)
        if strides == 0:
            return None
        ((rows, centre),) = self._pieces(first, first + strides * self.config.block)
        return native.mean_keys(rows, self.head_dim, centre)

    def _off_rows(self, centre: Tensor | None, kept: Tensor | None) -> Tensor | None:
        """What is taken off rows, which are kept minus `kept`, to hash their keys minus `centre`."""
        if kept is None:
            return centre
        return -kept if centre is None else centre - kept

    def _index_sketch(self, end: int) -> None:
        sampler, config = self.sampler, self.config
        assert isinstance(sampler, SketchSampler)

        def build(begin: int, n: int) -> native.SketchSegment:
            pieces = list(self._pieces(begin, begin + n))
            return native.sketch(
                [rows for rows, _ in pieces],
                sampler,
                begin,
                stride=config.block,
                centred=config.centre,
                row_centres=[centre for _, centre in pieces if centre is not None],
            )

        def join(a: native.SketchSegment, b: native.SketchSegment) -> native.SketchSegment:
            return native.join(a, b, stride=config.block)

        def shorten(segment: native.SketchSegment, count: int) -> native.SketchSegment:
            return replace(segment, count=count)

        self._set_sketches(_moved(self._sketches, self.indexed_to, end, build, join, shorten))

    def _index_pages(self, end: int) -> None:
        """Makes the pages anew from the first that is not the same as before and whole."""
        sinks = self.config.sinks
        same = max(0, min(end, self.indexed_to) - sinks) // PAGE_ROWS
        pages, begin = self.pages[:, :, :same], sinks + same * PAGE_ROWS
        if begin < end:
            keys = torch.cat([keys for keys, _ in self.blocks(begin, end)], 1)
            pages = torch.cat([pages, page_ranges(keys)], 2)
        self.pages = pages

    def _set_segments(self, segments: Sequence[native.Segment]) -> None:
        self._segments = tuple(segments)
        native.set_segments(self.view, segments)

    def _set_sketches(self, segments: Sequence[native.SketchSegment]) -> None:
        self._sketches = tuple(segments)
        native.set_sketches(self.view, segments)

    def _schedule(self) -> None:
        """`due`: the length at which there is something to index; `writable_to`: the end of the writable rows."""
        config = self.config
        self.writable_to = 0
        if not self.sampled:
            self.due = _NEVER
        else:
            next_end = (max(self.indexed_to, config.sinks) // config.block + 1) * config.block
            self.due = max(config.exact_below, next_end + config.recent)


def _moved(
    segments: Sequence[S],
    begin: int,
    end: int,
    build: Callable[[int, int], S],
    join: Callable[[S, S], S],
    shorten: Callable[[S, int], S],
) -> list[S]:
    """The segments of [0, end): builds those of [begin, end), or forgets what lies beyond the end.

    None goes over a multiple of 65536. Those that end between multiples of YOUNG keys are joined with the next, others
    with as large ones, so that a step touches few of them.
    """
    kept = [segment for segment in segments if segment.first < end]
    if kept and kept[-1].first + kept[-1].count > end:
        kept[-1] = shorten(kept[-1], end - kept[-1].first)
    while begin < end:
        piece = YOUNG if begin % YOUNG else native.SEGMENT_ROWS
        n = min(end, (begin // piece + 1) * piece) - begin
        kept.append(build(begin, n))
        begin += n
        while len(kept) > 1 and _joins(kept[-2].first, kept[-2].count, kept[-1].count):
            newest = kept.pop()
            kept[-1] = join(kept[-1], newest)
    return kept


def _joins(first: int, older: int, newer: int) -> bool:
    """Whether a segment of `older` keys from `first` on is joined with the one behind it."""
    if (first + older) % native.SEGMENT_ROWS == 0:
        return False
    return (first + older) % YOUNG != 0 or newer >= YOUNG


def block_capacity(rows: int) -> int:
    """The smallest allowed capacity for `rows` rows: powers of two from SMALLEST_BLOCK to a full block."""
    return min(native.BLOCK_ROWS, max(SMALLEST_BLOCK, 1 << (rows - 1).bit_length()))
