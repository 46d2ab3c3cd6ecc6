"""A cache outlives its process: `MagicPigCache.save` and `load`."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from magicpig import Config
from magicpig.errors import ArgumentError, MagicPigError
from magicpig.integrations.transformers import MagicPigCache, attach
from magicpig.integrations.transformers.compat import cache_argument, cache_of
from magicpig.integrations.transformers.saved import WrongModelError, WrongTokensError
from magicpig.store.disk import DamagedFileError, StoreFileError

SMALL: dict[str, Any] = {"sinks": 2, "recent": 6, "block": 8, "exact_below": 0, "dense_layers": (0,)}
SETTINGS = {
    "sketch": {"budget": 9},
    "lsh": {"K": 4, "L": 16},
    "int8": {"budget": 9, "kv_dtype": "int8"},
    "quest": {"sampler": "quest", "budget": 20},
}

Tiny = Callable[[str], PreTrainedModel]
Tokens = Callable[..., Tensor]
Generate = Callable[..., Any]


def read(model: PreTrainedModel, ids: Tensor, config: Config, mask: Tensor | None = None) -> MagicPigCache:
    cache = MagicPigCache(model.config, config)
    with torch.no_grad():
        model(ids, attention_mask=mask, **cache_argument(cache))
    return cache


def write(model: PreTrainedModel, cache: MagicPigCache, mask: Tensor, steps: int = 20) -> Tensor:
    """Logits (steps, B, vocabulary) of greedy decoding."""
    token, logits = torch.full((len(mask), 1), 5), []
    for _ in range(steps):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        with torch.no_grad():
            logits.append(model(token, attention_mask=mask, **cache_argument(cache)).logits[:, -1])
        token = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("settled", [False, True], ids=["read", "settled"])
def test_what_is_loaded_goes_on_as_what_was_saved(
    family: str, settings: dict[str, Any], settled: bool, tiny: Tiny, tokens: Tokens, tmp_path: Path
) -> None:
    model, ids = attach(tiny(family)), tokens(2, 61)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    cache = read(model, ids, Config(**SMALL, **settings), mask)
    if settled:
        cache.settle()
    cache.save(tmp_path / "cache", model=model, tokens=ids)
    loaded = MagicPigCache.load(tmp_path / "cache", model, tokens=ids)
    assert loaded.config == cache.config
    assert loaded.report().tokens == cache.report().tokens
    assert torch.equal(write(model, loaded.fork(), mask), write(model, cache.fork(), mask))
    assert torch.equal(write(model, loaded, mask), write(model, cache, mask))


def test_a_cache_of_generate_knows_its_model(tiny: Tiny, tokens: Tokens, generate: Generate, tmp_path: Path) -> None:
    model, ids = attach(tiny("llama"), **SMALL), tokens(1, 40)
    cache = cache_of(generate(model, ids))
    cache.save(tmp_path / "cache")
    assert MagicPigCache.load(tmp_path / "cache", model).get_seq_length() == cache.get_seq_length()
    empty = MagicPigCache(model.config)
    with pytest.raises(
        ArgumentError, match=r"^the cache does not know its model; say cache.save\(path, model=model\)$"
    ):
        empty.save(tmp_path / "empty")
    empty.save(tmp_path / "empty", model=model)
    assert MagicPigCache.load(tmp_path / "empty", model).get_seq_length() == 0


def test_another_model_text_or_byte_is_named(tiny: Tiny, tokens: Tokens, tmp_path: Path) -> None:
    model, ids, path = attach(tiny("llama")), tokens(1, 50), tmp_path / "cache"
    read(model, ids, Config(**SMALL)).save(path, model=model, tokens=ids)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        next(changed.parameters()).mul_(1.01)
    with pytest.raises(
        WrongModelError, match=r"has keys and values of another model than the llama at hand \(other weights"
    ):
        MagicPigCache.load(path, changed)
    with pytest.raises(
        WrongModelError, match=r"another model than the gemma2 at hand \(other type, config, weights\)$"
    ):
        MagicPigCache.load(path, tiny("gemma2"))
    wrong = ids.clone()
    wrong[0, 20] += 1
    with pytest.raises(WrongTokensError, match=r"sequence 0 has other tokens from position 16 on"):
        MagicPigCache.load(path, model, tokens=wrong)
    with pytest.raises(ArgumentError, match=r"^tokens has shape \(1, 49\); expected \(1, 50\), what the cache holds$"):
        MagicPigCache.load(path, model, tokens=ids[:, :-1])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"the checksum does not match"):
        MagicPigCache.load(path, model)
    with pytest.raises(StoreFileError, match=r"^cannot read "):
        MagicPigCache.load(tmp_path / "none", model)
    codes = {error.code for error in (WrongModelError, WrongTokensError, DamagedFileError, StoreFileError)}
    assert len(codes) == 4
    assert all(issubclass(error, MagicPigError) for error in (WrongModelError, WrongTokensError))


ANSWER = """
import json, sys, time
import torch
from magicpig import Config
from magicpig.integrations.transformers import MagicPigCache, attach
from magicpig.integrations.transformers.compat import cache_argument
from transformers import AutoModelForCausalLM

directory, path, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = attach(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval())
start = time.perf_counter()
cache = MagicPigCache.load(path, model)
token, found, first = torch.tensor([[7]]), [], None
with torch.inference_mode():
    for _ in range(steps):
        token = model(token, **cache_argument(cache)).logits[:, -1].argmax(-1, keepdim=True)
        first = first or time.perf_counter() - start
        found.append(int(token))
print(json.dumps({"tokens": found, "first": first}))
"""


@pytest.mark.slow
def test_a_prompt_of_32k_tokens_serves_another_process(tmp_path: Path) -> None:
    """The next tokens are the same, and the first of them comes in an eighth of the time that reading takes."""
    from transformers import AutoModelForCausalLM

    from magicpig.generation import fill
    from magicpig.studies import pocket

    model = attach(AutoModelForCausalLM.from_pretrained(pocket.path(), dtype=torch.float32).eval())
    ids = torch.randint(10, 250, (32_768,), generator=torch.Generator().manual_seed(0)).tolist()
    cache = MagicPigCache(model.config, Config())
    start = time.perf_counter()
    fill(model, ids, cache)
    prefill = time.perf_counter() - start
    cache.settle()
    cache.save(tmp_path / "cache", model=model)
    token, expected = torch.tensor([[7]]), []
    with torch.inference_mode():
        for _ in range(20):
            token = model(token, **cache_argument(cache)).logits[:, -1].argmax(-1, keepdim=True)
            expected.append(int(token))
    arguments = [sys.executable, "-c", ANSWER, str(pocket.path()), str(tmp_path / "cache"), "20"]
    answer = json.loads(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout)
    assert answer["tokens"] == expected
    assert answer["first"] <= prefill / 8
