"""`LLM` from Python: prompts of all kinds, in order, all or nothing."""

from __future__ import annotations

import pytest

from magicpig import LLM, SamplingParams
from magicpig.engine.errors import ContextLengthError
from magicpig.engine.template import chat_prompt
from magicpig.errors import ArgumentError, NotFiniteError
from magicpig.studies import pocket

GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def small():
    with LLM(pocket.path(), token_budget=64) as llm:
        yield llm


def test_texts_and_token_ids_in_their_order(small, capsys):
    texts = [f"The number is {i}." for i in range(40, 80)]
    done = small.generate(texts, GREEDY)
    assert [done.request.prompt for done in done] == [tuple(small.tokenizer(text)["input_ids"]) for text in texts]
    again = small.generate([done[3].request.prompt, list(done[5].request.prompt)], [GREEDY, GREEDY], progress=False)
    assert [one.choices[0].tokens for one in again] == [done[3].choices[0].tokens, done[5].choices[0].tokens]
    assert small.generate(texts[3], GREEDY, progress=False)[0].choices[0].text == done[3].choices[0].text
    assert "Answering" in capsys.readouterr().err


def test_conversations(small):
    messages = [{"role": "user", "content": "The number is 40."}, {"role": "assistant", "content": "So?"}]
    assert small.chat(messages, GREEDY, progress=False)[0].request.prompt == tuple(
        small.tokenizer("The number is 40.\n\nSo?")["input_ids"]
    )
    with pytest.raises(ArgumentError, match="messages is empty"):
        small.chat([[]], GREEDY)


def test_what_a_template_refuses(small, monkeypatch):
    monkeypatch.setattr(small.tokenizer, "chat_template", "{{ raise_exception('only users may speak') }}")
    with pytest.raises(ArgumentError, match="only users may speak"):
        chat_prompt(small.tokenizer, [{"role": "tool", "content": "x"}])
    monkeypatch.setattr(small.tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}!{% endfor %}")
    assert small.tokenizer.decode(chat_prompt(small.tokenizer, [{"role": "user", "content": "four"}])) == "four!"


def test_a_prompt_that_does_not_fit_stops_all_before_they_begin(small):
    with pytest.raises(ContextLengthError):
        small.generate([[5] * 9, [5] * 131072], GREEDY)
    with pytest.raises(ArgumentError, match="params has 1 entries for 2 prompts"):
        small.generate(["a", "b"], [GREEDY])
    assert small.engine.unfinished == 0
    assert small.generate([], GREEDY, progress=False) == []


def test_an_interrupt_leaves_nothing_behind(small, monkeypatch):
    monkeypatch.setattr(small.engine.runner, "run", lambda work: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        small.generate(["a", "b"], GREEDY, progress=False)
    assert (small.engine.unfinished, small.engine.scheduler.idle) == (0, True)


def test_what_ends_an_answer_early_is_raised(small, monkeypatch):
    from magicpig.engine.runner import Outcome

    error = NotFiniteError("the model computes logits that are not finite")
    monkeypatch.setattr(small.engine.runner, "run", lambda work: [Outcome(None, error) for _ in work])
    with pytest.raises(NotFiniteError):
        small.generate(["a", "b"], GREEDY, progress=False)
    assert small.engine.unfinished == 0


def test_a_network_needs_its_tokenizer(build):
    with pytest.raises(ArgumentError, match="tokenizer is missing"):
        LLM(build("llama"))
