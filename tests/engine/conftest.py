"""Tiny models and a tokenizer for them; one thread, since all is small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from magicpig import Config, attach, detach
from magicpig.engine.llm import LLM
from magicpig.engine.observer import Observer, StepRecord
from magicpig.studies import pocket

VOCABULARY = 97
SPECIAL: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gpt_oss": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
}


@lru_cache(maxsize=8)
def _build(kind: str, copy: int = 0) -> PreTrainedModel:
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **SPECIAL.get(kind, {}),
    )
    config.pad_token_id, config.eos_token_id = 0, None  # some families ignore them above
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim >= 2:
                weights.normal_(0, 0.15)  # far enough apart that no two tokens tie
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(autouse=True)
def _quiet_and_alone(one_thread: None) -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Of the pocket model; tiny models know its first tokens."""
    return AutoTokenizer.from_pretrained(pocket.path())


@pytest.fixture
def llm(tokenizer: Any) -> Iterator[Callable[..., LLM]]:
    """`llm("llama", config, **options)`: closed after the test."""
    made: list[LLM] = []

    def make(kind: str = "llama", *arguments: Any, **options: Any) -> LLM:
        made.append(LLM(_build(kind), tokenizer, *arguments, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Reading(Observer):
    """Counts the tokens of prompts that are read."""

    def __init__(self) -> None:
        self.tokens = 0

    def on_step(self, record: StepRecord) -> None:
        self.tokens += record.prefill_tokens


@pytest.fixture
def reading() -> Reading:
    """An observer that counts the tokens of prompts that are read."""
    return Reading()


@pytest.fixture
def build() -> Callable[[str], PreTrainedModel]:
    """`build("llama")`: a network, the same for every test."""
    return _build


@pytest.fixture
def alone() -> Callable[..., list[int]]:
    """`alone("llama", config, prompt, seed=3)`: the 16 new tokens of `generate`, one request on its own."""

    def run(kind: str, config: Config, prompt: list[int], *, seed: int = 3) -> list[int]:
        model = attach(_build(kind, copy=1), config)  # one that no engine has
        ids = torch.tensor([prompt])
        torch.manual_seed(seed)
        settings: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, **settings)
        detach(model)
        return out[0, len(prompt) :].tolist()

    return run


@pytest.fixture
def prompts() -> list[list[int]]:
    """Ragged: the longest is indexed by `SAMPLED`, the shortest has one token."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in (70, 5, 41, 17, 1, 130)]
