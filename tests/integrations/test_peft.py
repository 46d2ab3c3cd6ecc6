"""PEFT models: adapters around an attached model, and attach around adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from magicpig.integrations.transformers import MagicPigCache, UnsupportedModelError, attach, detach
from magicpig.integrations.transformers.compat import cache_of

peft = pytest.importorskip("peft")

pytestmark = [  # PEFT's own
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

Tiny = Callable[[str], PreTrainedModel]
Tokens = Callable[..., Tensor]


def with_lora(model: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def generate(model: Any, ids: Tensor) -> Any:
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    return model.generate(input_ids=ids, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("first", ["wrapped", "attached"])
def test_adapters_before_and_after(first: str, tiny: Tiny, tokens: Tokens) -> None:
    base, ids = copy.deepcopy(tiny("llama")), tokens(1, 40)
    plain = generate(base, ids).sequences
    expected = generate(with_lora(copy.deepcopy(base)), ids).sequences
    assert not torch.equal(expected, plain)
    model = with_lora(base) if first == "wrapped" else with_lora(attach(base, K=7))
    if first == "wrapped":
        assert attach(model, K=7) is model
    output = generate(model, ids)
    assert torch.equal(output.sequences, expected)
    assert cache_of(output).config.K == 7
    copied = copy.deepcopy(model)
    with model.disable_adapter():
        assert torch.equal(generate(model, ids).sequences, plain)
    assert torch.equal(generate(copied, ids).sequences, expected)
    merged = model.merge_and_unload()
    output = generate(merged, ids)
    assert torch.equal(output.sequences, expected)
    assert isinstance(cache_of(output), MagicPigCache)
    assert detach(copied) is copied
    output = generate(copied, ids)
    assert torch.equal(output.sequences, expected)
    assert not isinstance(cache_of(output), MagicPigCache)


@pytest.mark.parametrize("first", ["wrapped", "attached"])
def test_prefixes_that_fill_the_cache_are_refused(first: str, tiny: Tiny, tokens: Tokens) -> None:
    base = copy.deepcopy(tiny("llama"))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    message = "PEFT adapter PREFIX_TUNING fills the cache by itself"
    if first == "wrapped":
        model = peft.get_peft_model(base, config)
        with pytest.raises(UnsupportedModelError, match=message):
            attach(model)
    else:
        model = peft.get_peft_model(attach(base), config).eval()
        with pytest.raises(UnsupportedModelError, match=message):
            generate(model, tokens(1, 10))


def test_virtual_tokens(tiny: Tiny, tokens: Tokens) -> None:
    base, ids = copy.deepcopy(tiny("llama")), tokens(1, 40)
    torch.manual_seed(2)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(base, config).eval()
    expected = generate(model, ids)
    found = generate(attach(model), ids)
    assert torch.equal(found.sequences, expected.sequences)
    assert cache_of(found).get_seq_length() == cache_of(expected).get_seq_length()
