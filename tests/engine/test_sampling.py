"""Tokens are drawn as `generate` draws them; penalties are OpenAI's."""

from __future__ import annotations

import math

import pytest
import torch

from magicpig.engine.request import SamplingParams
from magicpig.engine.sampling import TokenSampler, logprobs
from magicpig.errors import ArgumentError

SETTINGS = {
    "greedy": {"do_sample": False},
    "plain": {"top_k": 0},
    "temperature": {"temperature": 0.5, "top_k": 0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "min_p": {"min_p": 0.1, "top_k": 0},
    "repetition": {"repetition_penalty": 1.5, "top_k": 0},
    "all": {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_same_seed_same_tokens_as_generate(name, build):
    model, settings = build("llama"), SETTINGS[name]
    ids = torch.tensor([[5, 6, 7, 5, 9]])
    torch.manual_seed(11)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": True, **settings},
    )
    ours = {name: value for name, value in settings.items() if name != "do_sample"}
    if settings.get("do_sample") is False:
        ours["temperature"] = 0.0
    sampler = TokenSampler(SamplingParams(seed=11, **ours), ids[0].tolist(), ends=(), vocabulary=97)
    assert [sampler.draw(logits[0]) for logits in out.logits] == out.sequences[0, 5:].tolist()


def draw(
    params: SamplingParams, logits: torch.Tensor, *, said: tuple[int, ...] = (), ends: tuple[int, ...] = ()
) -> int:
    sampler = TokenSampler(params, [0, 0], ends=ends, vocabulary=len(logits))
    for token in said:
        sampler.remember(token)
    return sampler.draw(logits)


def test_penalties_count_the_answer_alone():
    logits = torch.tensor([3.0, 2.9, 2.5, 0.0])
    assert draw(SamplingParams(temperature=0.0, presence_penalty=0.2), logits) == 0, "the prompt does not count"
    assert draw(SamplingParams(temperature=0.0, presence_penalty=0.2), logits, said=(0,)) == 1
    assert draw(SamplingParams(temperature=0.0, presence_penalty=0.2), logits, said=(0, 0, 1)) == 0
    assert draw(SamplingParams(temperature=0.0, frequency_penalty=0.3), logits, said=(0, 0, 1)) == 1
    assert draw(SamplingParams(temperature=0.0, frequency_penalty=0.3), logits, said=(0, 0, 1, 1)) == 2


def test_bias_and_least_length():
    logits = torch.tensor([3.0, 2.0, 1.0])
    assert draw(SamplingParams(temperature=0.0, logit_bias={2: 5.0, 0: -100.0}), logits) == 2
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(1,))
    assert draw(params, logits, said=(2,), ends=(0,)) == 2
    assert draw(params, logits, said=(2, 2), ends=(0,)) == 0


def test_seeds_of_answers_differ_and_without_one_no_two_runs_are_alike():
    logits = torch.zeros(1000)

    def run(index: int = 0, seed: int | None = 4) -> list[int]:
        sampler = TokenSampler(SamplingParams(seed=seed), [1], ends=(), vocabulary=1000, index=index)
        return [sampler.draw(logits) for _ in range(5)]

    assert run() == run()
    assert run(index=1) == run(seed=5) != run()
    assert run(seed=None) != run(seed=None)


def test_nearly_no_temperature_is_none():
    assert draw(SamplingParams(temperature=1e-30), torch.tensor([1.0, 2.0, 80.0])) == 2


def test_logprobs_are_those_of_the_model():
    logits = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]])
    first, second = logprobs(logits, [0, 0], top=9)
    total = math.log(1 + math.e + math.e**2)
    assert first.logprob == pytest.approx(-total)
    assert [token for token, _ in first.top] == [2, 1, 0]
    assert second.top[0] == (0, pytest.approx(1 - math.log(math.e + 2)))
    assert logprobs(logits, [1, 1], top=0)[0].top == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"temperature": math.nan}, "temperature=nan must be"),
        ({"top_p": 0.0}, "top_p=0.0 must be more than 0 and at most 1"),
        ({"n": 0}, "n=0 must be at least 1"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens=4 must be at least 0 and at most 3"),
        ({"stop": ("",)}, "empty string"),
        ({"logit_bias": {5: 101.0}}, r"logit_bias\[5\]=101.0"),
        ({"seed": 2**63}, "seed="),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ArgumentError, match=message):
        SamplingParams(**settings)
