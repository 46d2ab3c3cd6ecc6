"""What each layer of a model keeps of a token, read from its configuration before anything runs."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from magicpig.config import Config
from magicpig.planner import LayerShape


def layer_shapes(model_config: PreTrainedConfig, config: Config) -> list[LayerShape]:
    """One `LayerShape` per layer, as `planner.plan` wants them."""
    decoder = model_config.get_text_config(decoder=True)
    types, settings = get_layer_types_and_kwargs(decoder)
    shapes = []
    for index, (layer, kind, given) in enumerate(zip(decoder.per_layer_config, types, settings, strict=True)):
        sampled = kind == "full_attention" and not config.is_dense(index)
        heads = int(layer.num_attention_heads)
        shapes.append(LayerShape(_kv_heads(layer), _head_dim(layer), sampled, given.get("sliding_window"), heads))
    return shapes


def _kv_heads(layer: Any) -> int:
    if getattr(layer, "multi_query", False):  # gpt_bigcode
        return 1
    # Families without grouped queries only have the second.
    return int(getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads)


def _head_dim(layer: Any) -> int:
    return int(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)
