"""An engine with an accelerator answers as one without: on a simulated device, the model on the processor."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from magicpig import Config
from magicpig.engine.errors import StepError
from magicpig.engine.request import Delta, Request, SamplingParams
from magicpig.errors import ArgumentError
from magicpig.placement.accelerator import WAYS, Accelerated
from magicpig.placement.simulated import Simulated

pytest.importorskip("triton")

SKETCH = Config(exact_below=32, block=8, recent=8, budget=16)
LSH = Config(K=4, L=20, exact_below=32, block=8, recent=8)
INT8 = SKETCH.changed({"kv_dtype": "int8"})
DRAWN = SamplingParams(max_tokens=4, seed=3, ignore_eos=True, temperature=0.9, top_k=20, top_p=0.95)


class Answers:
    def __init__(self) -> None:
        self.deltas: list[Delta] = []

    def __call__(self, delta: Delta) -> None:
        self.deltas.append(delta)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]


def answers(llm: Any, prompts: list[list[int]], config: Config, **options: Any) -> list[Any]:
    with llm("llama", config, token_budget=48, running=4, **options) as many:
        found = many.generate(prompts, DRAWN, progress=False)
    return [completion.choices[0] for completion in found]


@pytest.mark.parametrize("config", [SKETCH, LSH, INT8], ids=["sketch", "lsh", "int8"])
def test_ragged_requests_are_answered_as_on_the_processor(config, llm, prompts):
    some = [prompts[i] for i in (0, 1, 2)]
    expected = answers(llm, some, config)
    device = Simulated()
    found = answers(llm, some, config, device=device, placement="host")
    assert [each.tokens for each in found] == [each.tokens for each in expected]
    for own, usual in zip(found, expected, strict=True):
        if usual.report.rows_share_mean is None:
            assert own.report.rows_share_mean is None
        else:
            assert own.report.rows_share_mean == pytest.approx(usual.report.rows_share_mean, rel=1e-4)
            assert own.report.predicted_error_mean == pytest.approx(usual.report.predicted_error_mean, rel=1e-2)
    done = [span.what for span in device.spans]
    assert {"sample", "select", "window", "merge"} <= set(done)
    assert ("prefill" in done) == (config is not INT8)  # of those the host has to round first


@pytest.mark.parametrize("placement", ["gpu_index", "gpu"])
def test_the_device_selects_what_the_processor_would(placement, llm, prompts):
    some = [prompts[0], prompts[2]]
    expected = answers(llm, some, SKETCH)
    found = answers(llm, some, SKETCH, device=Simulated(), placement=placement)
    assert [each.tokens for each in found] == [each.tokens for each in expected]


def test_two_micro_batches_are_in_flight(llm, prompts):
    costs = {"sample": 10.0}
    device = Simulated(costs, down=float("inf"), up=float("inf"))
    with llm("llama", SKETCH, running=4, device=device, placement="host") as many:
        many.generate([prompts[0]] * 2, DRAWN, progress=False)
    # While the host answers one, the other has asked: two questions come before the first answer of a layer.
    spans = [span.what for span in device.spans if span.what in ("select", "sample")]
    runs = [(what, len(list(those))) for what, those in itertools.groupby(spans)]
    assert ("select", 2) in runs


def test_requests_of_other_samplers_run_beside_them(llm, prompts):
    configs = [SKETCH, Config(sampler="full"), LSH, SKETCH.changed({"seed": 9})]
    requests = [Request(tuple(prompts[0]), DRAWN, config) for config in configs]
    with llm("llama", SKETCH) as many:
        expected = [each.choices[0].tokens for each in many.run(requests, progress=False)]
    again = [Request(tuple(prompts[0]), DRAWN, config) for config in configs]
    with llm("llama", SKETCH, device=Simulated(), placement="host") as many:
        assert [each.choices[0].tokens for each in many.run(again, progress=False)] == expected


def test_a_preempted_request_loses_nothing(llm, prompts):
    expected = [each.tokens for each in answers(llm, [prompts[-1], prompts[0]], SKETCH)]
    with llm("llama", SKETCH, token_budget=48, running=4, device=Simulated(), placement="host") as many:
        engine = many.engine
        limits = type(engine.scheduler.limits)
        engine.scheduler.limits = limits(memory=engine.size(SKETCH, 150), token_budget=48, running=4)
        low, high = Answers(), Answers()
        engine.submit(Request(tuple(prompts[-1]), DRAWN, priority=1), low)
        while len(low.tokens) < 2:
            engine.step()
        engine.submit(Request(tuple(prompts[0]), DRAWN), high)
        while engine.unfinished:
            engine.step()
        assert [tuple(low.tokens), tuple(high.tokens)] == expected
        assert low.deltas[-1].report.preemptions == 1


def test_a_warm_prompt_is_not_read_again_and_a_cancelled_request_leaves_the_others_alone(llm, prompts, reading):
    expected = answers(llm, [prompts[0]], SKETCH)[0].tokens
    with llm("llama", SKETCH, running=4, device=Simulated(), placement="host", observer=reading) as many:
        engine, warm, gone = many.engine, Answers(), Answers()
        many.generate([prompts[0]], SamplingParams(max_tokens=1), progress=False)
        assert reading.tokens == len(prompts[0])
        cancelled = Request(tuple(prompts[0]), DRAWN)
        engine.submit(cancelled, gone)
        engine.submit(Request(tuple(prompts[0]), DRAWN), warm)
        while len(gone.tokens) < 2:
            engine.step()
        engine.cancel(cancelled.id)
        while engine.unfinished:
            engine.step()
        assert reading.tokens < 2 * len(prompts[0])
        assert tuple(warm.tokens) == expected
        assert gone.deltas[-1].finish == "abort"


def test_an_error_on_the_device_ends_the_requests_and_not_the_engine(llm, prompts):
    costs: dict[str, float] = {}
    device = Simulated(costs)
    with llm("llama", SKETCH, running=4, device=device, placement="host") as many:
        engine = many.engine
        first, second = Answers(), Answers()
        engine.submit(Request(tuple(prompts[0]), DRAWN), first)
        engine.submit(Request(tuple(prompts[2]), DRAWN), second)
        while min(len(first.tokens), len(second.tokens)) < 2:
            engine.step()
        device.break_at("merge")
        while engine.unfinished:
            engine.step()
        assert isinstance(first.deltas[-1].error, StepError)
        assert isinstance(second.deltas[-1].error, StepError)
        assert engine.failure is None


def test_a_device_and_its_placement_have_to_go_together(llm):
    with pytest.raises(ArgumentError, match="placement=host needs a GPU"):
        llm("llama", SKETCH, placement="host")
    with pytest.raises(ArgumentError, match="placement=cpu leaves device=cuda nothing to do"):
        llm("llama", SKETCH, device="cuda", placement="cpu")
    with pytest.raises(ArgumentError, match=r"placement=gpu has no steps for sampler='lsh'.*placement=host"):
        llm("llama", LSH, device=Simulated(), placement="gpu")
    with pytest.raises(ArgumentError, match="sampler='full' has no steps on an accelerator"):
        llm("llama", Config(sampler="full"), device=Simulated())


def test_auto_takes_the_fastest_that_fits_and_says_why(llm, caplog):
    def chosen(config: Config, memory: int = 24 << 30) -> str:
        place = llm("llama", config, device=Simulated(memory=memory)).engine.runner.place
        assert isinstance(place, Accelerated)
        return place.way

    assert chosen(LSH) == "host"
    assert chosen(SKETCH, memory=70_000) == "host"  # nothing else fits
    assert chosen(SKETCH) in WAYS
    said = [each.getMessage() for each in caplog.records if each.name == "magicpig.placement"]
    assert len(said) == 3
    assert said[0] == "placement=auto takes host: no other takes sampler='lsh'"
    assert "tokens a second; gpu holds 0 of" in said[1]


def test_cuda_that_is_absent_is_said_at_once(llm, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match=r"device=cuda, but torch .* finds no CUDA"):
        llm("llama", SKETCH, device="cuda")
