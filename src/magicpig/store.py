"""One request, one layer: its keys and values, and the index that finds the keys a query should look at.

Rows are addressed by position. They lie in blocks of 4096, `[G, capacity, key | value]`; only the last block is ever
moved, while it is small. A store begins exact and uncentred. `settle` freezes the mean of the body keys, subtracts it
from every key (attention does not change: softmax is shift invariant) and indexes the body; for samplers that do not
hash, keys stay as they are. From then on

    [0, sinks)             exact
    [sinks, indexed_to)    sampled
    [indexed_to, length)   exact: the recent window, which grows by `block` tokens before they are indexed in one go.

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
from magicpig.kernels._native import LshSampler, SketchSampler, StoreView
from magicpig.kernels.pages import PAGE_ROWS, page_ranges
from magicpig.kernels.rows.layout import RowLayout
from magicpig.types import MemoryUse

SMALLEST_BLOCK = 256  # rows; doubles up to native.BLOCK_ROWS
YOUNG = 4096  # keys: segments below this are merged on every append, larger ones only with equals
OFF_CENTRE = 1 / 8  # of a key's length: a mean this close to that of the body is left as it is
PREDICTING = ("lsh", "sketch")  # samplers whose steps predict their own error
_NEVER = 1 << 62

S = TypeVar("S", native.Segment, native.SketchSegment)


@lru_cache(maxsize=8)
def shared_sampler(head_dim: int, K: int, L: int, min_hits: int, seed: int) -> LshSampler:
    """The hash directions, shared by every layer, head and request with the same setting."""
    return native.make_sampler(head_dim, K, L, min_hits, seed)


@lru_cache(maxsize=8)
def shared_sketcher(head_dim: int, bits: int, seed: int, budget: float, epsilon: float | None) -> SketchSampler:
    """The rotation, and what is drawn by it, shared in the same way."""
    return native.make_sketcher(head_dim, bits, seed, budget=budget, epsilon=epsilon or 0.0)


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
    """Rows `[G, capacity, width]`. `shared`: some other store may read them, so they must be copied before a write."""

    __slots__ = ("rows", "shared")

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.shared = False

    @property
    def capacity(self) -> int:
        return self.rows.shape[1]


class KVStore:
    """Keys and values of one request in one layer.

    kv_heads: G; head_dim: D (1 to 512); dtype: float32, bfloat16 or float16, that of the model, in which rows are kept
    unless `config.kv_dtype` says int8.
    sampled: False keeps every row exact forever (dense layers).
    """

    def __init__(self, kv_heads: int, head_dim: int, dtype: torch.dtype, config: Config, *, sampled: bool) -> None:
        if kv_heads < 1:
            raise ValueError(f"kv_heads={kv_heads} must be at least 1")
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.config = config
        self.sampled = sampled and config.sampler != "full"
        self.settled = False
        self.centred = False  # whether keys are kept minus `mean`
        self.mean = torch.zeros(kv_heads, head_dim, dtype=torch.float32, device="cpu")
        native.check_threads()
        native.dtype_code(dtype)
        native.padded(head_dim)
        self.layout = RowLayout(head_dim, dtype, torch.int8 if config.kv_dtype == "int8" else dtype)
        self.view = StoreView(native.row_code(self.layout.stored), kv_heads, head_dim, config.sinks)
        self._blocks: list[_Block] = []
        self._sampler: LshSampler | SketchSampler | None = None
        self._segments: tuple[native.Segment, ...] = ()
        self._sketches: tuple[native.SketchSegment, ...] = ()
        # `page_ranges` of the body, for Quest
        self.pages = torch.empty(2, kv_heads, 0, head_dim, dtype=dtype, device="cpu")
        self._drift_sum = torch.zeros(kv_heads, head_dim, dtype=torch.float32, device="cpu")
        self._drift_keys = 0
        self._spread = 0.0
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
    def sampler(self) -> LshSampler | SketchSampler | None:
        """What the kernels need to sample, or None while everything is exact.

        Where the rows of the body are not chosen by hashing (samplers.py), it finds none: there are no tables.
        """
        if self._sampler is None and self.settled:
            self._sampler = self._shared_sampler()
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

    @property
    def drift(self) -> float:
        """How far the keys indexed after settling have moved from the frozen mean, in units of a body key's length.

        The largest over kv heads. Results stay right at any drift; near 1 and above sampling becomes inefficient.
        """
        if self._drift_keys == 0 or self._spread == 0.0:
            return 0.0
        return float((self._drift_sum / self._drift_keys).norm(dim=1).max()) / self._spread

    def blocks(self, begin: int = 0, end: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Views (keys (G, n, D), values (G, n, D)) of [begin, end) in position order; of int8 rows copies in `dtype`.

        Keys have `mean` subtracted, which is zero before a store has a centre.
        """
        for rows in self._pieces(begin, self.length if end is None else end):
            yield self.layout.keys(rows), self.layout.values(rows)

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
        rows = sum(block.rows.nbytes for block in self._blocks)
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
        if self.layout.quantised and self.length == 0 and not self.settled:
            self._centre_first(keys)
        done = 0
        while done < T:
            self.make_room(T - done)
            block, row = divmod(self.length, native.BLOCK_ROWS)
            n = min(T - done, self._blocks[block].capacity - row)
            rows = self._blocks[block].rows[:, row : row + n]
            new = keys[:, done : done + n]
            self.layout.write_keys(rows, new.float() - self.mean[:, None] if self.centred else new)
            self.layout.write_values(rows, values[:, done : done + n])
            self.view.length += n
            done += n

    def make_room(self, tokens: int = 1) -> None:
        """Makes the row at `length` writable (`writable_to`), allocating or copying a shared block if need be."""
        block, row = divmod(self.length, native.BLOCK_ROWS)
        if block == len(self._blocks):
            wanted = block_capacity(tokens if block == 0 else native.BLOCK_ROWS)
            self._blocks.append(_Block(self._new_rows(wanted)))
            self._blocks_changed()
        elif self._blocks[block].shared or row == self._blocks[block].capacity:
            old = self._blocks[block]
            capacity = old.capacity if row < old.capacity else block_capacity(row + max(tokens, row))
            self._replace(block, capacity, row)
        self.writable_to = block * native.BLOCK_ROWS + self._blocks[block].capacity

    def settle(self) -> None:
        """Centres the keys and indexes the body. Does nothing in a dense layer, when short, or when done before.

        Only hashes and sketches need centred keys and an index; other samplers look at the rows as they are.
        """
        begin, end = self.config.sinks, self.length - self.config.recent
        if self.settled or not self.sampled or end <= begin or self.length < self.config.exact_below:
            return
        if self.config.sampler in ("lsh", "sketch") and self.config.centre:
            self._centre(begin, end)
        self.settled = True
        self._index(end)
        self._schedule()

    def index_due(self) -> None:
        """Settles, or indexes the tokens that have left the recent window. Call when `length` reaches `due`."""
        if not self.settled:
            self.settle()
        elif self.length - self.config.recent > self.indexed_to:
            end = self.length - self.config.recent
            for rows in self._pieces(self.indexed_to, end):
                self._drift_sum += self.layout.keys(rows, torch.float32).sum(1)
            self._drift_keys += end - self.indexed_to
            self._index(end)
        self._schedule()

    def crop(self, length: int) -> None:
        """Forgets every token from position `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length={length} is out of range; allowed: 0 to {self.length}")
        self.view.length = length
        del self._blocks[length // native.BLOCK_ROWS + 1 :]  # the next token's block stays
        if self.settled and length - self.config.recent < self.indexed_to:
            # The newest rows become exact again: a store keeps a recent window whenever it has the tokens.
            self._index(max(self.config.sinks, length - self.config.recent))
        self._blocks_changed()
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
        elif config.kv_dtype != self.config.kv_dtype or (self.centred and not config.centre):
            raise ValueError("rows that are there stay as they are: kv_dtype, and centre of int8 rows, cannot change")
        other = KVStore(self.kv_heads, self.head_dim, self.dtype, config, sampled=sampled)
        for block in self._blocks:
            block.shared = True
        other._blocks = list(self._blocks)
        other.settled = self.settled
        if self.centred:
            other._set_mean(self.mean)
        other._drift_sum, other._drift_keys, other._spread = (
            self._drift_sum.clone(),
            self._drift_keys,
            self._spread,
        )
        other.view.length = self.length
        if self.settled:
            other._set_segments(self._segments)
            other._set_sketches(self._sketches)
            other.pages = self.pages
            other.view.indexed_to = self.indexed_to
        other._blocks_changed()
        self.writable_to = 0
        other._schedule()
        return other

    def _shared_sampler(self) -> LshSampler | SketchSampler:
        config = self.config
        if config.sampler == "sketch":
            return shared_sketcher(
                self.head_dim, config.sketch_bits(self.head_dim), config.seed, config.budget, config.epsilon
            )
        if config.sampler != "lsh":
            return shared_sampler(self.head_dim, 1, 1, 1, 0)
        return shared_sampler(self.head_dim, config.K, config.L, config.min_hits, config.seed)

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

    def _pieces(self, begin: int, end: int) -> Iterator[Tensor]:
        """The rows (G, n, width) of [begin, end), block by block."""
        while begin < end:
            block, row = divmod(begin, native.BLOCK_ROWS)
            n = min(end - begin, native.BLOCK_ROWS - row)
            yield self._blocks[block].rows[:, row : row + n]
            begin += n

    def _replace(self, block: int, capacity: int, rows_kept: int) -> None:
        """Moves a block's first rows to memory of this store alone."""
        rows = self._new_rows(capacity)
        rows[:, :rows_kept] = self._blocks[block].rows[:, :rows_kept]
        self._blocks[block] = _Block(rows)
        self._blocks_changed()

    def _new_rows(self, capacity: int) -> Tensor:
        return native.empty((self.kv_heads, capacity, self.layout.width), self.layout.stored)

    def _blocks_changed(self) -> None:
        self.writable_to = 0
        self.view.set_blocks(
            [block.rows.data_ptr() for block in self._blocks],
            [block.rows.stride(0) * block.rows.element_size() for block in self._blocks],
        )

    def _centre_first(self, keys: Tensor) -> None:
        """Takes the mean of the first tokens, (G, T, D), for that of all: coordinates large in all keys round badly."""
        if self.config.centre and keys.shape[1] > self.config.sinks:
            self._set_mean(keys[:, self.config.sinks :].mean(1, dtype=torch.float32))

    def _centre(self, begin: int, end: int) -> None:
        """Subtracts the mean of the keys [begin, end) from all keys, or finds that they have nearly that one taken off.

        Whole numbers would be rounded anew; and to attend, any centre is as good, to hash, one close by.
        """
        total = torch.zeros(self.kv_heads, self.head_dim, dtype=torch.float64, device="cpu")
        squares = torch.zeros(self.kv_heads, dtype=torch.float64, device="cpu")
        for rows in self._pieces(begin, end):
            keys = self.layout.keys(rows, torch.float32)
            total += keys.sum(1)
            squares += keys.square().sum((1, 2))
        off = total / (end - begin)
        lengths = (squares / (end - begin) - off.square().sum(1)).clamp(min=0).sqrt()
        self._spread = float(lengths.square().mean().sqrt())
        if self.layout.quantised and bool((off.norm(dim=1) <= OFF_CENTRE * lengths).all()):
            return
        for block in range(len(self._blocks)):
            if self._blocks[block].shared:
                self._replace(block, self._blocks[block].capacity, self._blocks[block].capacity)
        for rows in self._pieces(0, self.length):
            self.layout.write_keys(rows, self.layout.keys(rows, torch.float32) - off.float()[:, None])
        self._set_mean(self.mean + off.float())

    def _set_mean(self, mean: Tensor) -> None:
        self.mean, self.centred = mean, True
        self.view.set_mean(mean.contiguous().data_ptr())

    def _index(self, end: int) -> None:
        """Moves the end of the body, and brings the index that its sampler needs up to it."""
        if self.config.sampler == "lsh":
            self._index_tables(end)
        elif self.config.sampler == "sketch":
            self._index_sketch(end)
        elif self.config.sampler == "quest":
            self._index_pages(end)
        self.view.indexed_to = end

    def _index_tables(self, end: int) -> None:
        sampler, config = self.sampler, self.config
        assert isinstance(sampler, LshSampler)

        def build(pieces: list[Tensor], first: int) -> native.Segment:
            return native.build(native.hash_rows(pieces, sampler, config.L), config.K, first)

        self._set_segments(self._moved(self._segments, end, build, native.extend, native.shorten))

    def _index_sketch(self, end: int) -> None:
        sampler = self.sampler
        assert isinstance(sampler, SketchSampler)

        def build(pieces: list[Tensor], first: int) -> native.SketchSegment:
            return native.sketch(pieces, sampler, first)

        def shorten(segment: native.SketchSegment, count: int) -> native.SketchSegment:
            return replace(segment, count=count)

        self._set_sketches(self._moved(self._sketches, end, build, native.join, shorten))

    def _moved(
        self,
        segments: Sequence[S],
        end: int,
        build: Callable[[list[Tensor], int], S],
        join: Callable[[S, S], S],
        shorten: Callable[[S, int], S],
    ) -> list[S]:
        """The segments of [sinks, end): builds those of [indexed_to, end), or forgets what lies beyond the end.

        Small ones are joined, so that a step touches few of them.
        """
        kept, begin = [segment for segment in segments if segment.first < end], self.indexed_to
        if kept and kept[-1].first + kept[-1].count > end:
            kept[-1] = shorten(kept[-1], end - kept[-1].first)
        while begin < end:
            n = min(end - begin, native.SEGMENT_ROWS)
            kept.append(build(list(self._pieces(begin, begin + n)), begin))
            begin += n
            while len(kept) > 1 and _should_merge(kept[-2].count, kept[-1].count):
                newest = kept.pop()
                kept[-1] = join(kept[-1], newest)
        return kept

    def _index_pages(self, end: int) -> None:
        """Makes the pages anew from the first that is not the same as before and whole."""
        sinks = self.config.sinks
        same = (min(end, self.indexed_to) - sinks) // PAGE_ROWS
        pages, begin = self.pages[:, :, :same], sinks + same * PAGE_ROWS
        if begin < end:
            keys = torch.cat([keys for keys, _ in self.blocks(begin, end)], 1)
            pages = torch.cat([pages, page_ranges(keys)], 2)
        self.pages = pages

    def _set_segments(self, segments: Sequence[native.Segment]) -> None:
        self._segments = tuple(segments)
        self.view.set_segments(
            [segment.offsets.data_ptr() for segment in segments],
            [segment.ids.data_ptr() for segment in segments],
            [segment.first for segment in segments],
            [segment.count for segment in segments],
        )

    def _set_sketches(self, segments: Sequence[native.SketchSegment]) -> None:
        self._sketches = tuple(segments)
        self.view.set_sketches(
            [segment.words.data_ptr() for segment in segments],
            [segment.scales.data_ptr() for segment in segments],
            [segment.first for segment in segments],
            [segment.count for segment in segments],
            [segment.blocks for segment in segments],
        )

    def _schedule(self) -> None:
        """`due`: the length at which there is something to index; `writable_to`: the end of the writable rows."""
        config = self.config
        self.writable_to = 0
        if not self.sampled:
            self.due = _NEVER
        elif self.settled:
            self.due = self.indexed_to + config.recent + config.block
        else:
            self.due = max(config.exact_below, config.sinks + config.recent + 1)


def _should_merge(older: int, newer: int) -> bool:
    return older + newer <= native.SEGMENT_ROWS and (older < YOUNG or newer >= YOUNG)


def block_capacity(rows: int) -> int:
    """The smallest allowed capacity for `rows` rows: powers of two from SMALLEST_BLOCK to a full block."""
    return min(native.BLOCK_ROWS, max(SMALLEST_BLOCK, 1 << (rows - 1).bit_length()))
