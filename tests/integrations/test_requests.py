"""What a call of generate asks for, and what an attached model makes of it before anything is read."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from magicpig import Config
from magicpig.errors import ArgumentError, ArgumentTypeError
from magicpig.integrations.transformers import MagicPigCache, attach
from magicpig.integrations.transformers.compat import cache_argument, cache_of
from magicpig.integrations.transformers.errors import CacheMismatchError, GradientError
from magicpig.integrations.transformers.shapes import key_dtype, layer_shapes, token_limit
from magicpig.store.planner import plan

Tiny = Callable[[str], PreTrainedModel]
Tokens = Callable[..., Tensor]


def decoder(kind: str = "llama", **settings: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=97, num_key_value_heads=1, head_dim=16, **sizes, **settings)
    config.eos_token_id, config.pad_token_id = None, 0
    return config


def rope(kind: str, factor: float | None = None, original: int | None = None, **more: Any) -> dict[str, Any]:
    given = {"rope_theta": 1e4, "factor": factor, "original_max_position_embeddings": original, **more}
    return {"rope_type": kind, **{name: value for name, value in given.items() if value is not None}}


# --- how long a context may be ----------------------------------------------------------------------------------------

LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
GEMMA3 = {"full_attention": rope("linear", 8.0), "sliding_attention": rope("default")}


@pytest.mark.parametrize(
    ("stated", "scaling", "limit"),
    [
        (256, rope("default"), 256),
        (256, rope("yarn", 4.0, 256), 1024),
        (256, rope("yarn", 4.0), 1024),
        (320, rope("yarn", 4.0, 256), 1024),  # Qwen3 states a little more than the original
        (1024, rope("yarn", 4.0, 256), 1024),  # raised already
        (256, rope("linear", 2.0), 512),
        (256, rope("dynamic", 2.5), 640),
        (1024, rope("llama3", 32.0, 256, **LLAMA3), 1024),  # Llama 3.2: its card says what it states
        (512, rope("longrope", None, 128, **LONG), 512),
    ],
)
def test_the_limit_is_what_the_scaling_says(stated: int, scaling: dict[str, Any], limit: int) -> None:
    assert token_limit(decoder(max_position_embeddings=stated, rope_parameters=scaling)) == limit


def test_the_limit_of_layers_that_are_scaled_differently() -> None:
    config = decoder("gemma3_text", max_position_embeddings=512, rope_parameters=GEMMA3)
    assert token_limit(config) == 512  # Gemma 3 was trained for that many


def test_a_model_without_a_stated_limit() -> None:
    assert token_limit(AutoConfig.for_model("bloom")) is None


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_prompts_beyond_the_original_length(kind: str, tokens: Tokens) -> None:
    original = 64 if kind == "yarn" else None
    torch.manual_seed(0)
    config = decoder(max_position_embeddings=64, rope_parameters=rope(kind, 4.0, original))
    model, ids = AutoModelForCausalLM.from_config(config).eval(), tokens(1, 150)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    assert torch.equal(attach(model).generate(ids, **options), expected)
    with pytest.raises(ArgumentError, match=r"150 tokens and 107 are to be generated, but the model's limit is 256"):
        model.generate(ids, **{**options, "max_new_tokens": 107})


def test_an_argument_overrules_the_limit(tokens: Tokens) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(decoder(max_position_embeddings=64)).eval()
    ids = tokens(1, 100)
    with pytest.raises(ArgumentError, match=r"limit is 64 .*attach\(model, max_length=\.\.\.\) overrules it"):
        attach(model).generate(ids, max_new_tokens=4)
    assert attach(model, max_length=104).generate(ids, max_new_tokens=4).shape == (1, 104)
    assert copy.deepcopy(model).generate(ids, max_new_tokens=4).shape == (1, 104)
    with pytest.raises(ArgumentError, match=r"limit is 104 \(max_length of attach\)"):
        model.generate(ids, max_new_tokens=5)
    with pytest.raises(ArgumentError, match="limit is 64"):
        attach(model).generate(ids, max_new_tokens=4)


@pytest.mark.parametrize(("length", "error"), [(0, ArgumentError), (1.5, ArgumentTypeError), (True, ArgumentTypeError)])
def test_lengths_that_are_none(length: Any, error: type[Exception], tiny: Tiny) -> None:
    with pytest.raises(error, match=f"max_length={length!r} must be"):
        attach(tiny("llama"), max_length=length)


def test_the_limit_counts_what_the_cache_holds(tiny: Tiny, tokens: Tokens) -> None:
    """New tokens alone, with a mask that covers the rest, which is in the cache."""
    model, ids = attach(tiny("llama")), tokens(1, 510)
    cache = MagicPigCache(model.config)
    with torch.no_grad():
        model(ids[:, :500], **cache_argument(cache))
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    with pytest.raises(ArgumentError, match="the prompt has 510 tokens and 3 are to be generated"):
        model.generate(ids[:, 500:], cache=cache, max_new_tokens=3, **options)
    found = model.generate(ids[:, 500:], cache=cache, max_new_tokens=2, **options)[:, -2:]
    assert torch.equal(found, model.generate(ids, max_new_tokens=2, **options)[:, -2:])


def test_a_prompt_with_nothing_new_in_it(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = attach(tiny("llama")), tokens(1, 30)
    cache = MagicPigCache(model.config)
    with torch.no_grad():
        model(ids, **cache_argument(cache))
    for prompt in (ids, ids[:, :7]):
        with pytest.raises(ArgumentError, match=rf"the prompt has {prompt.shape[1]} tokens and the cache holds 30"):
            model.generate(prompt, cache=cache, max_new_tokens=2)


# --- caches of other models -------------------------------------------------------------------------------------------


def test_a_cache_of_another_model(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = attach(tiny("llama")), tokens(1, 10)
    fewer = MagicPigCache(decoder(), Config())
    fewer.layers = fewer.layers[:1]
    with pytest.raises(CacheMismatchError, match=r"it has 1 layers, LlamaForCausalLM 2"):
        model.generate(ids, cache=fewer, max_new_tokens=2)
    with pytest.raises(CacheMismatchError, match=r"it has 1 layers, the model at least 2"), torch.no_grad():
        model(ids, **cache_argument(fewer))
    with pytest.raises(CacheMismatchError, match=r"layer 0 has a window of 8 tokens, that of LlamaForCausalLM of None"):
        model.generate(ids, cache=MagicPigCache(tiny("gemma2").config), max_new_tokens=2)


def test_a_cache_filled_by_another_model(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = attach(tiny("llama")), tokens(1, 10)
    torch.manual_seed(0)
    other = attach(AutoModelForCausalLM.from_config(decoder()).eval())
    cache = MagicPigCache(other.config)
    with torch.no_grad():
        other(ids[:, :5], **cache_argument(cache))
    message = "its layer 0 holds 1 key/value heads of 16 numbers, not 2 of 16"
    with pytest.raises(CacheMismatchError, match=message):
        model.generate(ids, cache=cache, max_new_tokens=2)
    with pytest.raises(CacheMismatchError, match=message), torch.no_grad():
        model(ids, **cache_argument(cache))


# --- generation settings ----------------------------------------------------------------------------------------------


@pytest.fixture
def llama(tiny: Tiny) -> Any:
    """With generation settings of its own."""
    return copy.deepcopy(tiny("llama"))


def test_beams_in_the_settings_are_honoured(llama: Any, tokens: Tokens) -> None:
    llama.generation_config.num_beams = 3
    ids = tokens(1, 20)
    expected = llama.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(attach(llama).generate(ids, max_new_tokens=6, do_sample=False), expected)


def test_no_cache_in_the_settings_is_overruled_with_a_word(llama: Any, tokens: Tokens) -> None:
    llama.generation_config.use_cache = False
    attach(llama)
    with pytest.warns(UserWarning, match="say use_cache=False, by which nothing would be sampled, and are overruled"):
        output = llama.generate(tokens(1, 20), max_new_tokens=3, return_dict_in_generate=True)
    assert isinstance(cache_of(output), MagicPigCache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = llama.generate(tokens(1, 20), max_new_tokens=3, return_dict_in_generate=True, use_cache=False)
    assert cache_of(output) is None


def test_a_cache_and_no_cache(llama: Any, tokens: Tokens) -> None:
    with pytest.raises(ArgumentError, match=r"use_cache=False and \w+= contradict each other"):
        attach(llama).generate(tokens(1, 20), use_cache=False, cache=MagicPigCache(llama.config))


def test_stop_strings_need_the_tokenizer(llama: Any, tokens: Tokens) -> None:
    llama.generation_config.stop_strings = ["end"]
    with pytest.raises(ArgumentError, match=r"stop_strings=\['end'\] need the tokenizer"):
        attach(llama).generate(tokens(1, 20), max_new_tokens=3)


def test_an_argument_of_none_overrules_the_settings(llama: Any, tokens: Tokens) -> None:
    llama.generation_config.cache_implementation = "static"
    attach(llama)
    with pytest.raises(ArgumentError, match="cache_implementation='static' is not supported"):
        llama.generate(tokens(1, 20), max_new_tokens=3)
    assert llama.generate(tokens(1, 20), max_new_tokens=3, cache_implementation=None).shape == (1, 23)


def test_attention_weights_in_the_settings(llama: Any, tokens: Tokens) -> None:
    llama.generation_config.output_attentions = True
    with pytest.raises(ArgumentError, match="attention weights are never computed; unset it"):
        attach(llama).generate(tokens(1, 20), max_new_tokens=3)


# --- training and compiling -------------------------------------------------------------------------------------------


def test_a_loss_over_the_cache_is_refused(llama: Any, tokens: Tokens) -> None:
    ids = tokens(1, 20)
    llama(ids, labels=ids).loss.backward()
    weight = llama.model.layers[0].self_attn.k_proj.weight
    right = weight.grad.clone()
    llama.zero_grad()
    attach(llama)
    with pytest.raises(GradientError, match=r"no gradients: for a loss, pass use_cache=False, or detach\(model\)"):
        llama(ids, labels=ids, **cache_argument(MagicPigCache(llama.config)))
    llama(ids, labels=ids, use_cache=False).loss.backward()
    torch.testing.assert_close(weight.grad, right, atol=1e-5, rtol=1e-3)
    # Nothing to differentiate: nothing to refuse.
    llama.requires_grad_(False)
    llama(ids, **cache_argument(MagicPigCache(llama.config)))


def test_gradients_of_queries_alone(llama: Any, tokens: Tokens) -> None:
    """As of adapters of the query projection of the first layer."""
    attach(llama).requires_grad_(False)
    llama.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    with pytest.raises(GradientError):
        llama(tokens(1, 20), **cache_argument(MagicPigCache(llama.config)))


@pytest.mark.parametrize(
    ("part", "budget"),
    [
        ("one attention", 4),
        # A minute, for all that is around the attention.
        pytest.param("whole", 4, marks=pytest.mark.slow),
        pytest.param("whole", 1e9, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_forward_generates_the_same(part: str, budget: float, tokens: Tokens) -> None:
    """Compiled by torch's front end alone: how it deals with the cache, not what it makes of the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(decoder()).eval()
    ids = tokens(1, 30)
    settings: dict[str, Any] = {"sinks": 2, "recent": 6, "block": 8, "exact_below": 0, "dense_layers": ()}
    attach(model, sampler="sketch", budget=budget, **settings)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    module = model if part == "whole" else model.model.layers[1].self_attn
    module.forward = torch.compile(module.forward, backend="eager", dynamic=True)
    try:
        assert torch.equal(model.generate(ids, **options), expected)
    finally:
        torch._dynamo.reset()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_weights_of_eight_bits_are_planned_by_the_keys(
    llama: Any, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    def watch(*args: Any, dtype: torch.dtype, **kwargs: Any) -> Any:
        seen.append(dtype)
        return plan(*args, dtype=dtype, **kwargs)

    monkeypatch.setattr(sys.modules[attach.__module__], "plan", watch)
    attach(llama).generate(tokens(1, 5), max_new_tokens=2)
    llama.config.dtype = torch.bfloat16
    monkeypatch.setattr(type(llama), "dtype", torch.float8_e4m3fn)
    assert key_dtype(llama) == torch.bfloat16
    llama.generate(tokens(1, 5), max_new_tokens=2)
    llama.config.dtype = None
    assert key_dtype(llama) == torch.bfloat16
    assert seen == [torch.float32, torch.bfloat16]
    assert layer_shapes(llama.config, Config())[0].kv_heads == 2
