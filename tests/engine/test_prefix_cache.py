"""A prompt that begins like one before reads what is new, and is answered as if it had read all."""

from __future__ import annotations

import pytest

from magicpig import Config
from magicpig.engine.prefix_cache import SHORTEST
from magicpig.engine.request import SamplingParams

FULL = Config(sampler="full")
SKETCH = Config(exact_below=32, block=8, recent=8, budget=16)
LSH = Config(K=4, L=20, exact_below=32, block=8, recent=8)
DRAWN = SamplingParams(max_tokens=16, seed=3, ignore_eos=True, temperature=0.9, top_k=20, top_p=0.95)


def answer(many, prompt, config=None, **settings):
    params = SamplingParams(**{**vars(DRAWN), **settings})
    return many.generate([prompt], params, config=config, progress=False)[0].choices[0]


@pytest.mark.parametrize("first", [FULL, SKETCH, LSH], ids=lambda config: config.sampler)
def test_a_second_question_reads_itself_only(first, llm, prompts, alone, reading):
    document = prompts[-1]
    many = llm("llama", first)
    many.engine.observer = reading
    assert answer(many, document + prompts[1]).report.cached_tokens == 0
    for question in (prompts[3], prompts[1][:2]):
        # The second one has its beginning in common with the first document and question.
        begun = len(document) + (1 if question is not prompts[3] else 0)
        reading.tokens = 0
        done = answer(many, document + question)
        assert list(done.tokens) == alone("llama", first, document + question)
        assert done.report.cached_tokens == begun
        assert reading.tokens == len(document + question) - begun


def test_the_next_question_may_attend_otherwise(llm, prompts, alone):
    many = llm("llama", SKETCH)
    answer(many, prompts[-1])
    known = len(prompts[-1])
    for config in (FULL, LSH, Config(**SKETCH.model_dump() | {"budget": 4.0, "seed": 9})):
        done = answer(many, prompts[-1] + prompts[1], config)
        assert list(done.tokens) == alone("llama", config, prompts[-1] + prompts[1])
        assert done.report.cached_tokens == known
        known = len(prompts[-1] + prompts[1]) - 1  # rows serve every sampler, and the last token is computed
    quantised = Config(**SKETCH.model_dump() | {"kv_dtype": "int8"})
    assert answer(many, prompts[-1] + prompts[1], quantised).report.cached_tokens == 0, "its rows are other ones"


def test_the_same_prompt_again_computes_its_last_token(llm, prompts, alone):
    many = llm("llama", SKETCH)
    first, again = answer(many, prompts[-1]), answer(many, prompts[-1])
    assert (first.tokens, again.report.cached_tokens) == (again.tokens, len(prompts[-1]) - 1)
    assert len(many.engine.prefixes) == 1


def test_models_with_windows_go_on_from_whole_prompts_only(llm, prompts, alone):
    many = llm("gemma2", SKETCH)
    answer(many, prompts[-1])
    longer = prompts[-1] + prompts[1]
    done = answer(many, longer)
    assert (done.report.cached_tokens, list(done.tokens)) == (len(prompts[-1]), alone("gemma2", SKETCH, longer))
    other = prompts[-1][:-9] + prompts[1]
    done = answer(many, other)
    assert (done.report.cached_tokens, list(done.tokens)) == (0, alone("gemma2", SKETCH, other))


def test_prompts_whose_logprobs_are_wanted_are_read(llm, prompts):
    many = llm("llama", FULL)
    answer(many, prompts[-1])
    done = many.generate([prompts[-1]], SamplingParams(max_tokens=1, prompt_logprobs=0), progress=False)[0]
    assert len(done.prompt_logprobs) == len(prompts[-1])
    assert done.choices[0].report.cached_tokens == 0


def test_short_prompts_are_not_kept(llm, prompts):
    many = llm("llama", FULL)
    answer(many, prompts[-1][: SHORTEST - 1])
    assert (len(many.engine.prefixes), many.engine.prefixes.nbytes) == (0, 0)
    off = llm("llama", FULL, cache_share=0.0)
    answer(off, prompts[-1])
    assert len(off.engine.prefixes) == 0


def test_memory_counts_once_and_the_least_recently_used_goes_first(llm, prompts):
    many = llm("llama", FULL)
    cache = many.engine.prefixes
    others = [[token] * 80 for token in (5, 6, 7)]
    for prompt in others:
        answer(many, prompt)
    each = cache.nbytes // 3
    assert (len(cache), cache.nbytes) == (3, 3 * each)
    answer(many, others[0])
    cache.reclaim(1)
    assert len(cache) == 2
    assert answer(many, others[0] + [9]).report.cached_tokens == 80, "it was used last"
    assert answer(many, others[1] + [9]).report.cached_tokens == 0
    cache.limit = each
    answer(many, [8] * 80)
    assert (len(cache), cache.nbytes) == (1, each)
    cache.clear()
    assert (len(cache), cache.nbytes, cache._uses) == (0, 0, {})


def test_requests_come_before_what_is_kept(llm, prompts):
    many = llm("llama", FULL, token_budget=32, running=4)
    engine = many.engine
    answer(many, prompts[-1])
    assert engine.prefixes.nbytes > 0
    engine.scheduler.limits = type(engine.scheduler.limits)(memory=engine.size(FULL, 256), token_budget=32, running=4)
    done = answer(many, prompts[0])
    assert len(done.tokens) == 16
    assert engine.prefixes.nbytes + engine.scheduler.reserved <= engine.scheduler.limits.memory


def test_a_preempted_answer_finds_its_prompt_again(llm, prompts, alone, reading):
    expected = alone("llama", SKETCH, prompts[-1])
    engine = llm("llama", SKETCH, token_budget=16, running=4).engine
    memory = 2 * engine.size(SKETCH, 256)
    engine.scheduler.limits = type(engine.scheduler.limits)(memory=memory, token_budget=16, running=4)
    tokens: list[int] = []
    from magicpig.engine.request import Request

    engine.submit(Request(tuple(prompts[-1]), DRAWN, priority=1), lambda delta: tokens.extend(delta.tokens))
    while len(tokens) < 9:
        engine.step()
    (task,) = engine.scheduler.running
    engine.scheduler._preempt(task)
    engine.observer = reading
    while engine.unfinished:
        engine.step()
    assert (tokens, reading.tokens) == (expected, 0)
