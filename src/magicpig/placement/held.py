"""What a device holds of a store: sketches or all rows of its body, and the rows that are never drawn.

Blocks of a store are never rewritten, so what was sent once stays true; only what has come is sent. Rows that are never
drawn come from the device itself, step by step; after anything else that was done to a store they are sent anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from magicpig.kernels.base import BLOCK_ROWS, SKETCH_KEYS, padded
from magicpig.placement.device import Device
from magicpig.samplers.sketch import SketchIndex
from magicpig.store import KVStore

ROOM = 256  # rows that a window grows by


def send(device: Device, name: str, content: Tensor) -> Tensor:
    """A tensor of the host, copied to the device: for what the device does from then on."""
    above = device.buffer(name, content.shape, content.dtype, pinned=True)
    below = device.buffer(f"{name} on the device", content.shape, content.dtype)
    device.host("fill", lambda: above.tensor.copy_(content), writes=[above])
    device.copy("up", above, below)
    device.wait("compute", device.record("up"))
    return device.launch("compute", "receive", lambda: below.tensor, reads=[below])


def as_device_rows(store: KVStore, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Rows (G, end - begin, 2 * Dp) of a store's tokens, key and value side by side, in host memory."""
    D, dim, at = store.head_dim, padded(store.head_dim), 0
    rows = torch.zeros(store.kv_heads, end - begin, 2 * dim, dtype=dtype, device="cpu")
    for keys, values in store.blocks(begin, end, dtype):
        rows[:, at : at + keys.shape[1], :D] = keys
        rows[:, at : at + keys.shape[1], dim : dim + D] = values
        at += keys.shape[1]
    return rows


class Held:
    """Of one store. Blocks are known by identity, and by how much of each has been sent."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.rows = torch.empty(0, dtype=torch.float32, device="cpu")
        self.index: tuple[Tensor, Tensor, Tensor] = (self.rows, self.rows, self.rows)
        self.window = Window(device)
        self._sent: list[tuple[Any, int]] = []
        self._rows_sent: list[tuple[Any, int]] = []

    def follow(self, store: KVStore, *, rows: bool, index: bool) -> None:
        """Sends what the store has and the device lacks."""
        if index and store.body and isinstance(store.index, SketchIndex):
            self._follow_index(store.index)
            if rows:
                self._follow_rows(store, store.index)

    def _follow_index(self, index: SketchIndex) -> None:
        segments, counts = index.segments(), index.counts()
        first = segments[0]
        per_block, stride = BLOCK_ROWS // SKETCH_KEYS, first.scales.shape[1] // first.centres.shape[1]
        if len(self.index[0].shape) != 4 or self.index[0].shape[1] < len(segments) * per_block:
            room = 1 << (len(segments) - 1).bit_length()
            shapes = (
                ((first.words.shape[0], room * per_block, *first.words.shape[2:]), torch.int32),
                ((first.words.shape[0], room * BLOCK_ROWS), torch.float16),
                ((first.words.shape[0], -(-room * BLOCK_ROWS // stride), first.centres.shape[2]), torch.bfloat16),
            )
            words, scales, centres = (self._device.buffer("index", s, dtype).tensor for s, dtype in shapes)
            self.index, self._sent = (words, scales, centres), []
        words, scales, centres = self.index
        for i, (block, segment, count) in enumerate(zip(index.blocks, segments, counts, strict=True)):
            known = self._sent[i] if i < len(self._sent) else (None, 0)
            before = known[1] if known[0] is block else 0
            if before < count:
                begin, end = before // SKETCH_KEYS, -(-count // SKETCH_KEYS)
                least, most = before // stride, -(-count // stride)
                parts = [
                    (words, i * per_block + begin, segment.words[:, begin:end]),
                    (
                        scales,
                        i * BLOCK_ROWS + begin * SKETCH_KEYS,
                        segment.scales[:, begin * SKETCH_KEYS : end * SKETCH_KEYS],
                    ),
                    (centres, i * BLOCK_ROWS // stride + least, segment.centres[:, least:most]),
                ]
                for to, at, content in parts:
                    to[:, at : at + content.shape[1]] = send(self._device, "sketches", content.contiguous())
            self._sent[i : i + 1] = [(block, count)]
        del self._sent[len(segments) :]

    def _follow_rows(self, store: KVStore, index: SketchIndex) -> None:
        # Rows are as final as their sketches: after a crop both come anew, and the sketches in another block.
        end = store.indexed_to
        if self.rows.ndim != 3 or self.rows.shape[1] < end:
            room = max(BLOCK_ROWS, 1 << (end - 1).bit_length())
            shape = (store.kv_heads, room, 2 * padded(store.head_dim))
            self.rows, self._rows_sent = self._device.buffer("rows", shape, row_dtype(store)).tensor, []
        for i, (block, count) in enumerate(zip(index.blocks, index.counts(), strict=True)):
            known = self._rows_sent[i] if i < len(self._rows_sent) else (None, 0)
            begin, stop = i * BLOCK_ROWS + (known[1] if known[0] is block else 0), i * BLOCK_ROWS + count
            if begin < stop:
                content = as_device_rows(store, begin, stop, row_dtype(store))
                self.rows[:, begin:stop] = send(self._device, "rows", content)
            self._rows_sent[i : i + 1] = [(block, count)]
        del self._rows_sent[len(index.blocks) :]


def row_dtype(store: KVStore) -> torch.dtype:
    """What rows are in on a device: as the model has them, and float32 where they are kept in int8."""
    return torch.float32 if store.layout.quantised else store.dtype


class Window:
    """The rows of a store that are never drawn: `sinks` of them, then those of the positions [first, end).

    tensor: (G, room, 2 * Dp), key and value side by side.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._forget()

    def _forget(self) -> None:
        self.tensor = torch.empty(0, 0, 0, dtype=torch.float32, device="cpu")
        self.sinks = self.first = self.end = 0
        self._crops = -1

    @property
    def count(self) -> int:
        return self.sinks + self.end - self.first

    def follow(self, store: KVStore) -> None:
        """Brings the window up to what the store has, with room for one row more."""
        sinks, first = (store.policy.sinks, store.indexed_to) if store.body else (0, 0)
        # Where rows are rounded, those of a stride change when it is full.
        if self._crops != store.crops or store.layout.quantised or first < self.first or store.length < self.end:
            self._forget()
        dtype, before, kept = row_dtype(store), self.tensor, max(0, self.end - first)
        room = sinks + max(self.end, store.length) - first + 1
        if before.shape[1] < room or (sinks, first) != (self.sinks, self.first):
            shape = [store.kv_heads, -(-(room + store.spec.stride) // ROOM) * ROOM, 2 * padded(store.head_dim)]
            self.tensor = self._device.buffer("window", shape, dtype).tensor
            if before.shape[1] and kept:
                begin = self.sinks + first - self.first
                self.tensor[:, :sinks] = before[:, :sinks]
                self.tensor[:, sinks : sinks + kept] = before[:, begin : begin + kept]
        if not kept and sinks:
            self.tensor[:, :sinks] = send(self._device, "sinks", as_device_rows(store, 0, sinks, dtype))
        self.sinks, self.first, self.end = sinks, first, max(self.end, first)
        if self.end < store.length:
            content = as_device_rows(store, self.end, store.length, dtype)
            at = sinks + self.end - first
            self.tensor[:, at : at + content.shape[1]] = send(self._device, "rows", content)
            self.end = store.length
        self._crops = store.crops

    def put(self, keys: Tensor, values: Tensor) -> None:
        """Writes a row behind the last, keys and values (G, D) of the device; it counts when the store has it, too."""
        row = self.tensor[:, self.count]
        D, dim = keys.shape[1], row.shape[1] // 2
        row.zero_()
        row[:, :D], row[:, dim : dim + D] = keys, values
