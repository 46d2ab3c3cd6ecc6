"""What attention read for the newest token of an answer, layer by layer: for those who want to watch."""

from __future__ import annotations

from dataclasses import dataclass

from magicpig.engine.runner import SequenceState, Window
from magicpig.store import KVStore


@dataclass(frozen=True)
class Glance:
    """rows_share: by layer, of its keys, the share that a head read, mean over heads; 1 where attention is exact.

    predicted_error: mean of the sampled heads that could say, or None. read_bytes: of keys and values, at most;
    full_bytes: what full attention reads. kv_bytes, index_bytes: held now.
    """

    rows_share: tuple[float, ...]
    predicted_error: float | None
    read_bytes: int
    full_bytes: int
    kv_bytes: int
    index_bytes: int


class Watch:
    """Glances at one answer, token by token. query_heads: of a layer."""

    def __init__(self, query_heads: int) -> None:
        self._query_heads = query_heads
        self._before: dict[int, tuple[int, int]] = {}  # by layer: rows that were sampled, and of how many
        self._predicted = (0, 0.0)

    def glance(self, state: SequenceState) -> Glance:
        """What has been read since the last one."""
        shares, read, full, kv, index = [], 0.0, 0, 0, 0
        count, total = 0, 0.0
        for number, layer in enumerate(state.layers):
            if layer is None or isinstance(layer, Window):
                shares.append(1.0)
                held = 0 if layer is None else layer.nbytes
                read, full, kv = read + held, full + held, kv + held
                continue
            share = self._share(number, layer)
            length, body, use = max(1, layer.length), layer.body, layer.nbytes()
            shares.append((share * body + length - body) / length)
            # Heads that draw for themselves may read as many rows each.
            drawn = share if layer.sampler.shared else min(1.0, share * self._query_heads / layer.kv_heads)
            row = layer.kv_heads * layer.layout.bytes_read
            read += row * (drawn * body + length - body)
            full, kv, index = full + row * length, kv + use.rows, index + use.index
            errors = layer.stats.predicted
            if layer.sampler.predicts:
                count, total = count + errors.count, total + errors.sum
        new = count - self._predicted[0]
        error = (total - self._predicted[1]) / new if new > 0 else None
        self._predicted = count, total
        return Glance(tuple(shares), error, round(read), full, kv, index)

    def _share(self, number: int, store: KVStore) -> float:
        stats = store.stats
        sampled, body = self._before.get(number, (0, 0))
        self._before[number] = stats.sampled_rows, stats.body_rows
        new = stats.body_rows - body
        return (stats.sampled_rows - sampled) / new if new > 0 else 1.0
