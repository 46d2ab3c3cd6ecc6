"""`attach(model)`: from then on `model.generate` samples its attention; `detach(model)` puts everything back.

An attached model has a subclass of its own class, which overrides `generate`. So copies, pickles and wrappers of the
model attend with their own weights, whatever makes them.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from magicpig.advice import SamplingWarning, advice
from magicpig.config import Config
from magicpig.config_file import load_config
from magicpig.errors import ArgumentError, ArgumentTypeError
from magicpig.integrations.transformers import compat
from magicpig.integrations.transformers.attention import NAME
from magicpig.integrations.transformers.cache import MagicPigCache
from magicpig.integrations.transformers.errors import CacheMismatchError, UnsupportedModelError
from magicpig.integrations.transformers.layer import MagicPigLayer
from magicpig.integrations.transformers.probe import probe
from magicpig.integrations.transformers.shapes import key_dtype, layer_shapes, sizes_of, token_limit
from magicpig.machine import free_memory
from magicpig.placement import CPU, Placement
from magicpig.placement.choice import place_of
from magicpig.placement.device import Device
from magicpig.store.planner import check, plan

Model = TypeVar("Model", bound=nn.Module)
LONGEST = 131072  # tokens, for models that name no limit


@dataclass
class _Attachment:
    config: Config
    attn_implementation: str
    max_length: int | None
    place: Placement = CPU
    warned: bool = False  # that settings do not work


class _Attached:
    """In front of the class of an attached model."""

    _magicpig: _Attachment | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made here and has no name to be found by; what it is made from has.
        reduced = super().__reduce_ex__(max(2, int(protocol)))
        base = _base(self)
        return (_rebuild, (base,), *reduced[2:]) if base is not None and isinstance(reduced, tuple) else reduced


def attach(
    model: Model,
    config: Config | Path | str | None = None,
    *,
    max_length: int | None = None,
    device: str | Device = "cpu",
    placement: str | Placement = "auto",
    **settings: Any,
) -> Model:
    """Make `model.generate` attend by sampling, with a fresh `MagicPigCache` for each call that brings no cache.

    model: a causal language model, a vision-language model, whose text part is then sampled, or a PEFT model of one.
    config: the settings, or the file they are in (`magicpig tune` writes one), or give them by name:
    `attach(model, K=9, L=120)`. Attaching again replaces them.
    max_length: the most tokens of a sequence, prompt and answer together, in place of what the model's configuration
    says (`token_limit`).
    device, placement: what else takes part in a step, as in `magicpig.where.Where`; the model has to be on the device.
    Returns the model. Forward passes without a cache stay exact. Copies and pickles of an attached model are attached.
    Raises UnsupportedModelError, which is a ValueError, for models whose attention cannot be sampled, and leaves them
    as they were; ValueError for bad settings, ConfigFileError, which is one too, for bad files.
    """
    if config is not None and settings:
        raise ArgumentError(f"give either config or settings by name, not both (got {', '.join(settings)})")
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int)):
        raise ArgumentTypeError(f"max_length={max_length!r} must be a whole number of tokens or None")
    if max_length is not None and max_length < 1:
        raise ArgumentError(f"max_length={max_length} must be at least 1")
    if config is None:
        config = Config(**settings)
    elif not isinstance(config, Config):
        config = load_config(config)
    inner = _unwrapped(model)
    _check_adapters(model)
    if not isinstance(inner, PreTrainedModel) or not inner.can_generate():
        raise ArgumentTypeError(
            f"model must be a transformers model that generates text, got {type(inner).__name__}; "
            "of a part of a model, attach the whole"
        )
    place = _place(inner, config, device, placement, max_length)
    attached = _attachment(inner)
    if attached is not None:
        MagicPigCache(inner.config, config)  # refuses what does not fit the model
        attached.config, attached.max_length, attached.place, attached.warned = config, max_length, place, False
        return model
    part = _check_model(inner, config)
    before = part.config._attn_implementation
    part.set_attn_implementation(NAME)
    if part.config._attn_implementation != NAME:
        raise UnsupportedModelError(inner.config.model_type, "it computes attention without transformers' interface")
    if not isinstance(inner, _Attached):
        base: Any = type(inner)
        inner.__class__ = _attached_class(base)
    inner.__dict__["_magicpig"] = _Attachment(config, before, max_length, place)
    return model


def detach(model: Model) -> Model:
    """Undo `attach`. Returns the model; does nothing to one that is not attached."""
    inner = _unwrapped(model)
    attached = _attachment(inner)
    if attached is not None:
        del inner.__dict__["_magicpig"]
        # If something else has put a class in front of ours, ours stays there and does nothing.
        if (base := _base(inner)) is not None:
            inner.__class__ = base
        _text_part(inner).set_attn_implementation(attached.attn_implementation)
    return model


def _place(
    model: Any, config: Config, device: str | Device, placement: str | Placement, max_length: int | None
) -> Placement:
    if device == "cpu" and placement in ("auto", "cpu"):
        return CPU
    place = place_of(
        device,
        placement,
        config,
        lambda: sizes_of(model.config, config),
        context=max_length or token_limit(model.config) or LONGEST,
        dtype=key_dtype(model),
    )
    check_on(model, place)
    return place


def check_on(model: Any, place: Placement) -> None:
    """Raises ArgumentError where a model is not on the device that its placement needs."""
    if place.accelerator is not None and model.device != place.accelerator.torch_device:
        here, there = model.device, place.accelerator.torch_device
        raise ArgumentError(f"the model is on {here}, its placement needs it on {there}: model.to({str(there)!r})")


def _unwrapped(wrapped: nn.Module) -> Any:
    """The transformers model in what PEFT or torch.compile(model) made of it."""
    model: Any = wrapped
    while not isinstance(model, PreTrainedModel):
        if callable(getattr(model, "get_base_model", None)) and hasattr(model, "peft_config"):
            model = model.get_base_model()
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            break
    return model


def _check_adapters(model: Any) -> None:
    """PEFT's adapters stay at work in the model, where they replace parts of it; a few do not work so."""
    for adapter in getattr(model, "peft_config", {}).values():
        kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
        if kind in _FOREIGN_ADAPTERS:
            raise UnsupportedModelError(None, f"its PEFT adapter {kind} {_FOREIGN_ADAPTERS[kind]}")


_FOREIGN_ADAPTERS = {
    "PREFIX_TUNING": "fills the cache by itself",
    "CARTRIDGE": "fills the cache by itself",
    "ADAPTION_PROMPT": "computes attention by itself",
}


def _attachment(model: Any) -> _Attachment | None:
    return model._magicpig if isinstance(model, _Attached) else None


@functools.cache
def _attached_class(base: Any) -> Any:
    """The class of attached models of class `base`, which goes by the same name: it is written into config.json."""
    generate = base.generate
    signature = inspect.signature(generate)

    @functools.wraps(generate)
    def sampling(self: Any, *args: Any, **kwargs: Any) -> Any:
        attached = _attachment(self)
        if attached is None:
            return generate(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        request = {name: value for name, value in given.items() if name not in ("self", "kwargs")}
        prepared = _prepared(self, attached, {**request, **given.get("kwargs", {})})
        output = generate(self, **prepared)
        _warn(attached, prepared)
        return output

    names = {
        "_magicpig_base": base,
        "generate": sampling,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
    }
    return type(base.__name__, (_Attached, base), {**names, "__doc__": base.__doc__})


def _base(model: Any) -> Any:
    """The class of a model before it was attached; None if its class was not made here."""
    return type(model).__dict__.get("_magicpig_base")


def _rebuild(base: Any) -> Any:
    """The empty attached model that `copy` and `pickle` fill."""
    return object.__new__(_attached_class(base))


# --- a call of generate -----------------------------------------------------------------------------------------------


def _prepared(model: Any, attached: _Attachment, request: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call of `generate`, checked, with the cache among them."""
    # PEFT's virtual tokens are fed by a method that it puts into the model.
    _check_adapters(getattr(model.prepare_inputs_for_generation, "__self__", None))
    config = request.get("generation_config")

    def asked(name: str, default: Any = None) -> Any:
        if name in request:
            return default if request[name] is None else request[name]
        for settings in (config, model.generation_config):
            if (value := getattr(settings, name, None)) is not None:
                return value
        return default

    cache = compat.take_cache(request)
    _check_request(asked, cache, request)
    if not asked("use_cache", True):
        if cache is not None:
            raise ArgumentError(f"use_cache=False and {compat.CACHE}= contradict each other; give one of them")
        if request.get("use_cache") is None and getattr(config, "use_cache", None) is None:
            warnings.warn(
                "the model's generation settings say use_cache=False, by which nothing would be sampled, and are "
                "overruled; pass use_cache=False to generate without a cache",
                stacklevel=4,
            )
            request["use_cache"] = True
    if asked("use_cache", True) and cache is None:
        cache = MagicPigCache(model.config, attached.config, placement=attached.place)
        if asked("is_assistant", False):
            cache.activate_past_recording()  # its proposals will be taken back
    given = (request.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    prompt = next((x for x in given if isinstance(x, Tensor)), None)
    if isinstance(cache, MagicPigCache):
        _check_cache(model, cache)
        cache.remember(model)
    if prompt is not None:
        tokens = _prompt_tokens(prompt, request.get("attention_mask"), cache)
        new = _new_tokens(prompt.shape[1], asked)
        _check_length(model, attached.max_length, tokens, new)
        if isinstance(cache, MagicPigCache):
            sequences = prompt.shape[0] * max(asked("num_beams", 1), asked("num_return_sequences", 1))
            _check_memory(model, cache, sequences, tokens + new)
    return request if cache is None else {**request, **compat.cache_argument(cache)}


def _warn(attached: _Attachment, prepared: dict[str, Any]) -> None:
    """Say once what the samples say of themselves, if that is bad."""
    cache = prepared.get(compat.CACHE)
    if attached.warned or not isinstance(cache, MagicPigCache):
        return
    if (said := advice(cache.report().layers, cache.config)) is not None:
        attached.warned = True
        warnings.warn(said, SamplingWarning, stacklevel=4)


def _check_request(asked: Callable[..., Any], cache: Any, request: dict[str, Any]) -> None:
    # "hybrid" is the old default in the files of Gemma models; transformers ignores it, too.
    if asked("cache_implementation") not in (None, "hybrid"):
        raise ArgumentError(
            f"cache_implementation={asked('cache_implementation')!r} is not supported with magicpig attached, "
            "which brings its own cache; leave it unset"
        )
    if isinstance(cache, StaticCache):
        raise ArgumentError(f"{compat.CACHE} is a StaticCache, which is not supported; pass a MagicPigCache or nothing")
    if cache is not None and not isinstance(cache, compat.Cache):
        raise ArgumentTypeError(f"{compat.CACHE} must be a MagicPigCache or None, got {type(cache).__name__}")
    assisted = request.get("assistant_model") is not None or any(
        asked(name) is not None for name in ("prompt_lookup_num_tokens", "assistant_early_exit")
    )
    if assisted and cache is not None and cache.get_seq_length() > 0:
        # It would feed the part of the prompt that is in the cache a second time, whatever the cache is.
        raise ArgumentError(
            "transformers cannot continue a filled cache in assisted generation; use a new MagicPigCache"
        )
    if asked("output_attentions"):
        raise ArgumentError("output_attentions=True: attention weights are never computed; unset it or detach(model)")
    if asked("stop_strings") is not None and request.get("tokenizer") is None:
        raise ArgumentError(f"stop_strings={asked('stop_strings')!r} need the tokenizer; pass generate(tokenizer=...)")


def _check_cache(model: Any, cache: MagicPigCache) -> None:
    """Refuses a cache that was made for another model, as far as can be seen."""
    shapes = layer_shapes(model.config, cache.config)
    if len(cache.layers) != len(shapes):
        raise CacheMismatchError(
            f"the cache is of another model: it has {len(cache.layers)} layers, {type(model).__name__} {len(shapes)}"
        )
    for index, (layer, shape) in enumerate(zip(cache.layers, shapes, strict=True)):
        window = getattr(layer, "sliding_window", None)
        if window != shape.window:
            raise CacheMismatchError(
                f"the cache is of another model: its layer {index} has a window of {window} tokens, that of "
                f"{type(model).__name__} of {shape.window}"
            )
        if isinstance(layer, MagicPigLayer):
            layer.check_fits(shape.kv_heads, shape.head_dim)


def _prompt_tokens(prompt: Tensor, mask: Any, cache: Any) -> int:
    """Tokens of each sequence once the prompt was read, those that the cache holds included."""
    tokens = prompt.shape[1]
    if prompt.shape[0] == 0 or tokens == 0:
        raise ArgumentError(f"the prompt is empty: input of shape {tuple(prompt.shape)}")
    # As transformers has it: a mask that is longer than the prompt says that the rest of it is in the cache.
    total = max(tokens, mask.shape[1]) if isinstance(mask, Tensor) and mask.ndim == 2 else tokens
    past = 0 if cache is None else cache.get_seq_length()
    if total <= past:
        raise ArgumentError(
            f"the prompt has {total} tokens and the cache holds {past}; pass all tokens so far and the new ones, or "
            "only the new ones with an attention_mask for all"
        )
    return int(total)


def _check_length(model: Any, given: int | None, tokens: int, new: int) -> None:
    limit = token_limit(model.config) if given is None else given
    if limit is not None and tokens + new > limit:
        # The second is how a user who knows better goes on.
        source = "max_position_embeddings, rope scaling included; attach(model, max_length=...) overrules it"
        raise ArgumentError(
            f"the prompt has {tokens} tokens and {new} are to be generated, but the model's limit is {limit} "
            f"({source if given is None else 'max_length of attach'})"
        )


def _check_memory(model: Any, cache: MagicPigCache, sequences: int, tokens: int) -> None:
    need = plan(
        layer_shapes(model.config, cache.config),
        cache.config,
        sequences=sequences,
        tokens=tokens,
        dtype=key_dtype(model),
    )
    held = cache.report()
    check(need, free_memory() + held.kv_bytes + held.index_bytes)


def _new_tokens(prompt_tokens: int, asked: Callable[..., Any]) -> int:
    if (new := asked("max_new_tokens")) is not None:
        return int(new)
    if (total := asked("max_length")) is not None:
        return max(0, int(total) - prompt_tokens)
    return 1  # transformers then stops at the limit by itself


# --- what a model must be like ----------------------------------------------------------------------------------------


def _text_part(model: Any) -> Any:
    """The part of a model that has the configuration of its decoder: itself, unless it also sees or hears."""
    text = model.config.get_text_config(decoder=True)
    if text is model.config:
        return model
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is text)
    return next(parts, None)


def _check_model(model: Any, config: Config) -> Any:
    """Returns the part whose attention will be sampled."""
    text = model.config.get_text_config(decoder=True)
    kind = model.config.model_type
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(kind, "it is an encoder-decoder model")
    part = _text_part(model)
    if part is None:
        raise UnsupportedModelError(kind, "its text part is no model of its own")
    if getattr(text, "kv_lora_rank", None) is not None or getattr(text, "qk_rope_head_dim", None) is not None:
        raise UnsupportedModelError(kind, "its attention is multi-head latent attention (MLA)")
    if getattr(text, "cross_attention_layers", None):
        raise UnsupportedModelError(kind, "some of its layers attend to images only (cross-attention)")
    if not compat.can_set_attention(part):
        raise UnsupportedModelError(kind, "it computes attention without transformers' interface")
    MagicPigCache(model.config, config)  # knows which layers work
    if not compat.takes_cache(model):
        raise UnsupportedModelError(kind, "it does not take a cache of keys and values")
    probe(part, kind)
    return part
