"""attach and detach: what is refused, in which words, and that nothing is left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel

from magicpig import Config
from magicpig.config_file import ConfigFileError, to_text
from magicpig.errors import InsufficientMemoryError
from magicpig.integrations.transformers import MagicPigCache, UnsupportedModelError, attach, detach
from magicpig.integrations.transformers.compat import CACHE, cache_argument

Tiny = Callable[[str], PreTrainedModel]
Tokens = Callable[..., Tensor]
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "llama4_text": ({}, "layers of type chunked_attention"),
    "mamba": ({}, "layers of type linear_attention"),
    "minimax": ({}, "layers of type linear_attention"),
    "qwen3_next": ({}, "layers of type linear_attention"),
    "falcon_h1": ({}, "layers of type hybrid"),
    "lfm2": ({"full_attn_idxs": [1]}, "layers of type conv"),
    "deepseek_v3": ({}, "multi-head latent attention"),
    "minicpm3": ({}, "multi-head latent attention"),
    "bloom": ({}, "without transformers' interface"),
    "mpt": ({}, "without transformers' interface"),
    "diffllama": ({}, "there is no chunk of them"),
    "doge": ({}, "there is no transpose of them"),
    "jetmoe": ({"num_local_experts": 2, "kv_channels": 16}, "repeats the keys for each of its experts"),
    "mimo_v2_flash": ({}, r"its keys have shape \(1, \d+, 2, \d+\) and its values"),
    "gemma4_text": (
        {"num_kv_shared_layers": 1, "num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
        r"its last 1 layers attend to the keys of earlier ones \(num_kv_shared_layers\)",
    ),
    "xlstm": ({}, "does not take a cache of keys and values"),
}


if CACHE != "cache":  # these have the interface since 5.24
    REFUSED |= dict.fromkeys(
        ["gptj", "codegen"],
        ({"n_embd": 32, "n_head": 2, "n_layer": 2, "rotary_dim": 8}, "without transformers' interface"),
    )


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_work(kind: str) -> None:
    extra, reason = REFUSED[kind]
    try:
        config = AutoConfig.for_model(kind, **{**SIZES, **extra})
    except ValueError as error:
        if "Unrecognized model identifier" in str(error):
            pytest.skip(f"this transformers does not know {kind}")
        raise
    model = AutoModelForCausalLM.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=f"^model type '{kind}' is not supported: .*{reason}"):
        attach(model)
    assert model.config._attn_implementation == before
    assert not model.generate.__module__.startswith("magicpig")


def test_encoder_decoder_models() -> None:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", vocab_size=50, **sizes))
    with pytest.raises(UnsupportedModelError, match="'bart' is not supported: it is an encoder-decoder"):
        attach(model)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "llama"], ids=["a module", "a name"])
def test_things_that_are_no_model(model: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a transformers model that generates text, got (Linear|str);"):
        attach(model)


def test_settings_by_name_or_as_config(tiny: Tiny) -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="K=99"):
        attach(model, K=99)
    with pytest.raises(ValueError, match="give either config or settings by name, not both"):
        attach(model, Config(), K=9)
    assert model.config._attn_implementation == "eager"
    assert attach(model, K=9, L=120) is model


def test_settings_in_a_file(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(to_text(Config(K=7, layers={1: {"sampler": "full"}}), {}))
    model = attach(tiny("llama"), path)
    assert model.__dict__["_magicpig"].config == Config(K=7, layers={1: {"sampler": "full"}})
    with pytest.raises(ConfigFileError, match=r"none\.json"):
        attach(model, str(tmp_path / "none.json"))


def test_attaching_again_replaces_the_settings(tiny: Tiny, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watch(cache: MagicPigCache, *args: Any, **where: Any) -> None:
        made(cache, *args, **where)
        seen.append(cache.config.K)

    made = MagicPigCache.__init__
    monkeypatch.setattr(MagicPigCache, "__init__", watch)
    model = attach(attach(tiny("llama"), K=8), K=9)
    seen.clear()
    model.generate(tokens(1, 5), max_new_tokens=2)
    assert seen == [9]


@pytest.mark.parametrize("again", [False, True])
def test_settings_for_layers_that_are_not_there(again: bool, tiny: Tiny) -> None:
    model = attach(tiny("gemma2")) if again else tiny("gemma2")
    with pytest.raises(ValueError, match=r"^layers\.2: the model has layers 0 to 1$"):
        attach(model, layers={2: {"sampler": "full"}})
    with pytest.raises(ValueError, match=r"^layers\.0: the layer attends to a sliding window, of which all is read$"):
        attach(model, layers={0: {"budget": 50}})


def test_detach_restores_everything(tiny: Tiny, tokens: Tokens) -> None:
    model = tiny("llama")
    names, generate, kind = set(model.__dict__), model.generate, type(model)
    attach(attach(model))
    assert model.config._attn_implementation == "magicpig"
    assert model.generate.__doc__ == generate.__doc__
    assert detach(model) is model
    assert model.config._attn_implementation == "eager"
    assert set(model.__dict__) == names
    assert model.generate == generate
    assert type(model) is kind
    assert detach(model) is model


def test_generate_still_checks_its_arguments(tiny: Tiny, tokens: Tokens) -> None:
    with pytest.raises(ValueError, match="no_such_option"):
        attach(tiny("llama")).generate(tokens(1, 5), no_such_option=1)


@pytest.mark.parametrize("how", ["inputs", "input_ids"])
def test_empty_prompts(how: str, tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=r"the prompt is empty: input of shape \(1, 0\)"):
        attach(tiny("llama")).generate(**{how: torch.zeros(1, 0, dtype=torch.int64)}, max_new_tokens=2)


@pytest.mark.parametrize(
    "length",
    [{"max_new_tokens": 13}, {"max_length": 513}, {"generation_config": GenerationConfig(max_new_tokens=13)}],
    ids=["max_new_tokens", "max_length", "generation_config"],
)
def test_prompts_beyond_the_models_limit(length: dict[str, Any], tiny: Tiny, tokens: Tokens) -> None:
    with pytest.raises(
        ValueError, match="prompt has 500 tokens and 13 are to be generated, but the model's limit is 512"
    ):
        attach(tiny("llama")).generate(tokens(1, 500), **length)


def test_a_prompt_that_just_fits(tiny: Tiny, tokens: Tokens) -> None:
    model = attach(tiny("llama"))
    assert model.generate(tokens(1, 500), max_new_tokens=12, do_sample=False).shape == (1, 512)
    with pytest.warns(UserWarning, match="model-agnostic default `max_length`"):
        assert model.generate(tokens(1, 505), do_sample=False).shape == (1, 512)  # transformers stops at the limit


def test_prompts_that_do_not_fit_into_memory(tiny: Tiny, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every beam and every answer needs its own; what the given cache holds already counts as free."""
    model, ids = attach(tiny("llama")), tokens(2, 290)
    # One block of 512 rows for 2 x (32 + 32) numbers of 4 bytes, in 2 layers, per sequence
    one = 512 * 2 * 64 * 4 * 2
    free = 2 * one
    monkeypatch.setattr(sys.modules[attach.__module__], "free_memory", lambda: free)
    cache = MagicPigCache(model.config)
    out = model.generate(ids, **cache_argument(cache), max_new_tokens=2)
    for options in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        with pytest.raises(InsufficientMemoryError, match=r"^4 sequences of 292 tokens need"):
            model.generate(ids, max_new_tokens=2, **options)
    free = 0
    model.generate(out, attention_mask=torch.ones_like(out), **cache_argument(cache), max_new_tokens=2)
    with pytest.raises(InsufficientMemoryError, match=r"^2 sequences of 294 tokens need"):
        model.generate(out, max_new_tokens=2)


@pytest.mark.parametrize("where", ["argument", "generation_config"])
def test_cache_implementation_is_refused(where: str, tiny: Tiny, tokens: Tokens) -> None:
    options: dict[str, Any] = {"cache_implementation": "static"}
    if where == "generation_config":
        options = {"generation_config": GenerationConfig(**options)}
    with pytest.raises(ValueError, match="cache_implementation='static' is not supported"):
        attach(tiny("llama")).generate(tokens(1, 5), **options)


def test_assistance_on_a_filled_cache_is_refused(tiny: Tiny, tokens: Tokens) -> None:
    """transformers would feed the whole prompt a second time."""
    model, ids = attach(tiny("llama")), tokens(1, 20)
    cache = MagicPigCache(model.config)
    model.generate(ids, **cache_argument(cache), max_new_tokens=3)
    with pytest.raises(ValueError, match="cannot continue a filled cache in assisted generation"):
        model.generate(ids, **cache_argument(cache), prompt_lookup_num_tokens=3)


def test_attention_weights_are_refused(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = attach(tiny("llama")), tokens(1, 5)
    with pytest.raises(ValueError, match="output_attentions=True: attention weights are never computed"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="output_attentions=True: attention weights are never computed"):
        model(ids, output_attentions=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": False}, "packed sequences"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, r"expected \(batch, positions\)"),
        ({"attention_mask": torch.tensor([[0, 1]])}, "attention_mask has 2 columns"),
    ],
    ids=["packed sequences", "a mask of four dimensions", "a mask too short"],
)
def test_masks_that_are_refused(options: dict[str, Any], message: str, tiny: Tiny, tokens: Tokens) -> None:
    with pytest.raises(ValueError, match=message):
        attach(tiny("llama"))(tokens(1, 6), **options)


def test_attention_dropout_is_refused(tiny: Tiny, tokens: Tokens) -> None:
    config = AutoConfig.for_model("llama", **SIZES, attention_dropout=0.1)
    model = attach(AutoModelForCausalLM.from_config(config)).train()
    with pytest.raises(ValueError, match=r"dropout=0\.1 of attention is not supported"):
        model(tokens(1, 6) % 50)


def test_generating_without_a_cache(tiny: Tiny, tokens: Tokens) -> None:
    model, ids = tiny("llama"), tokens(1, 10)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(attach(model).generate(ids, max_new_tokens=5, do_sample=False, use_cache=False), expected)
