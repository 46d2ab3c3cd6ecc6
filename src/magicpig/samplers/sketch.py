"""Rows drawn in two phases: candidates by what a few bits of each coordinate say of their logits, then by these.

The query heads of a group share one sample.

Every stride has a centre of its own, the mean of its keys, and is final when it has been written. Sketches lie in
blocks beside those of the rows, and are shared and continued by the same rule: see store/blocks.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from magicpig.kernels import algorithm
from magicpig.kernels.arena import Arena, Memory, block_capacity
from magicpig.kernels.attend.reference import row_logits
from magicpig.kernels.base import BLOCK_ROWS, SKETCH_KEYS, Kernels, SketchSegment, View, as_rows, sketch_shapes
from magicpig.kernels.sketch.reference import (
    EXACT_SHARE,
    FIRST_CANDIDATES,
    TwoPhases,
    candidates_by_noise,
    first_rows,
    more_rows,
    score_noise,
)
from magicpig.samplers.base import Context, Costs, Fetch, Found, Index, Rows, Sampler
from magicpig.settings import DrawPolicy, IndexSpec
from magicpig.types import AttentionState, Sample

ROTATION_SEED = 0  # where a walk along the weights starts is random enough, and then all seeds share an index


def candidates_for(policy: DrawPolicy, body: int, rows: int, noise: float) -> int:
    """How many of `body` keys are drawn first, to draw `rows` of them. noise: of a score, see `score_noise`."""
    given = policy.candidates_for(body, rows)
    least = FIRST_CANDIDATES * rows if policy.epsilon and rows == first_rows_for(policy, body) else rows
    return max(least, candidates_by_noise(rows, noise) if given is None else given)


def first_rows_for(policy: DrawPolicy, body: int) -> int:
    """How many of `body` rows are drawn first: all, unless an epsilon says how many more."""
    return first_rows(policy.budget_for(body), policy.epsilon)


class _Block:
    """The sketch of up to 4096 keys. filled: of these, the ones that are final. segment: its memory."""

    __slots__ = ("filled", "memories", "segment")

    def __init__(self, memories: tuple[Memory, ...], first: int, filled: int = 0) -> None:
        self.memories = memories
        words, scales, centres = (memory.tensor for memory in memories)
        self.segment = SketchSegment(words, scales, centres, first, scales.shape[1])
        self.filled = filled

    def copy(self, other: _Block, count: int, stride: int) -> None:
        """Takes over the first `count` keys of another block."""
        blocks, strides = -(-count // SKETCH_KEYS), count // stride
        own, its = self.segment, other.segment
        own.words[:, :blocks] = its.words[:, :blocks]
        own.scales[:, : blocks * SKETCH_KEYS] = its.scales[:, : blocks * SKETCH_KEYS]
        own.centres[:, :strides] = its.centres[:, :strides]
        self.filled = count

    def trimmed(self, count: int, stride: int) -> dict[str, Tensor]:
        """What is there of the first `count` keys, by name: a copy, with zeros for what lies behind them."""
        blocks = -(-count // SKETCH_KEYS)
        strides = -(-blocks * SKETCH_KEYS // stride)
        words = self.segment.words[:, :blocks].clone()
        scales = self.segment.scales[:, : blocks * SKETCH_KEYS].clone()
        centres = self.segment.centres[:, :strides].clone()
        if count % SKETCH_KEYS:
            words[:, -1, :, count % SKETCH_KEYS :] = 0
        scales[:, count:] = 0
        centres[:, count // stride :] = 0
        return {"words": words, "scales": scales, "centres": centres}


class SketchIndex(Index):
    """The sketches of [0, end), block by block."""

    def __init__(self, sampler: Sketch, blocks: tuple[_Block, ...] = (), end: int = 0) -> None:
        self._sampler = sampler
        self.blocks = blocks
        self.end = end

    def moved(self, rows: Rows, end: int) -> SketchIndex:
        blocks, done = list(self.blocks[: -(-end // BLOCK_ROWS)]), min(end, self.end)
        while done < end:
            number, row = divmod(done, BLOCK_ROWS)
            first = number * BLOCK_ROWS
            stop = min(end, first + BLOCK_ROWS)
            if number == len(blocks):
                blocks.append(self._sampler.new_block(rows, first, stop - first))
            before = blocks[number]
            # Another store went on here, or there is no room.
            if before.filled != row or stop - first > before.segment.count:
                blocks[number] = self._sampler.new_block(rows, first, max(stop - first, 2 * row))
                blocks[number].copy(before, row, self._sampler.spec.stride)
            self._sampler.write(rows, done, stop, blocks[number].segment, row)
            blocks[number].filled = stop - first
            done = stop
        return SketchIndex(self._sampler, tuple(blocks), end)

    def counts(self) -> list[int]:
        """How many keys of each block are in this index."""
        return [min(self.end - i * BLOCK_ROWS, BLOCK_ROWS) for i in range(len(self.blocks))]

    def segments(self) -> list[SketchSegment]:
        """All of the sketch, by position."""
        parts = zip(self.blocks, self.counts(), strict=True)
        return [replace(block.segment, count=count) for block, count in parts]

    def noise(self, query: Tensor, head: int, *, scale: float, sinks: int) -> float:
        """Of the scores that the queries (R, D) of a kv head give its keys, in nats: see `score_noise`."""
        scales = torch.cat([segment.scales[head, : segment.count] for segment in self.segments()])
        return score_noise(query, scales, self._sampler.bits, scale=scale, sinks=sinks)

    def connect(self, kernels: Kernels, view: View) -> None:
        kernels.set_sketches(view, self.segments())

    def memories(self) -> Iterable[Memory]:
        for block in self.blocks:
            yield from block.memories

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for i, (block, count) in enumerate(zip(self.blocks, self.counts(), strict=True)):
            parts = block.trimmed(count, self._sampler.spec.stride)
            found |= {f"{i}.{name}": tensor for name, tensor in parts.items()}
        return found


class Sketch(Sampler):
    """`IndexSpec.bits` of each rotated coordinate; draws `DrawPolicy.budget` rows of its `candidates`, or as many as
    `epsilon` takes.
    """

    predicts = True
    shared = True

    def __init__(self, spec: IndexSpec, head_dim: int, kernels: Kernels) -> None:
        super().__init__(spec, head_dim, kernels)
        assert spec.bits is not None
        self.bits = spec.bits
        self.sketcher = kernels.make_sketcher(head_dim, self.bits, ROTATION_SEED)

    def apply(self, policy: DrawPolicy, view: View) -> None:
        self.kernels.set_sampler(view, self.sketcher)
        self.kernels.set_policy(
            view,
            budget=policy.budget,
            candidates=policy.candidates,
            epsilon=policy.epsilon or 0.0,
            seed=policy.seed,
        )

    def write(self, rows: Rows, begin: int, end: int, segment: SketchSegment, at: int) -> None:
        """Sketches the keys of [begin, end) as those from number `at` on of a segment."""
        pieces = rows.pieces(begin, end)
        self.kernels.sketch_into(
            segment,
            at,
            [own for own, _ in pieces],
            self.sketcher,
            stride=self.spec.stride,
            centred=self.spec.centre,
            row_centres=[centre for _, centre in pieces if centre is not None],
        )

    def new_block(self, rows: Rows, first: int, keys: int) -> _Block:
        """Room for so many keys from position `first` on; like rows, the first block begins small and doubles."""
        shapes = self._shapes(rows.kv_heads, block_capacity(keys) if first == 0 else BLOCK_ROWS)
        return _Block(tuple(rows.arena.empty(*each) for each in shapes), first)

    def _shapes(self, kv_heads: int, keys: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        return sketch_shapes(kv_heads, max(keys, self.spec.stride), self.sketcher, self.spec.stride)

    def empty(self) -> SketchIndex:
        return SketchIndex(self)

    def restored(self, tensors: Mapping[str, Tensor], end: int, arena: Arena) -> SketchIndex:
        blocks = []
        for i, first in enumerate(range(0, end, BLOCK_ROWS)):
            parts = tuple(arena.hold(tensors[f"{i}.{name}"]) for name in ("words", "scales", "centres"))
            blocks.append(_Block(parts, first, min(end - first, BLOCK_ROWS)))
        return SketchIndex(self, tuple(blocks), end)

    def nbytes(self, costs: Costs, keys: int) -> int:
        capacity = BLOCK_ROWS if keys > BLOCK_ROWS else block_capacity(keys)
        block = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._shapes(costs.kv_heads, capacity))
        return -(-keys // BLOCK_ROWS) * block

    def prepare(self, query: Tensor) -> Tensor:
        return self.kernels.rotate(query, self.sketcher)

    def found(
        self,
        query: Tensor,
        head: int,
        index: Index,
        policy: DrawPolicy,
        context: Context,
        fetch: Fetch,
        rows: int | None = None,
    ) -> list[Found]:
        assert isinstance(index, SketchIndex)
        body, softcap = context.end - context.sinks, context.softcap or 0.0
        larger = None
        if rows is None or rows <= EXACT_SHARE * body:
            sample, keys, values, larger = self._drawn(query, head, index, policy, context, fetch, rows)
        else:
            ids = torch.arange(context.sinks, context.end, dtype=torch.int64, device="cpu")
            sample = Sample(ids, torch.zeros(body, dtype=torch.float32, device="cpu"))
            keys, values = fetch(ids)
        number = torch.arange(len(keys), dtype=torch.int64, device="cpu")
        blocks, log_u = as_rows(keys, values).split(BLOCK_ROWS), sample.log_u
        states = [self.kernels.attend(q, blocks, number, log_u, scale=context.scale, softcap=softcap) for q in query]
        return [Found(sample, keys, values, state, larger) for state in states]

    def _drawn(
        self,
        query: Tensor,
        head: int,
        index: SketchIndex,
        policy: DrawPolicy,
        context: Context,
        fetch: Fetch,
        rows: int | None,
    ) -> tuple[Sample, Tensor, Tensor, Callable[[Tensor], int]]:
        """The sample of one kv head, its keys, its values, and how many rows are drawn where errors are too large."""
        body, softcap = context.end - context.sinks, context.softcap or 0.0
        rows = first_rows_for(policy, body) if rows is None else rows
        noise = index.noise(query, head, scale=context.scale, sinks=context.sinks)
        candidates = candidates_for(policy, body, rows, noise)
        place: dict[str, Any] = {
            "seed": policy.seed,
            "layer": context.layer,
            "head": context.first_head + head,
            "position": context.position,
        }
        rule: dict[str, Any] = {"scale": context.scale, "softcap": softcap}
        weighed = self.kernels.weigh(
            query, index.segments(), head, self.sketcher, stride=self.spec.stride, sinks=context.sinks, **rule
        )
        first = self.kernels.draw(weighed.weights, max(rows, candidates), sinks=context.sinks, **place)
        keys, values = fetch(first.ids)
        logits = row_logits(query, keys, scale=context.scale, softcap=context.softcap)

        def larger(errors: Tensor) -> int:
            assert policy.epsilon is not None
            return more_rows(rows, drawn, logits, errors, policy.epsilon)

        if candidates <= rows:
            drawn = TwoPhases(first.ids, first.log_u, first.ids, first.log_u, None, first.step)
            return Sample(first.ids, first.log_u), keys, values, larger
        number = torch.arange(len(keys), dtype=torch.int64, device="cpu")
        blocks = as_rows(keys, values).split(BLOCK_ROWS)
        weights = self.kernels.weigh_rows(query, blocks, number, first.log_u, **rule)
        again = self.kernels.draw(weights, rows, phase=2, **place)
        sample = Sample(first.ids[again.ids], first.log_u[again.ids] + again.log_u)
        drawn = TwoPhases(sample.ids, sample.log_u, first.ids, first.log_u, weights, again.step)
        return sample, keys[again.ids], values[again.ids], larger

    def reference(
        self, query: Tensor, keys: Tensor, values: Tensor, policy: DrawPolicy, context: Context
    ) -> tuple[AttentionState, list[Sample]]:
        body = context.end - context.sinks
        budget = policy.budget_for(body)
        return algorithm.attend_sketch(
            query,
            keys,
            values,
            bits=self.bits,
            budget=budget,
            candidates=policy.candidates_for(body, budget),
            epsilon=policy.epsilon,
            sinks=context.sinks,
            recent=keys.shape[1] - context.end,
            stride=self.spec.stride,
            seed=policy.seed,
            layer=context.layer,
            first_head=context.first_head,
            centre=self.spec.centre,
            scale=context.scale,
            softcap=context.softcap,
        )
