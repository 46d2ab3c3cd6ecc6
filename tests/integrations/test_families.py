"""Short contexts are exact: every supported family generates, in every way, what eager attention does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from magicpig import Config
from magicpig.integrations.transformers import MagicPigCache, attach, compat, detach
from magicpig.integrations.transformers.compat import cache_argument
from magicpig.integrations.transformers.layer import MagicPigLayer
from magicpig.integrations.transformers.shapes import layer_shapes
from magicpig.store.planner import LayerShape

# Rounding of a few hundred float32 operations in another order; the logits are of size 1 (of size 10 in two families).
TOLERANCE = 1e-4

# GPT-J and CodeGen compute attention through transformers' interface since then.
NEW_INTERFACE = pytest.mark.skipif(compat.CACHE != "cache", reason="before transformers 5.24, see test_attach.py")

MAIN = ["llama", "qwen2", "qwen3", "mistral", "mistral-sliding", "gemma2", "gemma3_text", "phi3", "gpt_oss"]
OTHERS = [
    "qwen3_moe",
    "mixtral",
    "ministral",
    "gemma",
    "gemma4_text",
    "phi",
    "olmo",
    "olmo2",
    "olmo3",
    "granite",
    "cohere",
    "cohere2",
    "starcoder2",
    "gpt_neox",
    "gpt2",
    "opt",
    "glm",
    "glm4",
    "exaone4",
    "smollm3",
    "hunyuan_v1_dense",
    "ernie4_5",
    "seed_oss",
    "arcee",
    "apertus",
    "helium",
    "internlm3",
    "bitnet",
    "persimmon",
    "stablelm",
    "nemotron",
    "afmoe",
    pytest.param("gptj", marks=NEW_INTERFACE),
    pytest.param("codegen", marks=NEW_INTERFACE),
]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "several answers": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "prefill in chunks": {"prefill_chunk_size": 8},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}

Tiny = Callable[[str], PreTrainedModel]
Tokens = Callable[..., Tensor]
Both = Callable[..., tuple[Any, Any]]


def assert_same(eager: Any, ours: Any) -> None:
    assert torch.equal(eager.sequences, ours.sequences)
    assert len(eager.logits) == len(ours.logits) > 0
    for ours_now, eager_now in zip(ours.logits, eager.logits, strict=True):
        assert (ours_now - eager_now).abs().max() < TOLERANCE


def left_padded(ids: Tensor, padding: int) -> dict[str, Tensor]:
    """Options that hide the first tokens of the first sequence."""
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"attention_mask": mask}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", MAIN)
def test_main_families(family: str, mode: str, tiny: Tiny, tokens: Tokens, both: Both) -> None:
    assisted = mode == "prompt lookup"
    ids = tokens(1, 10).repeat(1, 4) if assisted else tokens(2, 30)
    assert_same(*both(tiny(family), ids, **MODES[mode]))


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("family", MAIN)
def test_left_padding_in_main_families(family: str, mode: str, tiny: Tiny, tokens: Tokens, both: Both) -> None:
    ids = tokens(2, 30)
    assert_same(*both(tiny(family), ids, **left_padded(ids, 7), **MODES[mode]))


@pytest.mark.parametrize("family", OTHERS)
def test_left_padding_in_other_families(family: str, tiny: Tiny, tokens: Tokens, both: Both) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {family}")
    ids = tokens(2, 30)
    assert_same(*both(tiny(family), ids, **left_padded(ids, 7)))


@pytest.mark.parametrize("family", MAIN + OTHERS)
def test_shapes_are_known_before_anything_runs(family: str, tiny: Tiny, tokens: Tokens) -> None:
    if family.split("-")[0] not in CONFIG_MAPPING:
        pytest.skip(f"this transformers does not know {family}")
    model, config = attach(tiny(family)), Config(dense_layers=(0,))
    cache = MagicPigCache(model.config, config)
    with torch.no_grad():
        model(tokens(1, 3), **cache_argument(cache))
    shapes = layer_shapes(model.config, config)
    for index, (layer, shape) in enumerate(zip(cache.layers, shapes, strict=True)):
        if isinstance(layer, MagicPigLayer):
            store = layer.stores[0]
            kept = LayerShape(store.kv_heads, store.head_dim, sampled=index != 0)
        else:
            kept = LayerShape(layer.keys.shape[1], layer.keys.shape[3], sampled=False, window=8)
        assert shape == replace(kept, query_heads=4)


@pytest.mark.parametrize("family", MAIN)
def test_forward_without_a_cache(family: str, tiny: Tiny, tokens: Tokens) -> None:
    model, ids = tiny(family), tokens(2, 30)
    mask = left_padded(ids, 7)["attention_mask"]
    with torch.no_grad():
        expected = detach(model)(ids, attention_mask=mask, use_cache=False).logits
        logits = attach(model)(ids, attention_mask=mask, use_cache=False).logits
    assert (logits - expected)[mask.bool()].abs().max() < TOLERANCE
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", MAIN)
def test_two_turns_on_one_cache(family: str, tiny: Tiny, tokens: Tokens, generate: Callable[..., Any]) -> None:
    model, ids = attach(tiny(family)), tokens(1, 30)
    cache = MagicPigCache(model.config)
    first = generate(model, ids, **cache_argument(cache), max_new_tokens=8)
    ids = torch.cat([first.sequences, tokens(1, 5, seed=1)], 1)
    second = generate(model, ids, **cache_argument(cache))
    assert cache.get_seq_length() == ids.shape[1] + 23  # the last new token was never fed back
    assert_same(generate(detach(model), ids), second)


def test_an_assistant_model(tiny: Tiny, tokens: Tokens, generate: Callable[..., Any]) -> None:
    model, assistant, ids = tiny("llama"), attach(tiny("gemma2")), tokens(1, 30)
    expected = generate(model, ids)
    assert_same(expected, generate(attach(model), ids, assistant_model=assistant))


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gpt_oss"])
def test_holes_in_the_mask(family: str, tiny: Tiny, tokens: Tokens, both: Both) -> None:
    """generate() without attention_mask= makes them wherever a token of the prompt equals pad_token_id."""
    ids = tokens(2, 30)
    ids[0, [0, 5, 6, 20]] = 0
    assert_same(*both(tiny(family), ids, attention_mask=None))


def test_what_is_compared_depends_on_attention(tiny: Tiny, tokens: Tokens, both: Both) -> None:
    """The tests above would notice: a forgotten mask moves the logits by far more than their tolerance."""
    ids = tokens(2, 30)
    model = tiny("llama")
    eager, _ = both(model, ids)
    _, padded = both(model, ids, **left_padded(ids, 7))
    assert (eager.logits[0] - padded.logits[0])[0].abs().max() > 100 * TOLERANCE
    assert len(set(eager.sequences[1, 30:].tolist())) > 5


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma2", "gpt_oss"])
def test_gradients_without_a_cache(family: str, tiny: Tiny, tokens: Tokens) -> None:
    model, ids = tiny(family), tokens(2, 20)
    gradients = []
    for prepare in (detach, attach):
        prepare(model).zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    assert len(gradients[0]) == len(gradients[1]) > 5
    for eager, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-3)
