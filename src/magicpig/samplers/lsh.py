"""MagicPIG's sampler (arXiv 2410.16179): keys that collide with the query in several hash tables.

A segment of 65536 positions has one centre, subtracted before hashing: the mean of its first strides, a power of two of
them and 16 at most. So it is a function of how many strides are indexed, and hardly ever changes when there are more.
The tables of a segment are two: of its whole 4096 keys, and of the younger ones, which are rebuilt with every stride.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from magicpig.errors import ArgumentError
from magicpig.kernels import algorithm
from magicpig.kernels.arena import Arena, Memory
from magicpig.kernels.attend.reference import merge
from magicpig.kernels.base import BLOCK_ROWS, SEGMENT_ROWS, Kernels, Segment, View, as_rows, load_kernels
from magicpig.kernels.hash.reference import centre_strides
from magicpig.samplers.base import Context, Costs, Fetch, Found, Index, Rows, Sampler
from magicpig.settings import DrawPolicy, IndexSpec
from magicpig.types import AttentionState, Sample

YOUNG = 4096  # keys


@dataclass(frozen=True)
class _Tables:
    """The tables of consecutive keys, and the memory that they lie in."""

    segment: Segment
    memories: tuple[Memory, Memory]

    @classmethod
    def of(cls, segment: Segment, arena: Arena) -> _Tables:
        return cls(segment, (arena.hold(segment.offsets), arena.hold(segment.ids)))


@dataclass(frozen=True)
class _Segment:
    """[first, first + count): centre (G, D) float32 or None, and the tables of old and of young keys."""

    first: int
    count: int
    centre: Memory | None
    old: _Tables | None
    young: _Tables | None

    @property
    def tables(self) -> list[_Tables]:
        return [tables for tables in (self.old, self.young) if tables is not None]


class TableIndex(Index):
    """Hash tables of [0, end), in segments."""

    def __init__(self, sampler: Lsh, segments: tuple[_Segment, ...] = ()) -> None:
        self._sampler = sampler
        self.segments = segments
        self.end = segments[-1].first + segments[-1].count if segments else 0

    def moved(self, rows: Rows, end: int) -> TableIndex:
        segments = []
        for i, first in enumerate(range(0, end, SEGMENT_ROWS)):
            before = self.segments[i] if i < len(self.segments) else None
            count = min(end - first, SEGMENT_ROWS)
            if before is None or before.count != count:
                before = self._segment(rows, before or _Segment(first, 0, None, None, None), count)
            segments.append(before)
        return TableIndex(self._sampler, tuple(segments))

    def _segment(self, rows: Rows, before: _Segment, count: int) -> _Segment:
        first, centre = before.first, before.centre
        old, young = before.old, before.young
        stride, kernels = self._sampler.spec.stride, self._sampler.kernels
        strides = centre_strides(count // stride, stride)
        if self._sampler.spec.centre and (centre is None or strides != centre_strides(before.count // stride, stride)):
            ((piece, kept),) = rows.pieces(first, first + strides * stride)
            centre = rows.arena.hold(kernels.mean_keys(piece, self._sampler.head_dim, kept))
            old = young = None  # were hashed around another one

        def join(a: Segment | None, begin: int, end: int) -> Segment | None:
            """The tables of a, and of the keys [begin, end) behind them."""
            if begin == end:
                return a
            new = self._sampler.hashed(rows, begin, end, None if centre is None else centre.tensor)
            return new if a is None else kernels.extend(a, new)

        whole = count // YOUNG * YOUNG
        a = None if old is None else old.segment
        b = None if young is None else young.segment
        if a is not None and whole < a.count:
            a, b = kernels.shorten(a, whole) if whole else None, None
        elif b is not None and whole > (a.count if a is not None else 0):
            a, b = b if a is None else kernels.extend(a, b), None
        a = join(a, first + (a.count if a is not None else 0), first + whole)
        if b is not None and count - whole < b.count:
            b = kernels.shorten(b, count - whole) if count > whole else None
        else:
            b = join(b, first + whole + (b.count if b is not None else 0), first + count)

        def hold(tables: Segment | None, had: _Tables | None) -> _Tables | None:
            if tables is None or (had is not None and had.segment is tables):
                return None if tables is None else had
            return _Tables.of(tables, rows.arena)

        return _Segment(first, count, centre, hold(a, old), hold(b, young))

    def connect(self, kernels: Kernels, view: View) -> None:
        kernels.set_segments(view, self.tables)

    @property
    def tables(self) -> list[Segment]:
        """All tables, by position."""
        return [tables.segment for segment in self.segments for tables in segment.tables]

    def memories(self) -> Iterable[Memory]:
        for segment in self.segments:
            yield from (segment.centre,) if segment.centre is not None else ()
            for tables in segment.tables:
                yield from tables.memories

    def tensors(self) -> dict[str, Tensor]:
        found = {}
        for i, segment in enumerate(self.segments):
            if segment.centre is not None:
                found[f"{i}.centre"] = segment.centre.tensor
            for name, tables in (("old", segment.old), ("young", segment.young)):
                if tables is not None:
                    found[f"{i}.{name}.offsets"] = tables.segment.offsets
                    found[f"{i}.{name}.ids"] = tables.segment.ids
        return found


class Lsh(Sampler):
    """K bits a table, L tables; with `DrawPolicy.min_hits`, the tables in which a key must collide."""

    predicts = True

    def __init__(self, spec: IndexSpec, head_dim: int, kernels: Kernels) -> None:
        super().__init__(spec, head_dim, kernels)
        self.K, self.L, self.seed = (_given(value) for value in (spec.K, spec.L, spec.seed))
        self.hasher = kernels.make_sampler(head_dim, self.K, self.L, self.seed)

    def check(self, policy: DrawPolicy) -> None:
        if not 1 <= policy.min_hits <= self.L:
            raise ArgumentError(f"min_hits={policy.min_hits} is out of range; allowed: 1 to L={self.L}")

    def apply(self, policy: DrawPolicy, view: View) -> None:
        self.kernels.set_sampler(view, self.hasher)
        self.kernels.set_policy(view, seed=policy.seed, law=_law(self.kernels.NAME, self.K, self.L, policy.min_hits))

    def hashed(self, rows: Rows, begin: int, end: int, centre: Tensor | None) -> Segment:
        """The tables of [begin, end), hashed minus a centre (G, D)."""
        pieces = rows.pieces(begin, end)
        off = [centre if kept is None else (-kept if centre is None else centre - kept) for _, kept in pieces]
        codes = self.kernels.hash_rows(
            [own for own, _ in pieces], self.hasher, [each for each in off if each is not None]
        )
        return self.kernels.build(codes, self.K, begin, centre)

    def empty(self) -> TableIndex:
        return TableIndex(self)

    def restored(self, tensors: Mapping[str, Tensor], end: int, arena: Arena) -> TableIndex:
        segments = []
        for i, first in enumerate(range(0, end, SEGMENT_ROWS)):
            count = min(end - first, SEGMENT_ROWS)
            whole = count // YOUNG * YOUNG
            centre = tensors.get(f"{i}.centre")
            parts: list[_Tables | None] = []
            for name, begin in (("old", first), ("young", first + whole)):
                offsets, ids = tensors.get(f"{i}.{name}.offsets"), tensors.get(f"{i}.{name}.ids")
                if offsets is None or ids is None:
                    parts.append(None)
                else:
                    parts.append(_Tables.of(Segment(offsets, ids, begin, centre), arena))
            segments.append(_Segment(first, count, None if centre is None else arena.hold(centre), *parts))
        return TableIndex(self, tuple(segments))

    def nbytes(self, costs: Costs, keys: int) -> int:
        tables, buckets = 2 * -(-keys // SEGMENT_ROWS), 1 << self.K
        return costs.kv_heads * (self.L * (2 * keys + tables * 4 * (buckets + 1)) + tables * 4 * costs.head_dim)

    def transient(self, costs: Costs, keys: int) -> int:
        # Codes, and the new tables of one segment while the old ones are still there.
        keys = min(keys, SEGMENT_ROWS)
        return costs.kv_heads * self.L * (2 * 2 * keys + 2 * 4 * ((1 << self.K) + 1))

    def leaves_out(self, policy: DrawPolicy, body: int) -> bool:
        return True

    def prepare(self, query: Tensor) -> Tensor:
        return self.kernels.hash_queries(query, self.hasher)

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
        assert isinstance(index, TableIndex)
        law = _law(self.kernels.NAME, self.K, self.L, policy.min_hits)
        found = []
        for q, codes in zip(query, self.prepare(query), strict=True):
            parts = [self._found(q, codes, head, tables, law, policy, context, fetch) for tables in index.tables]
            sample = Sample(*(torch.cat(x) for x in zip(*((p.sample.ids, p.sample.log_u) for p in parts), strict=True)))
            keys, values = (torch.cat(x) for x in zip(*((p.keys, p.values) for p in parts), strict=True))
            found.append(Found(sample, keys, values, merge([p.state for p in parts])))
        return found

    def _found(
        self,
        query: Tensor,
        codes: Tensor,
        head: int,
        tables: Segment,
        law: Any,
        policy: DrawPolicy,
        context: Context,
        fetch: Fetch,
    ) -> Found:
        """Of one query head (D,) in one set of tables."""
        ids = self.kernels.lookup(codes, tables, head, policy.min_hits)
        ids = ids[ids >= context.sinks]
        keys, values = fetch(ids)
        centre = torch.zeros_like(query) if tables.centre is None else tables.centre[head]
        state, log_u = self.kernels.attend_hashed(
            query,
            as_rows(keys, values).split(BLOCK_ROWS),
            torch.arange(len(ids), dtype=torch.int64, device="cpu"),
            law,
            scale=context.scale,
            centres=centre[None],
            offsets=context.scale * (centre @ query)[None],
            softcap=context.softcap or 0.0,
        )
        return Found(Sample(ids, log_u), keys, values, state)

    def reference(
        self, query: Tensor, keys: Tensor, values: Tensor, policy: DrawPolicy, context: Context
    ) -> tuple[AttentionState, list[Sample]]:
        return algorithm.attend_lsh(
            query,
            keys,
            values,
            K=self.K,
            L=self.L,
            min_hits=policy.min_hits,
            sinks=context.sinks,
            recent=keys.shape[1] - context.end,
            stride=self.spec.stride,
            seed=self.seed,
            centre=self.spec.centre,
            scale=context.scale,
            softcap=context.softcap,
        )


def _given(value: int | None) -> int:
    assert value is not None
    return value


@lru_cache(maxsize=64)
def _law(kernels: str, K: int, L: int, min_hits: int) -> Any:
    return load_kernels(kernels).make_law(K, L, min_hits)
