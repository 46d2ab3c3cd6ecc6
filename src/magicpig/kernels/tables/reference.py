"""Hash tables in plain PyTorch: codes -> buckets -> the ids that share a bucket with a query often enough.

Knows codes and ids; does not know what was hashed, nor how probable a collision was.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from magicpig.errors import ArgumentError


class Tables(NamedTuple):
    """``L`` hash tables over the ids 0 .. n-1.

    Bucket ``c`` of table ``t`` is ``ids[t, offsets[t, c] : offsets[t, c + 1]]``.
    """

    offsets: Tensor
    """int64 (L, 2**K + 1), starting at 0 and ending at n."""
    ids: Tensor
    """int64 (L, n), ascending within a bucket."""


def build(codes: Tensor, K: int) -> Tables:
    """Sort the ids 0 .. n-1 into buckets by their ``codes`` (n, L), int64 in [0, 2**K).

    Raises ArgumentError for a code outside that range.
    """
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**K:
        bounds = f"{int(codes.min())} .. {int(codes.max())}"
        raise ArgumentError(f"codes must lie in 0 .. {2**K - 1} for K = {K}, got {bounds}")
    by_table = codes.T
    counts = torch.zeros(len(by_table), 2**K + 1, dtype=torch.int64, device=codes.device)
    counts.scatter_add_(1, by_table + 1, torch.ones_like(by_table))
    return Tables(offsets=counts.cumsum(1), ids=by_table.argsort(dim=1, stable=True))


def extend(tables: Tables, newer: Tables) -> Tables:
    """Tables of the concatenation of both sets; the ids of ``newer`` continue after those of ``tables``."""
    buckets = torch.cat([_bucket_of_each(tables), _bucket_of_each(newer)], dim=1)
    ids = torch.cat([tables.ids, newer.ids + tables.ids.shape[1]], dim=1)
    return Tables(tables.offsets + newer.offsets, ids.gather(1, buckets.argsort(dim=1, stable=True)))


def shorten(tables: Tables, count: int) -> Tables:
    """Tables of the first ``count`` ids."""
    kept = tables.ids < count
    before = torch.nn.functional.pad(kept.to(torch.int64).cumsum(1), (1, 0))
    return Tables(before.gather(1, tables.offsets), tables.ids[kept].view(len(kept), count))


def lookup(query_codes: Tensor, offsets: Tensor, ids: Tensor, min_hits: int) -> Tensor:
    """Ids found in the query's bucket of at least ``min_hits`` tables, int64 ascending.

    ``query_codes`` is int64 (L,); ``offsets`` and ``ids`` are as in `Tables`.
    """
    tables = Tables(offsets, ids)
    found = [_bucket(tables, table, int(code)) for table, code in enumerate(query_codes)]
    hits = torch.bincount(torch.cat(found), minlength=ids.shape[1])
    return _at_least(hits, min_hits)


def lookup_brute_force(query_codes: Tensor, key_codes: Tensor, min_hits: int) -> Tensor:
    """What `lookup` means, without tables: ``key_codes`` is (n, L), ``query_codes`` (L,)."""
    return _at_least((key_codes == query_codes).sum(-1), min_hits)


def _bucket(tables: Tables, table: int, code: int) -> Tensor:
    start, stop = tables.offsets[table, code], tables.offsets[table, code + 1]
    return tables.ids[table, start:stop]


def _bucket_of_each(tables: Tables) -> Tensor:
    """Bucket that each entry of ``tables.ids`` sits in, (L, n)."""
    places = torch.arange(tables.ids.shape[1], dtype=torch.int64, device=tables.ids.device)
    places = places.expand_as(tables.ids).contiguous()
    return torch.searchsorted(tables.offsets, places, right=True) - 1


def _at_least(hits: Tensor, min_hits: int) -> Tensor:
    # min_hits = 0 would sample keys that were never looked at.
    if min_hits < 1:
        raise ArgumentError(f"min_hits must be at least 1, got {min_hits}")
    return (hits >= min_hits).nonzero().squeeze(-1)
