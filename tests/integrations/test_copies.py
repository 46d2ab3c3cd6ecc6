"""Copies, pickles and wrappers of attached models and of caches."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from magicpig import Config
from magicpig.errors import ArgumentTypeError
from magicpig.integrations.transformers import MagicPigCache, UnsupportedModelError, attach, detach
from magicpig.integrations.transformers.compat import cache_argument

Tiny = Callable[[str], PreTrainedModel]
Tokens = Callable[..., Tensor]


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def fresh(model: PreTrainedModel) -> Any:
    """The same without what other tests left in it: transformers' hooks for output_attentions cannot be pickled."""
    config = copy.deepcopy(model.config)
    other = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    other.load_state_dict(model.state_dict())
    other.generation_config = copy.deepcopy(model.generation_config)
    return other


def replica(model: Any) -> Any:
    """As nn.DataParallel makes them."""
    other = model.__new__(type(model))
    other.__dict__ = {**model.__dict__, "_modules": dict(model._modules)}
    return other


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy and new weights": lambda model: copy.deepcopy(copy.copy(model)),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "old pickle": lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
    "torch.save": saved,
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, **options}
    tokens: Tensor = model.generate(ids, **options)
    return tokens


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_generates_with_its_own_weights(how: str, tiny: Tiny, tokens: Tokens) -> None:
    model, ids = fresh(tiny("llama")), tokens(1, 40)
    plain = copy.deepcopy(model)
    attach(model, sampler="full")
    before = generate(model, ids)
    other = COPIES[how](model)
    with torch.no_grad():
        for weights in [*other.parameters(), *plain.parameters()]:
            if weights.ndim >= 2:
                weights.mul_(1.7)
    assert torch.equal(generate(other, ids), generate(plain, ids))
    assert torch.equal(generate(model, ids), before)
    assert not torch.equal(generate(plain, ids), before)
    # Attached by itself: with settings and an end of its own.
    cache = MagicPigCache(other.config)
    with pytest.raises(ValueError, match="cannot continue a filled cache in assisted generation"):
        generate(other, ids, cache=_filled(other, ids, cache), prompt_lookup_num_tokens=2)
    assert type(detach(other)) is type(plain)
    assert other.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "magicpig"
    with pytest.raises(ValueError, match="cannot continue a filled cache"):
        generate(model, ids, cache=_filled(model, ids, MagicPigCache(model.config)), prompt_lookup_num_tokens=2)


def _filled(model: Any, ids: Tensor, cache: MagicPigCache) -> MagicPigCache:
    with torch.no_grad():
        model(ids[:, :20], **cache_argument(cache))
    return cache


def test_a_shallow_copy_follows_its_own_modules(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = attach(tiny("llama")), tokens(1, 40)
    before = generate(model, ids)
    for other in (copy.copy(model), replica(model)):
        other.__dict__["_modules"] = dict(other._modules)
        other._modules["lm_head"] = nn.Linear(64, 97, bias=False)
        found = generate(other, ids)
        assert not torch.equal(found, before)
        assert torch.equal(generate(model, ids), before)


def test_moving_and_converting_keep_a_model_attached(tiny: Tiny, tokens: Tokens) -> None:
    model = attach(copy.deepcopy(tiny("llama")), K=7)
    for moved in (model.to("cpu"), model.double(), model.bfloat16(), model.float(), model.train().eval()):
        assert moved is model
    with pytest.raises(ValueError, match="give one of them"):
        model.generate(tokens(1, 5), cache=MagicPigCache(model.config), past_key_values=MagicPigCache(model.config))


def test_quantising_a_copy(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = attach(tiny("llama")), tokens(1, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated, and has nothing to replace it for a CPU
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        reference = torch.ao.quantization.quantize_dynamic(detach(copy.deepcopy(model)), {nn.Linear}, dtype=torch.qint8)
        assert torch.equal(generate(quantised, ids), generate(reference, ids))


def test_saving_says_nothing_of_us(tiny: Tiny, tokens: Tokens, tmp_path: Path) -> None:
    model = attach(tiny("llama"))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert "magicpig" not in (tmp_path / "config.json").read_text().lower()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(generate(loaded, tokens(1, 20)), generate(model, tokens(1, 20)))


def test_a_class_put_in_front_of_ours(tiny: Tiny, tokens: Tokens) -> None:
    """FSDP2 does so. Ours stays behind it and does nothing once detached."""
    model, ids = attach(copy.deepcopy(tiny("llama"))), tokens(1, 20)
    expected = generate(tiny("llama"), ids)
    model.__class__ = type("Sharded", (type(model),), {})
    assert torch.equal(generate(model, ids), expected)
    assert detach(model).config._attn_implementation == "eager"
    assert torch.equal(generate(model, ids), expected)
    assert type(model).__name__ == "Sharded"
    assert attach(model).config._attn_implementation == "magicpig"
    assert torch.equal(generate(model, ids), expected)


def test_an_error_survives_a_pickle() -> None:
    error = UnsupportedModelError("llama", "because")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "model type 'llama' is not supported: because"
    assert again.code == "unsupported_model"
    assert isinstance(again, ValueError)


# --- caches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_deep_copy_of_a_cache_is_a_fork(family: str, tiny: Tiny, tokens: Tokens) -> None:
    """transformers' documentation reads a prompt once and copies the cache for each question."""
    model, ids = attach(tiny(family)), tokens(1, 60)
    config = Config(sampler="sketch", sinks=2, recent=6, block=8, exact_below=0, dense_layers=())
    prompt = _filled(model, ids, MagicPigCache(model.config, config))
    whole = generate(model, ids, cache=_filled(model, ids, MagicPigCache(model.config, config)))
    for _ in range(2):
        other = copy.deepcopy(prompt)
        assert torch.equal(generate(model, ids, cache=other), whole)
    assert prompt.get_seq_length() == 20
    assert copy.deepcopy({"a": [prompt]})["a"][0].get_seq_length() == 20


def test_pickling_a_cache_says_what_works(tiny: Tiny) -> None:
    with pytest.raises(ArgumentTypeError, match=r"cannot be pickled; fork\(\) or copy\.deepcopy"):
        pickle.dumps(MagicPigCache(tiny("llama").config))
