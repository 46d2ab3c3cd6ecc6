"""How many bytes a request will need, said before it is read, and whether the machine has them.

Counts what `KVStore` allocates, block by block and segment by segment. Knows sizes only: no tensors, no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from magicpig.config import Config
from magicpig.errors import InsufficientMemoryError
from magicpig.kernels import native
from magicpig.kernels.pages import PAGE_ROWS
from magicpig.kernels.reference import index_end
from magicpig.machine import free_memory
from magicpig.store import block_capacity
from magicpig.types import MemoryUse

# Bytes for each query head and key while rows are chosen by logits (samplers.py), at the peak; measured, rounded up.
DRAWING = {"topk": 16, "uniform-tail": 20, "oracle": 64, "oracle-replacement": 64, "quest": 8}


@dataclass(frozen=True)
class LayerShape:
    """What a layer keeps of each token: D-wide keys and values of G heads.

    sampled: whether it may be indexed. window: the most tokens it keeps (sliding window attention), or None.
    query_heads: H, if they are more than the kv heads; matters only to samplers that compute a logit for each.
    """

    kv_heads: int
    head_dim: int
    sampled: bool
    window: int | None = None
    query_heads: int | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """Upper bounds in bytes for `sequences` sequences of `tokens` tokens.

    kept: keys, values and indexes at the end. transient: what indexing one layer, or drawing from it, needs besides.
    """

    sequences: int
    tokens: int
    kept: MemoryUse
    transient: int

    @property
    def total(self) -> int:
        return self.kept.total + self.transient


def plan(
    layers: Sequence[LayerShape], config: Config, *, sequences: int, tokens: int, dtype: torch.dtype
) -> MemoryPlan:
    """The memory that `sequences` sequences will need once each has `tokens` tokens, prompt and answer together.

    layers: all of the model, in order. dtype: of the stored keys and values.
    Raises ValueError for sizes below 1 and unsupported dtypes.
    """
    if sequences < 1 or tokens < 1:
        raise ValueError(f"sequences={sequences} and tokens={tokens} must be at least 1")
    native.dtype_code(dtype)
    kept, transient = MemoryUse(0, 0), 0
    for index, layer in enumerate(layers):
        own = config.of_layer(index)
        kept += _kept(layer, own, tokens, dtype)
        transient = max(transient, _transient(layer, own, tokens, dtype))
    return MemoryPlan(sequences, tokens, MemoryUse(kept.rows * sequences, kept.index * sequences), transient)


def check(plan: MemoryPlan, free: int | None = None) -> None:
    """Raises InsufficientMemoryError, one line, when the plan needs more than `free` bytes (default: `free_memory`)."""
    free = free_memory() if free is None else free
    if plan.total > free:
        many = f"{plan.sequences} sequences of " if plan.sequences > 1 else ""
        raise InsufficientMemoryError(
            f"{many}{plan.tokens} tokens need {_gib(plan.total)} (keys and values {_gib(plan.kept.rows)}, index "
            f"{_gib(plan.kept.index)}, indexing {_gib(plan.transient)}) and {_gib(free)} are free; "
            "less would do with a shorter prompt, fewer max_new_tokens, kv_dtype='int8', or for lsh a lower L"
        )


def _kept(layer: LayerShape, config: Config, tokens: int, dtype: torch.dtype) -> MemoryUse:
    if layer.window is not None:  # the model library's own cache, without padding
        rows = layer.kv_heads * min(tokens, layer.window) * 2 * layer.head_dim * dtype.itemsize
        return MemoryUse(rows, 0)
    full, rest = divmod(tokens, native.BLOCK_ROWS)
    capacity = (full + (rest > 0)) * native.BLOCK_ROWS if full else block_capacity(rest)
    stored = torch.int8 if config.kv_dtype == "int8" else dtype
    rows = layer.kv_heads * capacity * native.row_width(layer.head_dim, stored) * stored.itemsize
    if stored == torch.int8:  # until they fill a block, rows are kept as they came
        rows += layer.kv_heads * config.block * native.row_width(layer.head_dim, dtype) * dtype.itemsize
    body = _body(layer, config, tokens)
    if body == 0:
        return MemoryUse(rows, 0)
    if config.sampler == "quest":
        pages = -(-body // PAGE_ROWS)
        return MemoryUse(rows, layer.kv_heads * pages * 2 * layer.head_dim * dtype.itemsize)
    if config.sampler == "sketch":
        return MemoryUse(rows, layer.kv_heads * _sketch_bytes(layer, config, body))
    if config.sampler != "lsh":
        return MemoryUse(rows, 0)
    # One for each SEGMENT_ROWS keys, and one more may be growing.
    segments = -(-body // native.SEGMENT_ROWS) + 1
    tables = layer.kv_heads * config.L
    return MemoryUse(rows, tables * (2 * body + segments * 4 * (2**config.K + 1)))


def _transient(layer: LayerShape, config: Config, tokens: int, dtype: torch.dtype) -> int:
    """Codes and the new index of one segment while the old one is still there; for Quest, keys side by side.

    For samplers for comparison, also what they compute of every key in a step.
    """
    body = _body(layer, config, tokens)
    if config.sampler == "sketch":
        return layer.kv_heads * _sketch_bytes(layer, config, min(body, native.SEGMENT_ROWS)) if body else 0
    if config.sampler != "lsh":
        drawing = (layer.query_heads or layer.kv_heads) * body * DRAWING.get(config.sampler, 0)
        pages = layer.kv_heads * body * layer.head_dim * dtype.itemsize if config.sampler == "quest" else 0
        return max(drawing, pages)
    body = min(body, native.SEGMENT_ROWS)
    return layer.kv_heads * config.L * (2 * 2 * body + 4 * (2**config.K + 1)) if body else 0


def _sketch_bytes(layer: LayerShape, config: Config, keys: int) -> int:
    """Of one kv head: words, scales and centres of whole blocks. Segments are as many as for tables."""
    bits = config.sketch_bits(layer.head_dim)
    planes = (2, 1) if bits == 3 else (bits,)
    words = sum(-(-layer.head_dim * width // 32) for width in planes)
    segments = -(-keys // native.SEGMENT_ROWS) + 1
    centres = -(-keys // config.block) + segments * max(1, native.SKETCH_KEYS // config.block)
    return (keys + segments * native.SKETCH_KEYS) * (4 * words + 2) + centres * 2 * native.padded(layer.head_dim)


def _body(layer: LayerShape, config: Config, tokens: int) -> int:
    if not layer.sampled or tokens < config.exact_below:
        return 0
    end = index_end(tokens, recent=config.recent, stride=config.block)
    return end if end > config.sinks else 0


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
