"""What each layer of a model keeps of a token, and how many tokens it reads, said by its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from magicpig.config import Config
from magicpig.integrations.transformers.compat import layer_types
from magicpig.model_dir import ModelError
from magicpig.placement.foretell import Sizes
from magicpig.store.planner import LayerShape
from magicpig.wording import shown

ROPE_SCALING = ("linear", "dynamic", "yarn")


def layer_shapes(model_config: PreTrainedConfig, config: Config) -> list[LayerShape]:
    """One `LayerShape` per layer, as `planner.plan` wants them."""
    decoder = model_config.get_text_config(decoder=True)
    types, settings = layer_types(decoder)
    shapes = []
    for index, (layer, kind, given) in enumerate(zip(decoder.per_layer_config, types, settings, strict=True)):
        sampled = kind == "full_attention" and not config.is_dense(index)
        heads = int(layer.num_attention_heads)
        shapes.append(LayerShape(_kv_heads(layer), _head_dim(layer), sampled, given.get("sliding_window"), heads))
    return shapes


def sizes_of_file(file: Path, config: Config) -> Sizes:
    """What a plan needs to know of the model that a config.json describes, its weights in bfloat16.

    Raises ModelError where transformers knows no such model.
    """
    try:
        return sizes_of(AutoConfig.from_pretrained(file), config)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{file}: not the configuration of a model for text: {error}") from None


def sizes_of(model_config: PreTrainedConfig, config: Config) -> Sizes:
    """The same of a configuration."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(model_config)
    shapes = layer_shapes(model_config, config)
    stacks = [x for x in model.modules() if isinstance(x, torch.nn.ModuleList) and len(x) == len(shapes)]
    inside = sum(x.numel() for x in stacks[0].parameters()) if stacks else 0
    whole, size = sum(x.numel() for x in model.parameters()), torch.bfloat16.itemsize
    weights = inside // len(shapes)
    return Sizes(shapes, weights * size, weights, (whole - weights * len(shapes)) * size)


def token_limit(model_config: PreTrainedConfig) -> int | None:
    """The most tokens of a sequence, None if the configuration does not say.

    By YaRN, linear and dynamic scaling of rotary embeddings that is factor times the original length, which model cards
    have users add to a configuration without changing `max_position_embeddings`. The other kinds of scaling, llama3
    and longrope, come with that number raised. Where layers are scaled differently, as those of Gemma 3 are, the number
    covers that already and the least counts.
    """
    decoder = model_config.get_text_config(decoder=True)
    stated = getattr(decoder, "max_position_embeddings", None)
    if stated is None:
        return None
    rope = getattr(decoder, "rope_parameters", None) or {}
    kinds = [own for own in rope.values() if isinstance(own, Mapping)] or [rope]
    return min(_scaled(int(stated), own) for own in kinds)


def _scaled(stated: int, rope: Mapping[str, Any]) -> int:
    kind = rope.get("rope_type", rope.get("type"))
    original = rope.get("original_max_position_embeddings") or stated
    scales = kind in ("yarn", "linear", "dynamic") or (kind in ("llama3", "longrope") and stated <= original)
    if not scales or rope.get("factor") is None:
        return stated
    return max(stated, int(original * float(rope["factor"])))


def scale_positions(model_config: PreTrainedConfig, scaling: str) -> None:
    """Have a model read longer texts than it was made for, by stretching its rotary embeddings.

    scaling: "yarn:4": a kind of `ROPE_SCALING` and the factor. What the model was made for is what its configuration
    says, or says it was before an earlier scaling. Raises ModelError where that cannot be done.
    """
    kind, _, given = scaling.partition(":")
    try:
        factor = float(given)
    except ValueError:
        factor = 0.0
    if kind not in ROPE_SCALING or not 1 < factor < math.inf:
        raise ModelError(
            f"rope_scaling={shown(scaling)} must be a kind and a factor above 1, as yarn:4; "
            f"the kinds are {', '.join(ROPE_SCALING)}"
        )
    decoder = model_config.get_text_config(decoder=True)
    rope = getattr(decoder, "rope_parameters", None)
    stated = getattr(decoder, "max_position_embeddings", None)
    if not rope or stated is None:
        raise ModelError(f"rope_scaling={shown(scaling)}: {decoder.model_type} has no rotary embeddings to scale")
    if any(isinstance(own, Mapping) for own in rope.values()):
        raise ModelError(f"rope_scaling={shown(scaling)}: the layers of {decoder.model_type} have several of their own")
    original = rope.get("original_max_position_embeddings") or stated
    kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    scaled = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    decoder.rope_parameters = {**kept, **scaled}


def key_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of the keys and values that a model computes.

    Weights of 8 bits and fewer are turned into the dtype of the configuration before anything is computed with them.
    """
    dtype = model.dtype
    if dtype.is_floating_point and dtype.itemsize > 1:
        return dtype
    stated = getattr(model.config.get_text_config(decoder=True), "dtype", None) or getattr(model.config, "dtype", None)
    if isinstance(stated, torch.dtype) and stated.is_floating_point and stated.itemsize > 1:
        return stated
    return torch.bfloat16


def _kv_heads(layer: Any) -> int:
    if getattr(layer, "multi_query", False):  # gpt_bigcode
        return 1
    # Families without grouped queries only have the second.
    return int(getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads)


def _head_dim(layer: Any) -> int:
    return int(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)
