"""How many bytes a request will need, said before it is read, and whether the machine has them.

Counts what `KVStore` allocates, block by block and segment by segment. Knows sizes only: no tensors, no models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from magicpig.config import Config
from magicpig.errors import ArgumentError, InsufficientMemoryError
from magicpig.kernels import base
from magicpig.kernels.arena import block_capacity
from magicpig.kernels.rows.layout import RowLayout
from magicpig.machine import free_memory
from magicpig.samplers import Costs, sampler_of
from magicpig.settings import IndexSpec, Policy
from magicpig.types import MemoryUse


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

    def part(self, split: int) -> LayerShape:
        """What one of `split` processes has of it."""
        heads = None if self.query_heads is None else self.query_heads // split
        return replace(self, kv_heads=self.kv_heads // split, query_heads=heads)


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
    Raises ArgumentError for sizes below 1 and unsupported dtypes.
    """
    if sequences < 1 or tokens < 1:
        raise ArgumentError(f"sequences={sequences} and tokens={tokens} must be at least 1")
    base.check_dtype(dtype)
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
        return MemoryUse(layer.kv_heads * min(tokens, layer.window) * 2 * layer.head_dim * dtype.itemsize, 0)
    spec, tail = _spec(layer, config), RowLayout(layer.head_dim, dtype, dtype)
    layout = RowLayout(layer.head_dim, dtype, torch.int8) if config.kv_dtype == "int8" else tail
    full, rest = divmod(tokens // spec.stride * spec.stride, base.BLOCK_ROWS)
    capacity = (full + (rest > 0)) * base.BLOCK_ROWS if full else (block_capacity(rest) if rest else 0)
    tails = (2 if layout.quantised and capacity else 1) * spec.stride
    row_bytes = layer.kv_heads * (capacity * layout.nbytes + tails * tail.nbytes)
    end = _index_end(layer, config, tokens)
    return MemoryUse(row_bytes, sampler_of(spec, layer.head_dim).nbytes(_costs(layer, dtype), end) if end else 0)


def _transient(layer: LayerShape, config: Config, tokens: int, dtype: torch.dtype) -> int:
    """What building the index needs at its peak, or drawing from it."""
    end = _index_end(layer, config, tokens)
    return sampler_of(_spec(layer, config), layer.head_dim).transient(_costs(layer, dtype), end) if end else 0


def _spec(layer: LayerShape, config: Config) -> IndexSpec:
    return IndexSpec.of(config, sampled=layer.sampled)


def _costs(layer: LayerShape, dtype: torch.dtype) -> Costs:
    return Costs(layer.kv_heads, layer.query_heads or layer.kv_heads, layer.head_dim, dtype.itemsize)


def _index_end(layer: LayerShape, config: Config, tokens: int) -> int:
    return Policy.of(config, sampled=layer.sampled and config.samples).index_end(tokens, config.block)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
