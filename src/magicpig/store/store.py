"""One sequence, one layer: its keys and values, and the index that finds the keys a query should look at.

Rows are addressed by position and are never rewritten. Whole strides (`Config.block` positions) lie in blocks of 4096,
`[G, capacity, key | value]`; the stride of the newest token is still growing and lies in the tail, which belongs to
this store alone. What is stored and what is indexed are functions of the tokens, the settings and the length: not of
how the tokens came, what was forked, or what was there before a crop. For the query that follows `length` tokens

    [0, sinks)             exact
    [sinks, index end)     sampled; the index end is `Policy.index_end(length)`
    [index end, length)    exact: the recent window, which grows by a stride before that is indexed in one go.

Knows nothing of attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from magicpig.config import Config
from magicpig.errors import ArgumentError, NotFiniteError
from magicpig.kernels.arena import UNLIMITED, Arena, Memory, block_capacity, unique_bytes
from magicpig.kernels.base import BLOCK_ROWS, Kernels, check_dtype, interleave_heads, load_kernels, padded
from magicpig.kernels.rows.layout import RowLayout
from magicpig.report import PredictedErrors, StepStats
from magicpig.samplers import Index, Sampler, sampler_of
from magicpig.settings import DrawPolicy, IndexSpec, Policy
from magicpig.store.blocks import Block
from magicpig.types import MemoryUse

_NEVER = 1 << 62


class Tail:
    """The rows of the growing stride, [G, stride, width] in the model's dtype. shared: to be copied before a write."""

    __slots__ = ("memory", "shared")

    def __init__(self, memory: Memory, *, shared: bool = False) -> None:
        self.memory = memory
        self.shared = shared

    @property
    def rows(self) -> Tensor:
        return self.memory.tensor


class KVStore:
    """Keys and values of one sequence in one layer.

    kv_heads: G; head_dim: D (1 to 512); dtype: float32, bfloat16 or float16, that of the model, in which rows are kept
    unless `config.kv_dtype` says int8. config: of this layer. sampled: False keeps every row exact forever.
    layer, first_head: where the layer and its first kv head stand in the model; they say, with the seed and the
    position, what a step draws. arena: where memory comes from. kernels: who computes, by default what `load_kernels`
    gives.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        config: Config,
        *,
        sampled: bool = True,
        layer: int = 0,
        first_head: int = 0,
        arena: Arena = UNLIMITED,
        kernels: Kernels | None = None,
    ) -> None:
        if kv_heads < 1:
            raise ArgumentError(f"kv_heads={kv_heads} must be at least 1")
        check_dtype(dtype)
        padded(head_dim)
        self.kv_heads, self.head_dim, self.dtype = kv_heads, head_dim, dtype
        self.layer, self.first_head, self.arena = layer, first_head, arena
        self.kernels = load_kernels() if kernels is None else kernels
        self.tail_layout = RowLayout(head_dim, dtype, dtype, self.kernels)
        self._blocks: list[Block] = []
        self._tail: Tail | None = None
        self._previous: Tail | None = None  # the stride before the tail, unrounded: `crop` may go back into it
        self._flushed = 0
        self.writable_to = 0  # the end of the rows that a step may write
        self._configure(config, sampled)

    def _configure(self, config: Config, sampled: bool) -> None:
        self.config = config
        self.policy = Policy.of(config, sampled=sampled and config.samples)
        self.spec = IndexSpec.of(config, sampled=self.policy.sampled)
        self.sampler: Sampler = sampler_of(self.spec, self.head_dim, self.kernels)
        stored = torch.int8 if config.kv_dtype == "int8" else self.dtype
        self.layout = RowLayout(self.head_dim, self.dtype, stored, self.kernels)
        self.view = self._new_view()
        self.crops = 0  # how often tokens were taken back
        self.index: Index = self.sampler.empty()
        self.draw = DrawPolicy.of(config)
        self._schedule()

    @property
    def length(self) -> int:
        """Tokens stored."""
        return int(self.view.length)

    @property
    def indexed_to(self) -> int:
        """Positions [sinks, indexed_to) are sampled; all others are exact. 0 before there is an index."""
        return self.index.end

    @property
    def settled(self) -> bool:
        """Whether there is an index, so that the next decode step samples."""
        return self.index.end > 0

    @property
    def flushed(self) -> int:
        """Positions [0, flushed), whole strides, lie in blocks, the others in the tail."""
        return self._flushed

    @property
    def tail(self) -> Tail | None:
        """The rows of [flushed, length), and whatever lies behind them."""
        return self._tail

    @property
    def previous(self) -> Tail | None:
        """Of int8 rows, the stride before `flushed` as it came, if it is still there."""
        return self._previous

    @property
    def body(self) -> int:
        """How many rows may be left out."""
        return max(0, self.index.end - self.policy.sinks)

    @property
    def draw(self) -> DrawPolicy:
        """How steps draw. May be set at any time; raises ArgumentError where it does not fit the index."""
        return self._draw

    @draw.setter
    def draw(self, policy: DrawPolicy) -> None:
        self.sampler.check(policy)
        self._draw = policy
        self.sampler.apply(policy, self.view)

    @property
    def stats(self) -> StepStats:
        view = self.view
        count, unknown, total, largest, bins = view.predicted
        predicted = PredictedErrors(count, unknown, total, largest, tuple(bins))
        return StepStats(view.steps, view.sampled_rows, view.body_rows, view.max_share, view.whole_bodies, predicted)

    def blocks(
        self, begin: int = 0, end: int | None = None, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys (G, n, D) and values (G, n, D) of [begin, end), piece by piece, in `dtype`, by default the model's.

        Views where nothing has to be computed, copies of int8 rows and in another dtype.
        """
        end, dtype = self.length if end is None else end, dtype or self.dtype
        for rows, centre in self.pieces(begin, min(end, self._flushed)):
            keys = self.layout.keys(rows, dtype)
            if centre is not None:
                keys = (self.layout.keys(rows, torch.float32) + centre[:, None]).to(dtype)
            yield keys, self.layout.values(rows, dtype)
        begin = max(begin, self._flushed)
        if begin < end:
            assert self._tail is not None
            rows = self._tail.rows[:, begin - self._flushed : end - self._flushed]
            yield self.tail_layout.keys(rows, dtype), self.tail_layout.values(rows, dtype)

    def fetch(self, head: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (S, D) float32 of one kv head at positions (S,) int64, ascending, all before `flushed`."""
        keys, values = [torch.empty(0, self.head_dim, device="cpu", dtype=torch.float32)], []
        for number in (ids // BLOCK_ROWS).unique().tolist():
            block = self._blocks[number]
            rows = block.rows[head, ids[ids // BLOCK_ROWS == number] % BLOCK_ROWS][None]
            own = self.layout.keys(rows, torch.float32)[0]
            keys.append(own if block.centre is None else own + block.centre[head])
            values.append(self.layout.values(rows, torch.float32)[0])
        return torch.cat(keys), torch.cat([keys[0], *values])

    def pieces(self, begin: int, end: int) -> list[tuple[Tensor, Tensor | None]]:
        """The stored rows (G, n, width) of [begin, end), block by block, and the centre (G, D) that their keys lack.

        Only of positions before `flushed`.
        """
        found = []
        while begin < end:
            block, row = divmod(begin, BLOCK_ROWS)
            n = min(end - begin, BLOCK_ROWS - row)
            found.append((self._blocks[block].rows[:, row : row + n], self._blocks[block].centre))
            begin += n
        return found

    def rows(self, head: int) -> list[Tensor]:
        """The rows of one kv head as the kernels read them: blocks (capacity, width), key and value side by side."""
        return [block.rows[head] for block in self._blocks]

    def count_drawn(
        self, sample_sizes: Sequence[int], tried: Sequence[int] | None = None, body: int | None = None
    ) -> None:
        """Adds to `stats` what the query heads read that the native step did not see.

        tried: how many rows each of them read for samples that were not good enough. body: as it was then, if not as
        it is.
        """
        view, before, body = self.view, tried or [0] * len(sample_sizes), self.body if body is None else body
        view.sampled_rows += sum(min(n + more, body) for n, more in zip(sample_sizes, before, strict=True))
        view.whole_bodies += list(sample_sizes).count(body)
        view.max_share = max(view.max_share, max(sample_sizes) / body)

    def count_step(
        self,
        sample_sizes: Sequence[int],
        predicted: Tensor,
        tried: Sequence[int] | None = None,
        body: int | None = None,
    ) -> None:
        """Adds a step that the kernels did not take: what its query heads read, and the errors (H,) they predict.

        tried, body: see `count_drawn`.
        """
        view, body = self.view, self.body if body is None else body
        view.steps += 1
        if body:
            view.body_rows += body * len(sample_sizes)
            self.count_drawn(sample_sizes, tried, body)
            self.kernels.count_predicted(view, predicted)

    @property
    def room(self) -> int:
        """Tokens that fit into the growing stride after `make_room`."""
        return self._flushed + self.spec.stride - self.length

    def exact_views(self, count: int) -> list[Any]:
        """For each of the next `count` tokens, at most `room`, the view in which it comes next and all rows are exact.

        They share this store's rows, tail included: a step that appends a token to each of them, in their order, writes
        what `count` steps would have written one after the other. `grow` then says that it was done.
        """
        views = []
        for ahead in range(count):
            view = self._new_view()
            self._set_rows(view)
            view.length = self.length + ahead
            views.append(view)
        return views

    def grow(self, count: int) -> None:
        """Counts tokens that were written behind `length` through `exact_views`."""
        self.view.length += count

    def memories(self) -> tuple[list[Memory], list[Memory]]:
        """What is held for rows and for the index, shared parts included."""
        tails = [tail.memory for tail in (self._tail, self._previous) if tail is not None]
        return [*(block.memory for block in self._blocks), *tails], list(self.index.memories())

    def nbytes(self) -> MemoryUse:
        """Bytes of memory held, shared parts included."""
        rows, index = self.memories()
        return MemoryUse(unique_bytes(rows), unique_bytes(index))

    # --- tokens come --------------------------------------------------------------------------------------------------

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Stores T >= 1 more tokens: keys and values (G, T, D), of any float dtype. Indexes nothing yet.

        Raises NotFiniteError for numbers that are not finite, or do not fit the rows; then the store is as before.
        """
        self._check(keys, values)
        keys, values = (x.detach().to("cpu", self.dtype) for x in (keys, values))
        self.check_numbers(keys, values)
        T, stride, done = keys.shape[1], self.spec.stride, 0
        while done < T:
            self.tidy()
            whole = (T - done) // stride * stride
            if self.length == self._flushed and whole > 0:
                n = min(whole, BLOCK_ROWS - self._flushed % BLOCK_ROWS)
                new = keys[:, done : done + n], values[:, done : done + n]
                self._store(*new, reserve=whole)
                if self.layout.quantised:
                    self._previous = self._new_tail()
                    self._write_tail(self._previous, 0, *(x[:, -stride:] for x in new))
            else:
                self.make_room()
                assert self._tail is not None
                row = self.length - self._flushed
                n = min(T - done, stride - row)
                self._write_tail(self._tail, row, keys[:, done : done + n], values[:, done : done + n])
            self.view.length += n
            done += n
        self.tidy()
        self._connect()

    def check_numbers(self, keys: Tensor, values: Tensor) -> None:
        """Raises NotFiniteError for numbers that are not finite, or do not fit the rows."""
        for name, x in (("keys", keys), ("values", values)):
            if not self.layout.fits(x):
                kept = self.layout.stored
                raise NotFiniteError(f"{name} has entries that are not finite, or too large for the store's {kept}")

    def make_room(self) -> None:
        """Makes the row at `length` writable (`writable_to`): flushes a full tail, copies one that others read."""
        self.tidy()
        if self._tail is None or self._tail.shared:
            old, used = self._tail, self.length - self._flushed
            self._tail = self._new_tail()
            if old is not None and used:
                self._tail.rows[:, :used] = old.rows[:, :used]
        self._connect()
        self.writable_to = self._flushed + self.spec.stride

    def tidy(self) -> None:
        """Moves a full tail into the blocks: from then on its stride is final. A step that fills it leaves that to the
        next one.
        """
        tail = self._tail
        if tail is None or self.length - self._flushed < self.spec.stride:
            return
        self._store(self.tail_layout.keys(tail.rows), self.tail_layout.values(tail.rows))
        if self.layout.quantised:  # what was rounded is still needed if the newest tokens are taken back
            self._previous, self._tail = tail, None
        self._connect()

    def _store(self, keys: Tensor, values: Tensor, reserve: int = 0) -> None:
        """Writes whole strides (G, n, D), which lie in one block, behind those that are flushed.

        reserve: tokens that are about to come, these among them.
        """
        n = keys.shape[1]
        number, row = divmod(self._flushed, BLOCK_ROWS)
        block = self._block(number, row, row + n, max(reserve, n))
        if row == 0 and self.layout.quantised and self.spec.centre:
            first = interleave_heads(keys[:, : self.spec.stride])
            block.centre = self.kernels.mean_keys(first, self.head_dim)
        rows = block.rows[:, row : row + n]
        self.layout.write_keys(rows, keys if block.centre is None else keys.float() - block.centre[:, None])
        self.layout.write_values(rows, values)
        block.filled = row + n
        self._flushed += n

    def _write_tail(self, tail: Tail, row: int, keys: Tensor, values: Tensor) -> None:
        rows = tail.rows[:, row : row + keys.shape[1]]
        self.tail_layout.write_keys(rows, keys)
        self.tail_layout.write_values(rows, values)

    def _block(self, number: int, row: int, end: int, tokens: int) -> Block:
        """The block of that number, with [row, end) writable; `tokens` are about to come."""
        if number == len(self._blocks):
            self._blocks.append(Block(self._new_rows(block_capacity(tokens if number == 0 else BLOCK_ROWS))))
        block = self._blocks[number]
        if not block.writable(row, end):
            capacity = block.capacity if end <= block.capacity else block_capacity(row + max(tokens, row))
            copy = Block(self._new_rows(capacity), row, block.centre)
            copy.rows[:, :row] = block.rows[:, :row]
            block = self._blocks[number] = copy
        return block

    # --- the index ----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Brings the index up to `length`. Does nothing in a dense layer, when short, or when done before."""
        self.tidy()
        end = self.policy.index_end(self.length, self.spec.stride)
        if end != self.index.end:
            self._set_index(self.index.moved(self, end))
        self._schedule()

    index_due = settle
    """What a step calls that finds `length` at `due`."""

    def _set_index(self, index: Index) -> None:
        self.index = index
        index.connect(self.kernels, self.view)
        self.view.indexed_to = index.end

    def crop(self, length: int) -> None:
        """Forgets every token from position `length` on.

        The store is then that of the first `length` tokens, bit for bit. Of int8 rows this is so at the end of any
        stride and in the last two; elsewhere the stride that is no longer whole stays rounded.
        """
        if not 0 <= length <= self.length:
            raise ArgumentError(f"length={length} is out of range; allowed: 0 to {self.length}")
        self.tidy()
        self.crops += 1
        end = min(self.index.end, self.policy.index_end(length, self.spec.stride))
        flushed = length // self.spec.stride * self.spec.stride
        if end < self.index.end:  # while the rows are there
            self._set_index(self.index.moved(self, end) if end else self.sampler.empty())
        if flushed < self._flushed:
            self._lay_out(flushed, length)
        self.view.length = length
        self._connect()
        self._schedule()

    def _lay_out(self, flushed: int, length: int) -> None:
        """Keeps the first `length` rows, those from `flushed` on, at most a stride, in the tail."""
        begin, tail = min(flushed, self._flushed), self._new_tail()
        if self._previous is not None and flushed < length and flushed + self.spec.stride == self._flushed:
            rows = self._previous.rows[:, : length - flushed]
            self._write_tail(tail, 0, self.tail_layout.keys(rows), self.tail_layout.values(rows))
        elif begin < length:
            keys, values = (torch.cat(x, 1) for x in zip(*self.blocks(begin, length), strict=True))
            if begin < flushed:
                self._store(keys[:, : flushed - begin], values[:, : flushed - begin])
            self._write_tail(tail, 0, keys[:, flushed - begin :], values[:, flushed - begin :])
        keep = self._previous is not None and flushed == self._flushed
        self._tail = tail if flushed < length else None
        self._previous, self._flushed = self._previous if keep else None, flushed
        number, row = divmod(flushed, BLOCK_ROWS)
        del self._blocks[number + (row > 0) :]
        if row and not self._blocks[number].shared:
            self._blocks[number].filled = row

    # --- forks --------------------------------------------------------------------------------------------------------

    def fork(self, config: Config | None = None, *, sampled: bool = True, kernels: Kernels | None = None) -> KVStore:
        """A store that starts with the same tokens and goes its own way. Copies nothing until one of the two writes.

        config, sampled: as of a new store, to go on by other settings. The index is kept where it does not depend on
        what has changed, else it is built anew when the next step or `settle` asks for it. Raises ArgumentError where
        the rows depend on it: for another kv_dtype, and for int8 rows another block or centre.
        kernels: of who goes on, if it is another one; then the index is copied.
        """
        self.tidy()
        other = object.__new__(KVStore)
        for name in (
            "kv_heads",
            "head_dim",
            "dtype",
            "layer",
            "first_head",
            "arena",
            "kernels",
            "tail_layout",
            "_flushed",
        ):
            setattr(other, name, getattr(self, name))
        if kernels is not None:
            other.kernels = kernels
        for block in self._blocks:
            block.shared = True
        other._blocks, other._tail, other._previous = list(self._blocks), self._tail, self._previous
        for tail in (self._tail, self._previous):
            if tail is not None:
                tail.shared = True
        self.writable_to = 0
        other._configure(self.config if config is None else config, self.policy.sampled if config is None else sampled)
        if other.spec.rows != self.spec.rows:
            raise ArgumentError(
                "rows that are there stay as they are: kv_dtype cannot change in a fork, nor block or centre of int8"
            )
        other.view.length = self.length
        if config is None:
            other.draw = self.draw
        if other.spec.stride != self.spec.stride:
            stride = other.spec.stride
            other._lay_out(self.length // stride * stride, self.length)
        other._connect()
        end = other.policy.index_end(self.length, other.spec.stride)
        if other.spec == self.spec and self.index.end:
            end = min(end, self.index.end)
            index = self.index
            if other.kernels is not self.kernels:
                index = other.sampler.restored(index.tensors(), index.end, other.arena)
            other._set_index(index if end == index.end else index.moved(other, end))
        other._schedule()
        return other

    def hold(
        self,
        blocks: list[Block],
        tail: Tail | None,
        previous: Tail | None,
        *,
        flushed: int,
        length: int,
        index: Index,
    ) -> None:
        """Makes an empty store hold what another one held (disk.py)."""
        self._blocks, self._tail, self._previous, self._flushed = blocks, tail, previous, flushed
        self.view.length = length
        self._connect()
        self._set_index(index)
        self._schedule()

    # --- what it is made of -------------------------------------------------------------------------------------------

    def _check(self, keys: Tensor, values: Tensor) -> None:
        for name, x in (("keys", keys), ("values", values)):
            if x.ndim != 3 or x.shape[0] != self.kv_heads or x.shape[2] != self.head_dim or x.shape != keys.shape:
                raise ArgumentError(
                    f"{name} has shape {tuple(x.shape)}; expected ({self.kv_heads}, T, {self.head_dim}), both alike"
                )
            if not x.dtype.is_floating_point:
                raise ArgumentError(f"{name} has dtype {x.dtype}; expected a floating point type")
        if keys.shape[1] < 1:
            raise ArgumentError(f"keys has shape {tuple(keys.shape)}; there must be at least one token")

    def _new_view(self) -> Any:
        place = {"layer": self.layer, "first_head": self.first_head}
        stride, sinks = self.spec.stride, self.config.sinks
        return self.kernels.make_view(self.layout.stored, self.kv_heads, self.head_dim, sinks, stride, **place)

    def _new_rows(self, capacity: int) -> Memory:
        return self.arena.empty((self.kv_heads, capacity, self.layout.width), self.layout.stored)

    def _new_tail(self) -> Tail:
        return Tail(self.arena.empty((self.kv_heads, self.spec.stride, self.tail_layout.width), self.dtype))

    def _connect(self) -> None:
        """Tells the kernels where the rows are."""
        self.writable_to = 0
        self._set_rows(self.view)

    def _set_rows(self, view: Any) -> None:
        self.kernels.set_rows(
            view,
            [block.rows for block in self._blocks],
            [block.centre for block in self._blocks if block.centre is not None],
            None if self._tail is None else self._tail.rows,
            self._flushed,
        )

    def _schedule(self) -> None:
        """`due`: the length at which there is something to index."""
        due = self.policy.next_due(self.index.end, self.spec.stride)
        self.due = _NEVER if due is None else due
