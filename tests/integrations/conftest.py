"""Tiny models of every supported family, with random weights spread so that no two tokens tie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from magicpig.integrations.transformers import attach, detach

VOCABULARY = 97
SLIDING_AND_FULL = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Families in which every query head has keys of its own.
UNGROUPED = {"gpt_neox", "gpt2", "opt", "persimmon", "gptj", "codegen"}
# A name is a model type, and after a dash what is special about it.
SPECIAL: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "mistral-sliding": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**SLIDING_AND_FULL, "query_pre_attn_scalar": 16},
    "gpt_oss": {**SLIDING_AND_FULL, "num_local_experts": 2, "num_experts_per_tok": 1},
    "ministral": SLIDING_AND_FULL,
    "gemma4_text": {**SLIDING_AND_FULL, "global_head_dim": 32},
    "olmo3": SLIDING_AND_FULL,
    "cohere2": SLIDING_AND_FULL,
    "exaone4": SLIDING_AND_FULL,
    "afmoe": {
        **SLIDING_AND_FULL,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "moe_intermediate_size": 32,
    },
    "gptj": {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "n_positions": 512},
    "codegen": {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "n_positions": 512},
}


@lru_cache(maxsize=8)
def build(name: str) -> PreTrainedModel:
    kind = name.split("-")[0]
    sizes = {key: size for key, size in SIZES.items() if kind not in UNGROUPED or key != "num_key_value_heads"}
    config = AutoConfig.for_model(kind, **{**sizes, **SPECIAL.get(name, {})})
    config.pad_token_id, config.eos_token_id = 0, None  # some families ignore them above
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter, weights in model.named_parameters():
            if weights.ndim >= 2:
                weights.normal_(0, 0.15)
            elif "sinks" in parameter:
                weights.normal_(0, 1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(autouse=True)
def _quiet_transformers() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture
def tiny() -> Iterator[Callable[[str], PreTrainedModel]]:
    """`tiny("llama")`: an eager model in float32, the same for every test; detached again afterwards."""
    used: list[PreTrainedModel] = []

    def get(name: str) -> PreTrainedModel:
        used.append(build(name))
        return used[-1]

    yield get
    for model in used:
        detach(model)


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """`tokens(B, N, seed=0)`: random prompts without special tokens."""

    def get(B: int, N: int, seed: int = 0) -> Tensor:
        return torch.randint(2, VOCABULARY, (B, N), generator=torch.Generator().manual_seed(seed))

    return get


@pytest.fixture
def generate() -> Callable[..., Any]:
    """`generate(model, ids, **options)`: greedy, unpadded and with logits, unless told otherwise."""

    def run(model: PreTrainedModel, ids: Tensor, **options: Any) -> Any:
        torch.manual_seed(7)
        defaults: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": 24,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        return model.generate(ids, **{**defaults, **options})

    return run


@pytest.fixture
def both(generate: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """`both(model, ids, **options)`: what the eager model generates, and what the attached one does."""

    def run(model: PreTrainedModel, ids: Tensor, **options: Any) -> tuple[Any, Any]:
        return generate(detach(model), ids, **options), generate(attach(model), ids, **options)

    return run
