"""Whatever else runs, a request gets the tokens that it gets alone, from `generate` with the same seed and settings."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch

from magicpig import LLM, Config, UnsupportedModelError, attach, detach
from magicpig.attention.step import LayerDecoder
from magicpig.engine.errors import (
    ContextLengthError,
    QueueFullError,
    RequestTimeoutError,
    RequestTooLargeError,
    ShuttingDownError,
    StepError,
)
from magicpig.engine.observer import Observer
from magicpig.engine.request import Delta, Request, SamplingParams
from magicpig.engine.scheduler import Status
from magicpig.errors import ArgumentError, NotFiniteError
from magicpig.store import KVStore

FULL = Config(sampler="full")
SKETCH = Config(exact_below=32, block=8, recent=8, budget=16)
LSH = Config(K=4, L=20, exact_below=32, block=8, recent=8)
NEW = 16
DRAWN = {"temperature": 0.9, "top_k": 20, "top_p": 0.95}


def drawn(**settings: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": NEW, "seed": 3, "ignore_eos": True, **DRAWN, **settings})


def request(prompt: list[int], *, config: Config | None = None, priority: int = 0, **settings: Any) -> Request:
    return Request(tuple(prompt), drawn(**settings), config, priority=priority)


class Answers:
    """Takes the deltas of a request."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []

    def __call__(self, delta: Delta) -> None:
        self.deltas.append(delta)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]


@pytest.mark.parametrize("config", [FULL, SKETCH], ids=lambda config: config.sampler)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_concurrent_ragged_and_chunked_requests_are_answered_as_alone(kind, config, llm, prompts, alone):
    expected = [alone(kind, config, prompt) for prompt in prompts]
    with llm(kind, config, token_budget=16, running=4) as many:
        completions = many.generate(prompts, drawn(), progress=False)
    assert [list(completion.choices[0].tokens) for completion in completions] == expected
    assert {completion.choices[0].finish for completion in completions} == {"length"}
    sampled = completions[-1].choices[0].report
    assert (sampled.rows_share_mean is not None) == (config is SKETCH)


def test_settings_that_do_not_work_are_told_once(llm, prompts, caplog):
    nothing = Config(K=16, L=2, min_hits=2, exact_below=0, block=8, recent=8)  # two of two tables of 65536 buckets
    with llm("llama", nothing) as many:
        many.generate(prompts[-1:] * 2, drawn(), progress=False)
    told = [each.getMessage() for each in caplog.records if each.name == "magicpig.engine"]
    assert len(told) == 1
    assert "drew next to nothing" in told[0]
    caplog.clear()
    with llm("llama", FULL) as many:
        many.generate(prompts[-1:], drawn(), progress=False)
    assert not caplog.records


def test_sink_logits_and_windows(llm, prompts, alone):
    expected = [alone("gpt_oss", LSH, prompt) for prompt in prompts[:3]]
    with llm("gpt_oss", LSH, token_budget=16, running=4) as many:
        assert [list(c.choices[0].tokens) for c in many.generate(prompts[:3], drawn(), progress=False)] == expected


def test_each_request_attends_by_its_own_settings(llm, prompts, alone):
    settings = [
        FULL,
        SKETCH,
        LSH,
        SKETCH.model_copy(update={"seed": 9}),
        Config(**SKETCH.model_dump() | {"budget": 4.0}),
    ]
    expected = [alone("llama", config, prompts[-1]) for config in settings]
    assert len({tuple(tokens) for tokens in expected}) > 1
    many = llm()
    completions = many.run([request(prompts[-1], config=config) for config in settings], progress=False)
    assert [list(completion.choices[0].tokens) for completion in completions] == expected


@pytest.mark.parametrize("config", [FULL, SKETCH], ids=lambda config: config.sampler)
def test_preempted_requests_lose_nothing(config, llm, prompts, alone):
    expected = [alone("llama", config, prompt) for prompt in (prompts[-1], prompts[0])]
    engine = llm("llama", config, token_budget=16, running=4).engine
    engine.scheduler.limits = type(engine.scheduler.limits)(memory=engine.size(config, 150), token_budget=16, running=4)
    low, high = Answers(), Answers()
    engine.submit(request(prompts[-1], priority=1), low)
    while len(low.tokens) < 9:
        engine.step()
    engine.submit(request(prompts[0]), high)
    while engine.unfinished:
        engine.step()
    assert [low.tokens, high.tokens] == expected
    assert low.deltas[-1].report.preemptions == 1
    assert len(low.deltas[-1].tokens) == 0, "no token is told twice"


def test_several_answers_share_their_prompt(llm, prompts, alone):
    engine = llm("llama", SKETCH, token_budget=64).engine
    steps = []

    class Watch(Observer):
        def on_step(self, record):
            steps.append(record.prefill_tokens)

    engine.observer = Watch()
    answers = Answers()
    engine.submit(request(prompts[-1], n=3), answers)
    while engine.unfinished:
        engine.step()
    assert sum(steps) == len(prompts[-1])
    for index in range(3):
        own = [token for delta in answers.deltas if delta.index == index for token in delta.tokens]
        assert own == alone("llama", SKETCH, prompts[-1], seed=3 + index)


def test_the_first_of_several_answers_may_end_at_once(llm, prompts, alone):
    first = [alone("llama", FULL, prompts[0], seed=3 + index)[0] for index in range(2)]
    assert first[0] != first[1]
    done = llm("llama", FULL).generate([prompts[0]], drawn(n=2, stop_token_ids=(first[0],)), progress=False)[0]
    assert (done.choices[0].tokens, done.choices[0].finish) == ((first[0],), "stop")
    assert done.choices[1].tokens[0] == first[1]


def test_a_fault_in_the_engine_leaves_nobody_waiting(llm, prompts, monkeypatch, caplog):
    engine = llm().engine

    def broken(batch):
        raise AssertionError("a fault")

    monkeypatch.setattr(engine.scheduler, "commit", broken)
    answers = Answers()
    engine.start()
    engine.submit(request(prompts[0], n=2), answers)
    engine._thread.join(30)
    assert [type(delta.error) for delta in answers.deltas if delta.finish] == [StepError, StepError]
    assert (engine.alive, engine.accepting) == (False, False)
    assert "a fault" in caplog.text


def test_answers_without_memory_to_share_read_the_prompt_again(llm, prompts, alone):
    engine = llm("llama", SKETCH, running=1, token_budget=64).engine
    answers = Answers()
    engine.submit(request(prompts[0], n=2), answers)
    while engine.unfinished:
        engine.step()
    for index in range(2):
        own = [token for delta in answers.deltas if delta.index == index for token in delta.tokens]
        assert own == alone("llama", SKETCH, prompts[0], seed=3 + index)


def test_one_bad_request_fails_alone(llm, prompts, alone):
    """A token whose embedding is not a number spoils the keys of its own sequence only."""
    expected = alone("llama", SKETCH, prompts[0])
    engine = llm("llama", SKETCH, token_budget=256).engine
    table = engine.network.get_input_embeddings().weight
    good, bad = Answers(), Answers()
    spoilt = next(token for token in range(2, 97) if token not in prompts[0] + expected)
    with torch.no_grad():
        before = table[spoilt].clone()
        table[spoilt] = torch.nan
    try:
        engine.submit(request(prompts[0]), good)
        engine.submit(request([spoilt + 1, spoilt, 7]), bad)
        while engine.unfinished:
            engine.step()
    finally:
        with torch.no_grad():
            table[spoilt] = before
    assert isinstance(bad.deltas[-1].error, NotFiniteError)
    assert (bad.deltas[-1].finish, good.tokens) == ("error", expected)


def test_a_failing_step_ends_its_requests_and_the_next_ones_are_served(llm, prompts, monkeypatch, caplog, alone):
    engine = llm().engine
    lost, served = Answers(), Answers()
    engine.submit(request(prompts[0]), lost)

    def broken(work):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", broken)
        engine.step()
    assert isinstance(lost.deltas[-1].error, StepError)
    assert "out of luck" in caplog.text
    engine.submit(request(prompts[1]), served)
    while engine.unfinished:
        engine.step()
    assert served.tokens == alone("llama", Config(), prompts[1])


def test_cancelled_requests_leave_nothing_behind(llm, prompts):
    engine = llm("llama", SKETCH).engine
    answers, one = Answers(), request(prompts[0], n=2)
    engine.submit(one, answers)
    for _ in range(4):
        engine.step()
    state = engine.scheduler.running[0].state
    assert state.length > 0
    engine.cancel(one.id)
    engine.step()
    assert [delta.finish for delta in answers.deltas if delta.finish] == ["abort", "abort"]
    assert (engine.unfinished, engine.scheduler.reserved, engine.scheduler.idle) == (0, 0, True)


def test_time_outs(llm, prompts):
    now = [0.0]
    engine = llm("llama", running=1, token_budget=8, queue_timeout=5.0).engine
    engine._clock = lambda: now[0]
    slow, late = Answers(), Answers()
    engine.submit(Request(tuple(prompts[0]), drawn(n=2), timeout=9.0), slow)
    engine.submit(request(prompts[1]), late)
    engine.step()
    now[0] = 6.0
    engine.step()
    assert isinstance(late.deltas[-1].error, RequestTimeoutError)
    assert "not begun after 6.0 s" in str(late.deltas[-1].error)
    assert not slow.deltas
    now[0] = 9.0
    engine.step()
    assert "not done after 9.0 s" in str(slow.deltas[-1].error)
    assert engine.unfinished == 0


def test_what_cannot_be_served_is_refused_at_once(llm):
    engine = llm("llama", running=1, token_budget=8, waiting=1, max_length=100, memory=1 << 24).engine
    with pytest.raises(ContextLengthError, match="maximum context length is 100 tokens, and the request has 90 tokens"):
        engine.submit(request([5] * 90), Answers())
    with pytest.raises(ArgumentError, match="the prompt is empty"):
        engine.submit(request([]), Answers())
    with pytest.raises(ArgumentError, match="token 97; the model knows the tokens 0 to 96"):
        engine.submit(request([5, 97]), Answers())
    with pytest.raises(ArgumentError, match="logit_bias has token 97"):
        engine.submit(request([5], logit_bias={97: 1.0}), Answers())
    with pytest.raises(ValueError, match=r"layers\.7: the model has layers 0 to 1"):
        engine.submit(request([5], config=Config(layers={7: {"sampler": "full"}})), Answers())
    engine.submit(request([5]), Answers())
    with pytest.raises(QueueFullError):
        engine.submit(request([5]), Answers())
    engine.step()
    engine.scheduler.limits = type(engine.scheduler.limits)(memory=1000, running=1)
    with pytest.raises(RequestTooLargeError):
        engine.submit(request([5]), Answers())
    engine.close()
    with pytest.raises(ShuttingDownError):
        engine.submit(request([5]), Answers())


def test_without_max_tokens_an_answer_fills_the_model_or_the_memory(llm):
    engine = llm("llama", FULL).engine
    open_end = Request((5,) * 40, SamplingParams())
    assert engine.check(open_end) == 1024 - 40
    engine.scheduler.limits = type(engine.scheduler.limits)(memory=engine.size(FULL, 256))
    most = engine.check(open_end)
    assert engine.size(FULL, 40 + most) <= engine.scheduler.limits.memory < engine.size(FULL, 40 + most + 1)


def test_close_says_to_those_that_run_that_it_is_over(llm, prompts):
    engine = llm().engine
    answers = Answers()
    engine.submit(request(prompts[0]), answers)
    engine.step()
    assert engine.close() == 1
    assert isinstance(answers.deltas[-1].error, ShuttingDownError)
    assert engine.network.config._attn_implementation == "eager"


def test_an_attached_model_stays_attached(tokenizer, build):
    model = attach(build("llama"), LSH)
    with LLM(model, tokenizer):
        assert model.config._attn_implementation == "magicpig_packed"
    assert model.config._attn_implementation == "magicpig"
    detach(model)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_longest_request(kind, build, tokenizer):
    """transformers computes them for the largest position of a step: the others would get other tokens than alone."""
    model = copy.deepcopy(build("llama"))
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if kind == "longrope" else {}
    model.config.rope_parameters = {
        "rope_type": kind, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 256, **factors
    }  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"beyond 256 tokens .* max_length=256 makes it work"):
        LLM(model, tokenizer)
    LLM(model, tokenizer, max_length=256).close()


def test_models_without_positions_are_refused(build, tokenizer, monkeypatch):
    model = build("llama")
    monkeypatch.setattr(model, "forward", lambda input_ids, logits_to_keep=0: None)
    with pytest.raises(UnsupportedModelError, match="does not take positions"):
        LLM(model, tokenizer)
    assert model.config._attn_implementation == "eager"


def test_thread_and_drain(llm, prompts, alone):
    engine = llm("llama", SKETCH).engine
    answers = [Answers() for _ in prompts]
    engine.start()
    for prompt, own in zip(prompts, answers, strict=True):
        engine.submit(request(prompt), own)
    assert engine.close(drain=60.0) == 0
    assert [own.tokens for own in answers] == [alone("llama", SKETCH, prompt) for prompt in prompts]
    assert not engine.alive


def test_someone_who_is_gone_is_cancelled(llm, prompts, caplog):
    engine = llm().engine

    def gone(delta):
        raise RuntimeError("Event loop is closed")

    engine.submit(request(prompts[0]), gone)
    for _ in range(3):
        engine.step()
    assert engine.scheduler.idle
    assert "nobody takes its answer" in caplog.text


def test_stop_strings_tokens_and_the_end_of_the_text(llm, tokenizer, prompts, alone):
    many = llm()
    prompt = prompts[0]
    tokens = alone("llama", Config(), prompt)
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    middle = text[len(text) // 2 - 2 : len(text) // 2 + 2]

    def ask(**settings):
        return many.generate([prompt], drawn(**settings), progress=False)[0].choices[0]

    whole = ask()
    assert (whole.text, list(whole.tokens), whole.finish) == (text, tokens, "length")
    cut = ask(stop=(middle,))
    assert (cut.text, cut.finish) == (text[: text.index(middle)], "stop")
    assert ask(stop=(middle,), include_stop=True).text == text[: text.index(middle)] + middle
    last = tokens[4]
    ended = ask(stop_token_ids=(last,))
    assert (list(ended.tokens), ended.finish) == (tokens[: tokens.index(last) + 1], "stop")
    assert len(ask(stop_token_ids=(last,), min_tokens=10).tokens) >= 10
    assert len(ask(stop=(text[:1],), min_tokens=6).tokens) >= 6


def test_logprobs_of_answer_and_prompt(llm, prompts, build):
    prompt = prompts[-1]
    model = build("llama")
    many = llm("llama", FULL, token_budget=48)
    done = many.generate([prompt], drawn(temperature=0.0, logprobs=2, prompt_logprobs=3, max_tokens=3), progress=False)[
        0
    ]
    ids = [*prompt, *done.choices[0].tokens]
    many.close()
    with torch.no_grad():
        table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert done.prompt_logprobs is not None
    assert [entry.token for entry in done.prompt_logprobs] == prompt
    assert done.prompt_logprobs[0].logprob is None
    for at, entry in enumerate([*done.prompt_logprobs, *done.choices[0].logprobs]):
        if at == 0:
            continue
        assert entry.token == ids[at]
        assert entry.logprob == pytest.approx(float(table[at - 1, ids[at]]), abs=1e-4)
        best = table[at - 1].topk(3 if at < len(prompt) else 2)
        assert [token for token, _ in entry.top] == best.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_nothing_but_the_prompts_logprobs(llm, prompts):
    done = llm().generate([prompts[0]], drawn(max_tokens=0, prompt_logprobs=0), progress=False)[0]
    assert (done.choices[0].text, done.choices[0].tokens, done.choices[0].finish) == ("", (), "length")
    assert len(done.prompt_logprobs) == len(prompts[0])


def test_prompt_logprobs_survive_preemption(llm, prompts):
    engine = llm("llama", FULL, token_budget=32, running=4).engine
    engine.scheduler.limits = type(engine.scheduler.limits)(memory=engine.size(FULL, 150), token_budget=32, running=4)
    low = Answers()
    engine.submit(request(prompts[-1], priority=1, prompt_logprobs=0), low)
    engine.step()
    engine.step()
    engine.submit(request(prompts[0], max_tokens=1), Answers())
    while engine.unfinished:
        engine.step()
    assert low.deltas[-1].report.preemptions == 1
    given = next(delta.prompt_logprobs for delta in low.deltas if delta.prompt_logprobs is not None)
    assert [entry.token for entry in given] == prompts[-1]


def test_statuses_end_as_done(llm, prompts):
    engine = llm().engine
    engine.submit(request(prompts[1]), Answers())
    engine.step()
    task = engine.scheduler.running[0]
    while engine.step():
        pass
    assert task.status is Status.DONE
    assert task.state is None


def test_steps_of_answers_alone_take_the_short_way_and_let_go_of_what_ended(llm, prompts, monkeypatch):
    engine, taken, step = llm("llama", SKETCH, cache_share=0.0).engine, [], LayerDecoder.step
    monkeypatch.setattr(LayerDecoder, "step", lambda self, *new: (taken.append(len(new[0])), step(self, *new))[1])
    answers = [Answers(), Answers()]
    for prompt, own, tokens in zip(prompts[:2], answers, (4, 8), strict=True):
        engine.submit(request(prompt, max_tokens=tokens), own)
    stores = weakref.WeakSet()
    while engine.unfinished:
        if not engine.step():
            engine.wait()
        stores |= {store for task in engine.scheduler.running for store in task.state.stores}
    assert sum(taken) == 2 * (3 + 7), "in both layers, all tokens but those that the prompts bring"
    gc.collect()
    assert len(stores) == 0


def test_others_go_on_while_an_index_is_built(llm, prompts, alone, monkeypatch):
    expected = [alone("llama", SKETCH, prompt) for prompt in (prompts[-1], prompts[1])]
    engine, going, settle = llm("llama", SKETCH).engine, threading.Event(), KVStore.settle
    by: list[str] = []

    def slow(store):
        by.append(threading.current_thread().name)
        assert going.wait(30)
        settle(store)

    monkeypatch.setattr(KVStore, "settle", slow)
    long, other = Answers(), Answers()
    engine.submit(request(prompts[-1]), long)
    engine.submit(request(prompts[1]), other)
    while not other.deltas or other.deltas[-1].finish is None:
        engine.step()
    assert (len(long.tokens), engine.unfinished) == (1, 1)
    going.set()
    while engine.unfinished:
        if not engine.step():
            engine.wait()
    assert [long.tokens, other.tokens] == expected
    assert {name.rpartition("_")[0] for name in by} == {"magicpig-index"}


@pytest.mark.parametrize("how", ["cancel", "preempt", "fail"])
def test_an_index_that_nobody_waits_for_or_that_fails(how, llm, prompts, alone, monkeypatch):
    expected = alone("llama", SKETCH, prompts[-1])
    engine, going, settle = llm("llama", SKETCH).engine, threading.Event(), KVStore.settle

    def slow(store):
        assert going.wait(30)
        if how == "fail":
            raise ZeroDivisionError
        settle(store)

    monkeypatch.setattr(KVStore, "settle", slow)
    answers, own = Answers(), request(prompts[-1], n=2)
    engine.submit(own, answers)
    while len(answers.deltas) < 2:
        engine.step()
    if how == "cancel":
        engine.cancel(own.id)
    elif how == "preempt":
        engine.scheduler._preempt(engine.scheduler.running[0])
    going.set()
    while engine.unfinished:
        if not engine.step():
            engine.wait()
    ends = [delta for delta in answers.deltas if delta.finish is not None]
    assert {delta.finish for delta in ends} == {{"cancel": "abort", "preempt": "length", "fail": "error"}[how]}
    if how == "preempt":
        assert [token for delta in answers.deltas if delta.index == 0 for token in delta.tokens] == expected
    if how == "fail":
        assert isinstance(ends[0].error, StepError)
        monkeypatch.setattr(KVStore, "settle", settle)
        answers = Answers()
        engine.submit(request(prompts[-1]), answers)
        while engine.unfinished:
            if not engine.step():
                engine.wait()
        assert answers.tokens == expected, "the engine lives"
    engine.rest()
    assert (engine.scheduler.idle, engine.scheduler.reserved) == (True, 0)
