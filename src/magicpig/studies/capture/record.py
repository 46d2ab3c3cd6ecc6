"""A model reads a text exactly, and what its attention computed with is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from magicpig.config import EXACT
from magicpig.generation import greedy, read
from magicpig.integrations.transformers import MagicPigCache, attach, detach
from magicpig.integrations.transformers.attention import NAME
from magicpig.integrations.transformers.layer import MagicPigLayer, PendingTokens
from magicpig.integrations.transformers.shapes import layer_shapes
from magicpig.store.planner import check, plan
from magicpig.studies.capture.attention_set import AttentionSet
from magicpig.studies.capture.file import CaptureError

FEW = 4  # layers, where no others are asked for


@torch.inference_mode()
def record(
    network: Any,
    ids: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    kv_heads: Sequence[int] | None = None,
    steps: int = 8,
    new_tokens: int = 0,
    stop: Collection[int] = (),
    chunk: int = 1024,
    on_prefill: Callable[[int], None] = lambda tokens: None,
) -> dict[int, AttentionSet]:
    """The attention of the last ``steps`` tokens of a text over all of it, by layer.

    ids: the text; the model first writes ``new_tokens`` more, the likeliest ones, up to one in ``stop``. With as many
    steps, the queries are those that the new tokens came from.
    network: a transformers model that `attach` accepts; it is left as it was. layers: by default `spread_layers`.
    kv_heads: those to keep, with their query heads; by default all.
    chunk: the text is read this many tokens at a time; on_prefill is called with the tokens of each chunk.
    Raises CaptureError for layers and heads that are not there, layers that do not attend to everything, and more steps
    than tokens; UnsupportedModelError and ModelError as `attach` and `generation.read`; MemoryError if keys and values
    do not fit.
    """
    if not 0 < steps <= len(ids):
        raise CaptureError(f"steps={steps} must be between 1 and the {len(ids)} tokens of the text")
    chosen = spread_layers(network.config) if layers is None else sorted(set(layers))
    _check_layers(network.config, chosen)
    shapes = layer_shapes(network.config, EXACT)
    available = min(shapes[layer].kv_heads for layer in chosen)
    for head in kv_heads or ():
        if not 0 <= head < available:
            raise CaptureError(f"kv_heads={head}: the layers have key/value heads 0 to {available - 1}")
    check(plan(shapes, EXACT, sequences=1, tokens=len(ids) + new_tokens, dtype=network.dtype))
    cache = MagicPigCache(network.config, EXACT)
    watched = {layer: _WatchedLayer(layer, steps) for layer in chosen}
    cache.layers = [watched.get(index, layer) for index, layer in enumerate(cache.layers)]
    attached = network.config._attn_implementation == NAME
    if not attached:
        attach(network, EXACT)
    try:
        logits = read(network, list(ids), cache, chunk=chunk, on_chunk=on_prefill)
        if new_tokens > 0:
            greedy(network, logits, cache, max_new_tokens=new_tokens, stop=stop)
    finally:
        if not attached:
            detach(network)
    return {index: layer.attention_set(kv_heads) for index, layer in watched.items()}


def spread_layers(model_config: Any, count: int = FEW) -> list[int]:
    """At most ``count`` of the layers that attend to everything, evenly spread, the first and the last among them."""
    full = full_layers(model_config)
    if len(full) <= count:
        return full
    return [full[round(i * (len(full) - 1) / (count - 1))] for i in range(count)]


def full_layers(model_config: Any) -> list[int]:
    """The layers that attend to everything."""
    shapes = layer_shapes(model_config, EXACT)
    return [index for index, shape in enumerate(shapes) if shape.window is None]


def _check_layers(model_config: Any, layers: list[int]) -> None:
    count, full = len(layer_shapes(model_config, EXACT)), full_layers(model_config)
    for layer in layers:
        if not 0 <= layer < count:
            raise CaptureError(f"layers={layer}: the model has layers 0 to {count - 1}")
        if layer not in full:
            raise CaptureError(f"layers={layer}: attends to a sliding window; those that see all are {full}")
    if not layers:
        raise CaptureError("layers is empty: name at least one layer that attends to everything")


class _WatchedLayer(MagicPigLayer):
    """Remembers the newest queries, and by what rule they were answered."""

    def __init__(self, index: int, steps: int) -> None:
        super().__init__(EXACT, index)
        self.steps = steps
        self.asked: Tensor | None = None
        self.rule: dict[str, Any] = {}

    def attend(self, query: Tensor, pending: PendingTokens, mask: Tensor | None, **rule: Any) -> Tensor:
        newest = query[0, :, -self.steps :].detach().to("cpu", self.dtype).transpose(0, 1)
        self.asked = newest if self.asked is None else torch.cat([self.asked, newest])[-self.steps :]
        self.rule = rule
        return super().attend(query, pending, mask, **rule)

    def attention_set(self, kv_heads: Sequence[int] | None) -> AttentionSet:
        assert self.asked is not None
        keys, values = (torch.cat(parts, 1) for parts in zip(*self.stores[0].blocks(), strict=True))
        sinks = self.rule["sink_logits"]
        everything = AttentionSet(
            keys,
            values,
            self.asked,
            scale=float(self.rule["scale"]),
            softcap=self.rule["softcap"],
            sink_logits=None if sinks is None else sinks.detach().to("cpu", torch.float32),
        )
        return everything if kv_heads is None else everything.only(kv_heads)
