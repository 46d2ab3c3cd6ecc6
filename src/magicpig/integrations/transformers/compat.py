"""All contact with what changes in transformers from version to version. Tested on 5.19, on 5.24 and on the newest.

5.24 renamed `past_key_values` to `cache`, in arguments and in outputs. The old name warns, and goes in 5.40 (`forward`)
and in 6.0 (`generate`). What else is imported here is not part of transformers' documented interface.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.masking_utils import flash_attention_mask

from magicpig.errors import ArgumentError

Function = TypeVar("Function", bound=Callable[..., Any])

__all__ = [
    "CACHE",
    "CACHE_NAMES",
    "SHARED",
    "Cache",
    "CacheLayerMixin",
    "cache_argument",
    "cache_of",
    "can_set_attention",
    "flash_attention_mask",
    "layer_types",
    "new_layer",
    "opaque",
    "take_cache",
    "takes_cache",
]

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
CACHE = "cache" if "cache" in {f.name for f in dataclasses.fields(GenerateDecoderOnlyOutput)} else "past_key_values"
"""What this transformers calls the cache of a model."""

SHARED = "shared"
"""The type of a layer that attends to the keys of an earlier one."""


def cache_argument(cache: Cache) -> dict[str, Cache]:
    """`model(ids, **cache_argument(cache))` and `model.generate(ids, **cache_argument(cache))`, in every version."""
    return {CACHE: cache}


def cache_of(output: Any) -> Any:
    """The cache in what a model or `generate` returned."""
    return getattr(output, CACHE)


def take_cache(arguments: dict[str, Any]) -> Any:
    """Removes the cache from the arguments of a call, whichever name it has there. None if there is none."""
    given = {name: arguments.pop(name) for name in CACHE_NAMES if name in arguments}
    caches = {name: cache for name, cache in given.items() if cache is not None}
    if len(caches) > 1:
        raise ArgumentError(f"{' and '.join(caches)} are names of the same argument; give one of them")
    return next(iter(caches.values()), None)


def opaque(function: Function) -> Function:
    """Decorator: torch.compile calls the function and does not look into it.

    Who compiles nothing does not pay for it: torch's own wrapper costs several microseconds a call.
    """
    disabled = torch.compiler.disable(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return disabled(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return cast("Function", call)


def layer_types(config: PreTrainedConfig) -> tuple[list[str], list[dict[str, Any]]]:
    """The type of each layer of a decoder, and the settings of its cache; `SHARED` for layers without keys."""
    types, settings = get_layer_types_and_kwargs(config)
    # Older versions leave such layers out, newer ones call them and layers without attention the same.
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    own = int(config.num_hidden_layers) - shared
    return types[:own] + [SHARED] * shared, settings[:own] + [{}] * shared


def new_layer(kind: str, settings: dict[str, Any]) -> Any:
    """An empty layer of transformers' own cache."""
    return DYNAMIC_LAYER_TYPE_MAPPING[kind](**settings)


def can_set_attention(model: PreTrainedModel) -> bool:
    """Whether the model computes attention through transformers' interface."""
    return bool(model._can_set_attn_implementation())


def takes_cache(model: Any) -> bool:
    """Whether the model takes a cache of keys and values."""
    return bool(model._supports_default_dynamic_cache())
