"""`magicpig chat` with the pocket model, which knows numbers that are hidden in texts."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from magicpig import LLM, Config
from magicpig.cli import app
from magicpig.cli.chat import Session
from magicpig.engine.errors import ContextLengthError
from magicpig.engine.runner import Outcome
from magicpig.errors import NotFiniteError
from magicpig.studies import pocket

DOCUMENT = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\nOne of the special magic numbers for uppity-gopher is: 4267939. Some people verify when they "
    "see an air; others consider at once. The grass is green. The sky is blue. The sun is yellow. Here we go."
)
QUESTION = (
    "What is the special magic number for uppity-gopher mentioned in the provided text? The special magic number for "
    "uppity-gopher mentioned in the provided text is"
)


@pytest.fixture(scope="module")
def session():
    with LLM(pocket.path(), config=Config(exact_below=64, block=16, recent=16)) as llm:
        llm.engine.start()
        yield Session(llm.engine, system=None, max_tokens=8, temperature=0.0)


@pytest.fixture(autouse=True)
def _anew(session, one_thread):
    session.reset()


def test_documents_stay_warm(session):
    session.add_document(DOCUMENT)
    assert "".join(session.ask(QUESTION)).strip() == "4267939"
    assert [message["role"] for message in session.messages] == ["user", "assistant"]
    assert session.messages[0]["content"] == f"{DOCUMENT}\n\n{QUESTION}"
    before = session.report.prompt_tokens
    assert list(session.ask(QUESTION))
    assert session.report.cached_tokens >= before - 1


def test_an_answer_that_is_ended_is_kept_as_far_as_it_came(session):
    session.max_tokens = 50_000
    answer = session.ask("The grass is green.")
    first = next(answer)
    answer.close()
    assert session.messages[-1] == {"role": "assistant", "content": first}
    session.max_tokens = 8
    session.reset()
    assert list(session.ask(QUESTION)) is not None


def test_what_cannot_be_asked_was_not_asked(session, monkeypatch):
    with pytest.raises(ContextLengthError):
        list(session.ask("x " * 140_000))
    assert session.messages == []
    error = NotFiniteError("the model computes logits that are not finite")
    monkeypatch.setattr(session.engine.runner, "run", lambda work: [Outcome(None, error) for _ in work])
    session.add_document(DOCUMENT)
    with pytest.raises(NotFiniteError):
        list(session.ask(QUESTION))
    assert (session.messages, session._documents) == ([], [DOCUMENT])


def test_another_sampler(session):
    session.use("full")
    session.add_document(DOCUMENT)
    list(session.ask(QUESTION))
    assert session.report.rows_share_mean is None
    session.use("sketch:16")
    list(session.ask(QUESTION))
    assert 0 < session.report.rows_share_mean < 1
    with pytest.raises(ValueError, match="sampler='quick'"):
        session.use("quick")


def test_in_a_terminal(tmp_path):
    (tmp_path / "text.txt").write_text(DOCUMENT)
    said = [
        "/help",
        "/stats",
        f"/doc {tmp_path}/text.txt",
        QUESTION,
        "/stats",
        "/sampler lsh:K=9, L=120",
        "/doc none",
        "/what",
    ]
    result = CliRunner().invoke(app, ["chat", "--max-tokens", "8"], input="\n".join([*said, "/reset", "/quit", "x"]))
    assert result.exit_code == 0, result.output
    for part in ("Ctrl-C ends an answer", "nothing was answered yet", "characters; now ask", "4267939", "of them warm"):
        assert part in result.output
    for part in ("from now on: lsh:K=9,L=120", "cannot read none", "'/what' is not understood", "begins anew"):
        assert part in result.output
