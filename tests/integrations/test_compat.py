"""The names that transformers changes: what is called `cache` since 5.24 was `past_key_values` before."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import AutoConfig, DynamicCache, PreTrainedModel

import magicpig
from magicpig import Config
from magicpig.errors import ArgumentError, ArgumentTypeError
from magicpig.integrations.transformers import MagicPigCache, attach, compat
from magicpig.integrations.transformers.compat import CACHE, cache_argument, cache_of, take_cache

Tiny = Callable[[str], PreTrainedModel]
Tokens = Callable[..., Tensor]
NAMES = ["cache", "past_key_values"]


def test_the_name_is_that_of_this_transformers(tiny: Tiny, tokens: Tokens) -> None:
    assert ("cache" if Version(transformers.__version__) >= Version("5.24.0") else "past_key_values") == CACHE
    with torch.no_grad():
        assert isinstance(cache_of(tiny("llama")(tokens(1, 3), use_cache=True)), DynamicCache)


def test_only_compat_speaks_of_either_name() -> None:
    """In a call, an attribute or a key. Texts that explain the names are no contact."""
    contact = re.compile(r"(?<![\w`])past_key_values\s*=|\.past_key_values\b|[\"']past_key_values[\"']")
    root = Path(magicpig.__file__).parent
    found = [
        path.name for path in root.rglob("*.py") if path.name != "compat.py" and contact.search(path.read_text("utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize("name", NAMES)
def test_both_names_mean_the_same_and_neither_warns(name: str, tiny: Tiny, tokens: Tokens) -> None:
    model, ids = tiny("llama"), tokens(1, 40)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    attach(model)
    cache = MagicPigCache(model.config, Config(sampler="full"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options: dict[str, Any] = {name: cache, "max_new_tokens": 6, "do_sample": False}
        output = model.generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(output.sequences, expected)
    assert cache_of(output) is cache
    assert cache.get_seq_length() == 45


@pytest.mark.parametrize("name", NAMES)
def test_checks_apply_under_either_name(name: str, tiny: Tiny, tokens: Tokens) -> None:
    model, ids = attach(tiny("llama")), tokens(1, 40)
    filled = MagicPigCache(model.config)
    with torch.no_grad():
        model(ids[:, :20], **cache_argument(filled))
    options: dict[str, Any] = {name: filled}
    with pytest.raises(ValueError, match="cannot continue a filled cache in assisted generation"):
        model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=2, **options)


def test_arguments_by_position_are_checked_too(tiny: Tiny, tokens: Tokens) -> None:
    """The seventh argument of generate is the assistant."""
    model, ids = attach(tiny("llama")), tokens(1, 40)
    filled = MagicPigCache(model.config)
    with torch.no_grad():
        model(ids[:, :20], **cache_argument(filled))
    with pytest.raises(ValueError, match="cannot continue a filled cache in assisted generation"):
        model.generate(ids, None, None, None, None, None, tiny("gemma2"), cache=filled, max_new_tokens=2)
    with pytest.raises(TypeError, match="multiple values for argument 'inputs'"):
        model.generate(ids, inputs=ids)


def test_both_names_at_once(tiny: Tiny, tokens: Tokens) -> None:
    model = attach(tiny("llama"))
    cache = MagicPigCache(model.config)
    with pytest.raises(ArgumentError, match="cache and past_key_values are names of the same argument"):
        model.generate(tokens(1, 5), cache=cache, past_key_values=cache)
    model.generate(tokens(1, 5), cache=cache, past_key_values=None, max_new_tokens=2)
    assert cache.get_seq_length() == 6


def test_things_that_are_no_cache(tiny: Tiny, tokens: Tokens) -> None:
    with pytest.raises(ArgumentTypeError, match="must be a MagicPigCache or None, got tuple"):
        attach(tiny("llama")).generate(tokens(1, 5), cache=())


def test_a_name_that_forward_does_not_know_is_not_ignored(tiny: Tiny, tokens: Tokens) -> None:
    """transformers hands unknown arguments on; the model would make a cache of its own without a word."""
    if CACHE == "cache":
        pytest.skip("this transformers knows both names")
    model = attach(tiny("llama"))
    with pytest.raises(ArgumentError, match="it calls its cache past_key_values"), torch.no_grad():
        model(tokens(1, 5), cache=MagicPigCache(model.config))


def test_taking_a_cache_removes_every_name() -> None:
    arguments: dict[str, Any] = {"cache": None, "past_key_values": 1, "cache_params": None, "other": 2}
    assert take_cache(arguments) == 1
    assert arguments == {"other": 2}
    assert take_cache(arguments) is None


@pytest.mark.parametrize("shared", [0, 1])
def test_shared_layers_have_a_type_in_every_version(shared: int) -> None:
    own = ["full_attention", "sliding_attention", "full_attention"]
    settings = {"num_hidden_layers": 3, "layer_types": own, "num_kv_shared_layers": shared}
    types, arguments = compat.layer_types(AutoConfig.for_model("gemma4_text", **settings))
    assert types == own[: 3 - shared] + [compat.SHARED] * shared
    assert len(arguments) == 3
