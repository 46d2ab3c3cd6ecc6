"""`attach(model)`: from then on `model.generate` samples its attention; `detach(model)` puts everything back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from magicpig.config import Config
from magicpig.config_file import load_config
from magicpig.integrations.transformers.attention import NAME
from magicpig.integrations.transformers.cache import MagicPigCache
from magicpig.integrations.transformers.errors import UnsupportedModelError
from magicpig.integrations.transformers.shapes import layer_shapes
from magicpig.machine import free_memory
from magicpig.planner import check, plan

Model = TypeVar("Model", bound=PreTrainedModel)

_ATTACHED = "_magicpig"


@dataclass
class _Attachment:
    config: Config
    attn_implementation: str


def attach(model: Model, config: Config | Path | str | None = None, **settings: Any) -> Model:
    """Make `model.generate` attend by sampling, with a fresh `MagicPigCache` for each call that brings no cache.

    config: the settings, or the file they are in (`magicpig tune` writes one), or give them by name:
    `attach(model, K=9, L=120)`. Attaching again replaces them.
    Returns the model. Forward passes without a cache stay exact.
    Raises UnsupportedModelError, which is a ValueError, for models whose attention cannot be sampled, and leaves them
    as they were; ValueError for bad settings, ConfigFileError, which is one too, for bad files.
    """
    if config is not None and settings:
        raise ValueError(f"give either config or settings by name, not both (got {', '.join(settings)})")
    if config is None:
        config = Config(**settings)
    elif not isinstance(config, Config):
        config = load_config(config)
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(f"model must be a transformers model that generates text, got {type(model).__name__}")
    attached = _attachment(model)
    if attached is not None:
        MagicPigCache(model.config, config)  # refuses what does not fit the model
        attached.config = config
        return model
    _check_model(model, config)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise UnsupportedModelError(model.config.model_type, "it computes attention without transformers' interface")
    # On the instance, in front of the methods of the class.
    model.__dict__[_ATTACHED] = _Attachment(config, before)
    model.__dict__["generate"] = _sampling_generate(model)
    return model


def detach(model: Model) -> Model:
    """Undo `attach`. Returns the model; does nothing to one that is not attached."""
    attached = _attachment(model)
    if attached is not None:
        del model.__dict__[_ATTACHED], model.__dict__["generate"]
        model.set_attn_implementation(attached.attn_implementation)
    return model


def _attachment(model: PreTrainedModel) -> _Attachment | None:
    attachment: _Attachment | None = model.__dict__.get(_ATTACHED)
    return attachment


def _sampling_generate(model: Any) -> Callable[..., Any]:
    generate = model.generate

    @functools.wraps(generate)
    def wrapper(inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        attached = _attachment(model)
        assert attached is not None

        def asked(name: str, default: Any = None) -> Any:
            for value in (
                kwargs.get(name),
                getattr(generation_config, name, None),
                getattr(model.generation_config, name, None),
            ):
                if value is not None:
                    return value
            return default

        given = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        prompt = next((x for x in given if x is not None), None)
        cache = kwargs.get("past_key_values")
        _check_request(asked, cache, assisted=kwargs.get("assistant_model") is not None)
        if asked("use_cache", True) and cache is None:
            cache = kwargs["past_key_values"] = MagicPigCache(model.config, attached.config)
            if asked("is_assistant", False):
                cache.activate_past_recording()  # its proposals will be taken back
        if prompt is not None:
            _check_length(model, prompt, asked)
            if isinstance(cache, MagicPigCache):
                _check_memory(model, prompt, asked, cache)
        return generate(inputs, generation_config, *args, **kwargs)

    return wrapper


def _check_request(asked: Callable[..., Any], cache: Any, *, assisted: bool) -> None:
    # "hybrid" is the old default in the files of Gemma models; transformers ignores it, too.
    if asked("cache_implementation") not in (None, "hybrid"):
        raise ValueError(
            f"cache_implementation={asked('cache_implementation')!r} is not supported with magicpig attached, "
            "which brings its own cache; leave it unset"
        )
    if isinstance(cache, StaticCache):
        raise ValueError("past_key_values is a StaticCache, which is not supported; pass a MagicPigCache or nothing")
    assisted = assisted or any(asked(name) is not None for name in ("prompt_lookup_num_tokens", "assistant_early_exit"))
    if assisted and cache is not None and cache.get_seq_length() > 0:
        # It would feed the part of the prompt that is in the cache a second time, whatever the cache is.
        raise ValueError("transformers cannot continue a filled cache in assisted generation; use a new MagicPigCache")
    if asked("output_attentions"):
        raise ValueError("output_attentions=True: attention weights are never computed; detach(model) first")


def _check_length(model: PreTrainedModel, prompt: Tensor, asked: Callable[..., Any]) -> None:
    tokens = prompt.shape[1]
    if prompt.shape[0] == 0 or tokens == 0:
        raise ValueError(f"the prompt is empty: input of shape {tuple(prompt.shape)}")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    new = _new_tokens(tokens, asked)
    if limit is not None and tokens + new > limit:
        raise ValueError(
            f"the prompt has {tokens} tokens and {new} are to be generated, but the model's limit is {limit} "
            "(max_position_embeddings)"
        )


def _check_memory(model: Any, prompt: Tensor, asked: Callable[..., Any], cache: MagicPigCache) -> None:
    sequences = prompt.shape[0] * max(asked("num_beams", 1), asked("num_return_sequences", 1))
    tokens = prompt.shape[1] + _new_tokens(prompt.shape[1], asked)
    need = plan(
        layer_shapes(model.config, cache.config), cache.config, sequences=sequences, tokens=tokens, dtype=model.dtype
    )
    held = cache.report()
    check(need, free_memory() + held.kv_bytes + held.index_bytes)


def _new_tokens(prompt_tokens: int, asked: Callable[..., Any]) -> int:
    if (new := asked("max_new_tokens")) is not None:
        return int(new)
    if (total := asked("max_length")) is not None:
        return max(0, int(total) - prompt_tokens)
    return 1  # transformers then stops at the limit by itself


def _check_model(model: Any, config: Config) -> None:
    text = model.config.get_text_config(decoder=True)
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(kind, "it is an encoder-decoder model")
    if text is not model.config:
        raise UnsupportedModelError(kind, "it is not a text model alone; attach to its language model")
    if getattr(text, "kv_lora_rank", None) is not None or getattr(text, "qk_rope_head_dim", None) is not None:
        raise UnsupportedModelError(kind, "its attention is multi-head latent attention (MLA)")
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(kind, "it computes attention without transformers' interface")
    MagicPigCache(model.config, config)  # knows which layers work
    if not model._supports_default_dynamic_cache():
        raise UnsupportedModelError(kind, "it does not take a cache of keys and values")
