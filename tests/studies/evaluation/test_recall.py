"""Needles in what was decoded: where they stand, and that a run goes on where it was stopped."""

import json

import pytest
import torch
from typer.testing import CliRunner

from magicpig import generation
from magicpig.cli import app
from magicpig.config import EXACT
from magicpig.integrations.transformers import attach
from magicpig.studies.evaluation import recall
from magicpig.studies.evaluation.matrix import MatrixError, parse_methods
from magicpig.studies.evaluation.results import ResultsError, read_results
from magicpig.studies.evaluation.tasks.vocabulary import vocabulary

METHODS = parse_methods("full,topk:4000,sketch:32", exact_below=0)


@pytest.fixture(scope="module")
def model(model_dir):
    return generation.open_model(model_dir)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words = vocabulary()
    drawn = torch.randint(len(words), (900,), generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(" ".join(words[i] for i in drawn))
    return path


@pytest.fixture(scope="module")
def plan(text):
    return recall.Plan(text, METHODS, prompt=64, decoded=640, needles=2, samples=2)


@pytest.fixture(scope="module")
def finished(model, plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "whole.jsonl"
    recall.evaluate(model, plan, path)
    return path


def test_one_line_per_needle_of_each_sample_and_sampler(finished):
    found = read_results(finished).lines
    assert [(line["sample"], line["sampler"], line["at"]) for line in found] == [
        (sample, method.name, at) for sample in (0, 1) for method in METHODS for at in (144, 432)
    ]
    numbers = {line["number"] for line in found}
    assert len(numbers) == 4
    for line in found:
        assert line["decoded"] > 640
        assert line["behind"] == line["decoded"] - line["at"]
        if line["sampler"] == "sketch:32":
            assert line["indexed"] > 500  # of 64 tokens of prompt and those that were decoded
            assert 0 < line["share_mean"] < 0.2


def test_a_sampler_that_reads_all_answers_as_full_attention(finished):
    answers: dict[str, list[str]] = {}
    for line in read_results(finished).lines:
        answers.setdefault(line["sampler"], []).append(line["prediction"])
    assert answers["full"] == answers["topk:4000"]


def test_what_is_decoded_is_text_and_needles(model, plan, monkeypatch):
    network = attach(generation.load(model), EXACT)
    fed: list[int] = []
    decode = recall._decode
    monkeypatch.setattr(recall, "_decode", lambda net, ids, cache: fed.extend(ids) or decode(net, ids, cache))
    ids = generation.encode(model, plan.text.read_text(), most=704)
    recall.ask(model, network, ids, plan, METHODS[0], 0)
    first, second = recall.make_needles(plan, 0)
    said = model.tokenizer.decode(fed)
    assert said.index(first.number[0]) < said.index(second.number[0], said.index(first.number[0]) + 1)
    assert fed[:144] == ids[64 : 64 + 144]


def test_a_run_goes_on_where_it_was_stopped(model, plan, finished, tmp_path):
    whole = finished.read_bytes()
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(whole[: int(len(whole) * 0.9)])
    steps: list[str] = []
    recall.evaluate(model, plan, cut, on_step=lambda step, work: steps.append(step))
    assert set(steps) <= {"topk:4000", "sketch:32"}
    assert cut.read_bytes().split(b"\n", 1)[1] == whole.split(b"\n", 1)[1]


def test_texts_that_do_not_do(model, text, tmp_path):
    with pytest.raises(MatrixError, match=r"text.txt has \d+ tokens, length 5064 needs more"):
        recall.evaluate(model, recall.Plan(text, METHODS, 64, 5000), tmp_path / "x.jsonl")
    short = generation.open_model(model.directory, max_length=720)
    with pytest.raises(MatrixError, match=r"64 \+ 640 tokens and needles are beyond the limit of 720"):
        recall.evaluate(short, recall.Plan(text, METHODS, 64, 640), tmp_path / "x.jsonl")


def test_damaged_lines_are_named(finished, tmp_path):
    head, line = finished.read_text().split("\n")[:2]
    (tmp_path / "bad.jsonl").write_text(f"{head}\n{json.dumps(json.loads(line) | {'score': 'x'})}\n")
    with pytest.raises(ResultsError, match=r"^line 1 of the results is damaged"):
        recall.table(read_results(tmp_path / "bad.jsonl"))


def test_the_command_writes_and_shows(model_dir, text, tmp_path):
    out = tmp_path / "out.jsonl"
    asked = ["--text", text, "--prompt", 64, "--decoded", 400, "--needles", 1, "--samplers", "full,sketch:32"]
    command = ["eval", "recall", "--model", model_dir, "--out", out, *asked]
    result = CliRunner().invoke(app, [str(each) for each in command])
    assert result.exit_code == 0, result.stderr
    assert "needles found again in" in result.stdout
    assert "of 1" in result.stdout
    assert len(read_results(out).lines) == 2
