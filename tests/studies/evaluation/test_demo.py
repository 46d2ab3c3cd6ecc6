import json
import re

import pytest
from typer.testing import CliRunner

from magicpig import generation
from magicpig.cli import app
from magicpig.model_dir import ModelError
from magicpig.studies import demo, pocket
from magicpig.studies.evaluation.tasks import TaskError

TOKENS = 1000


@pytest.fixture(scope="module")
def model(model_dir):
    return generation.open_model(model_dir)


@pytest.fixture(scope="module")
def result(model):
    seen = []
    found = demo.run(model, tokens=TOKENS, on_read=seen.append)
    assert sum(seen) == sum(document.tokens for document in found.documents)
    return found


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)], prog_name="magicpig")


def test_each_number_in_the_document_is_asked_for(model, result):
    needles, words = result.documents
    assert len(needles.questions) == 4
    assert len({question.text for question in needles.questions}) == 4
    for question in needles.questions:
        assert re.fullmatch(r"What is the special magic number for \S+ mentioned in the provided text\?", question.text)
        (value,) = question.expected
        assert re.fullmatch(r"\d{7}", value)
    (question,) = words.questions
    assert len(question.expected) == 3


def test_scores_are_those_of_the_tasks(result):
    for document in result.documents:
        for question in document.questions:
            for said, score in zip(question.said, question.scores, strict=True):
                right = sum(answer in said.lower() for answer in question.expected)
                assert score == right / len(question.expected)


def test_a_chat_model_is_asked_about_a_novel_in_its_template(model_dir):
    model = generation.open_model(model_dir)
    model.tokenizer.chat_template = "{% for message in messages %}the {{ message.content }}{% endfor %} of and"
    found = demo.run(model, tokens=TOKENS)
    (document,) = found.documents
    assert document.about == "numbers hidden in a novel"
    assert len(document.questions) == 4
    assert document.tokens < TOKENS


def test_what_was_read(result):
    full, sampled = result.performance
    assert (full.share_mean, full.share_max, full.index_bytes) == (None, None, 0)
    assert 0 < sampled.share_mean <= sampled.share_max + 1e-12 < 1
    assert sampled.index_bytes > 0
    assert min(full.tokens_per_s, sampled.tokens_per_s) > 0
    assert (result.layers, result.sampled_layers) == (3, [0, 1, 2])


def test_lengths_that_cannot_be(model):
    with pytest.raises(TaskError, match="length=100 is below the minimum"):
        demo.run(model, tokens=100)
    with pytest.raises(ModelError, match="limit is 8192"):
        demo.run(model, tokens=9000)


@pytest.fixture
def seen_before(result, monkeypatch):
    asked = {}
    monkeypatch.setattr(demo, "run", lambda model, **options: asked.update(options) or result)
    return asked


def test_as_tables(model_dir, seen_before):
    result = run("--model", model_dir, "--tokens", TOKENS, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert (seen_before["tokens"], seen_before["seed"]) == (TOKENS, 3)
    plain = " ".join(result.stdout.split())
    assert "Document 1: numbers hidden among sentences" in plain
    assert "Document 2: words to be counted" in plain
    assert re.search(r"right answers \d of 5 \d of 5", plain)
    assert re.search(r"keys read per step all [\d.]+%, at most [\d.]+%", plain)
    assert "Sampled: 512 keys a step by a sketch, all 3 layers." in plain


def test_as_json(model_dir, seen_before):
    answer = json.loads(run("--model", model_dir, "--tokens", TOKENS, "--json").stdout)
    assert [len(document["questions"]) for document in answer["documents"]] == [4, 1]
    assert answer["performance"][1]["config"]["K"] == 10


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--tokens", 100], "below the minimum"),
        (["--tokens", 9000], "8192"),
        (["--model", "missing"], "no such directory"),
    ],
)
def test_mistakes_are_one_line(arguments, cause, model_dir):
    result = run("--model", model_dir, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert cause in line


def test_without_the_packaged_model(monkeypatch):
    def missing():
        raise ModelError("the model is not here")

    monkeypatch.setattr(pocket, "path", missing)
    result = run()
    assert result.exit_code == 2
    assert result.stderr == "magicpig: error: the model is not here, or pass --model\n"


def test_bfloat16_only_where_it_is_fast(monkeypatch):
    for isa, dtype in (("avx512bf16", "auto"), ("avx512", "float32"), ("portable", "float32")):
        monkeypatch.setattr(demo.library, "isa", lambda isa=isa: isa)
        assert demo.fast_dtype() == dtype
