"""The pocket model answers with an accelerator as without: on a GPU where there is one, else on a simulated device."""

from __future__ import annotations

import pytest
import torch

from magicpig import LLM, Config
from magicpig.engine.request import SamplingParams
from magicpig.placement.accelerator import WAYS
from magicpig.placement.device import Device
from magicpig.placement.simulated import Simulated
from magicpig.studies import pocket

pytest.importorskip("triton")

SKETCH = Config(exact_below=64, block=32, recent=16, budget=12, candidates=24)
LSH = Config(K=4, L=20, exact_below=64, block=32, recent=16)


def answers(config: Config, device: str | Device = "cpu", placement: str = "auto") -> list[tuple[int, ...]]:
    with LLM(pocket.path(), config=config, dtype="float32", device=device, placement=placement) as llm:
        texts = ["The grass is green. The sky is blue. " * 10, "One two three four five. " * 16]
        prompts = [tuple(llm.tokenizer(text)["input_ids"])[:104] for text in texts]
        done = llm.generate(prompts, SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True), progress=False)
    return [each.choices[0].tokens for each in done]


@pytest.mark.parametrize(("config", "placement"), [*((SKETCH, way) for way in WAYS), (LSH, "host")])
def test_the_pocket_model_answers_alike(config: Config, placement: str) -> None:
    device = "cuda" if torch.cuda.is_available() else Simulated()
    assert answers(config, device, placement) == answers(config)
