"""Next tokens behind real texts: what is compared, and that a run goes on where it was stopped."""

import json

import pytest
import torch
from typer.testing import CliRunner

from magicpig import generation
from magicpig.cli import app
from magicpig.config import EXACT
from magicpig.integrations.transformers import attach
from magicpig.studies.evaluation import perplexity
from magicpig.studies.evaluation.matrix import MatrixError, parse_methods
from magicpig.studies.evaluation.results import ResultsError, read_results
from magicpig.studies.evaluation.tasks.vocabulary import vocabulary

METHODS = parse_methods("full,window,lsh:K=4,L=20,sketch:64", exact_below=0, dense_layers=())
FIELDS = {"text", "length", "sampler", "nll", "kl", "kl_p95", "top1", "share_mean", "kl_tokens"}


@pytest.fixture(scope="module")
def model(model_dir):
    return generation.open_model(model_dir)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    words = vocabulary()
    paths = [tmp_path_factory.mktemp("texts") / f"{name}.txt" for name in ("one", "two")]
    for seed, path in enumerate(paths):
        drawn = torch.randint(len(words), (700,), generator=torch.Generator().manual_seed(seed))
        path.write_text(" ".join(words[i] for i in drawn))
    return tuple(paths)


@pytest.fixture(scope="module")
def plan(texts):
    return perplexity.Plan(texts, (600,), METHODS, decoded=20)


@pytest.fixture(scope="module")
def finished(model, plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "whole.jsonl"
    perplexity.evaluate(model, plan, path)
    return path


def test_one_line_per_text_and_sampler(finished):
    found = read_results(finished).lines
    assert [(line["text"], line["sampler"]) for line in found] == [
        (text, method.name) for text in ("one.txt", "two.txt") for method in METHODS
    ]
    for line in found:
        assert set(line) >= FIELDS
        assert len(line["kl_tokens"]) == 20
        assert line["kl"] == pytest.approx(sum(line["kl_tokens"]) / 20, rel=1e-2, abs=1e-9)
        if line["sampler"] == "full":
            assert (line["kl"], line["top1"], line["share_mean"]) == (0.0, 1.0, None)
        else:
            assert line["kl"] > 0


def test_full_attention_is_what_the_model_says_in_one_pass(model, texts, finished):
    network = generation.load(model)
    ids = generation.encode(model, texts[0].read_text(), most=600)
    with torch.no_grad():
        logits = network(torch.tensor([ids])).logits[0]
    nll = torch.nn.functional.cross_entropy(logits[-21:-1], torch.tensor(ids[-20:]))
    assert read_results(finished).lines[0]["nll"] == pytest.approx(float(nll), abs=1e-4)


def test_a_sketch_of_every_row_is_full_attention(model, texts):
    network = attach(generation.load(model), EXACT)
    ids = generation.encode(model, texts[0].read_text(), most=600)
    (all_rows,) = perplexity.compare(
        network, ids, parse_methods("topk:600", exact_below=0, dense_layers=()), decoded=20
    )
    assert all_rows["kl"] < 1e-6
    assert all_rows["top1"] == 1


def test_a_run_goes_on_where_it_was_stopped(model, plan, finished, tmp_path):
    whole = finished.read_bytes()
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(whole[: int(len(whole) * 0.8)])  # in the second text
    steps: list[str] = []
    perplexity.evaluate(model, plan, cut, on_step=lambda step, work: steps.append(step))
    assert all(step.startswith("two") for step in steps)
    assert cut.read_bytes().split(b"\n", 1)[1] == whole.split(b"\n", 1)[1]


def test_another_plan_does_not_go_on(model, plan, finished, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(finished.read_bytes())
    other = perplexity.Plan(plan.texts, plan.lengths, plan.methods, decoded=21)
    with pytest.raises(ResultsError, match=r"was begun with settings.decoded = 20, now it is 21"):
        perplexity.evaluate(model, other, copy)


def test_plans_that_cannot_be(model, texts, tmp_path):
    with pytest.raises(MatrixError, match=r"length 20 must be more than the 20 tokens"):
        perplexity.Plan(texts, (20, 600), METHODS, decoded=20)
    with pytest.raises(MatrixError, match="each needs a name of its own"):
        perplexity.Plan((texts[0], texts[0]), (600,), METHODS)
    short = perplexity.Plan(texts, (5000,), METHODS, decoded=20)
    with pytest.raises(MatrixError, match=r"one.txt has \d+ tokens, length 5000 needs more"):
        perplexity.evaluate(model, short, tmp_path / "x.jsonl")
    for content, cause in ((b"\xff", "is not UTF-8 text"), (None, "cannot read")):
        path = tmp_path / "bad.txt"
        path.write_bytes(content) if content else path.unlink()
        with pytest.raises(MatrixError, match=cause):
            perplexity.evaluate(model, perplexity.Plan((path,), (600,), METHODS, 20), tmp_path / "x.jsonl")
    assert not (tmp_path / "x.jsonl").exists()


def test_damaged_lines_are_named(finished, tmp_path):
    head, line = finished.read_text().split("\n")[:2]
    (tmp_path / "bad.jsonl").write_text(f"{head}\n{line}\n{json.dumps(json.loads(line) | {'kl_tokens': []})}\n")
    with pytest.raises(ResultsError, match=r"^line 2 of the results is damaged"):
        perplexity.table(read_results(tmp_path / "bad.jsonl"))


def test_the_texts_of_the_package_are_there():
    assert [path.name for path in perplexity.TEXTS] == ["code.txt", "liberty.txt", "pride.txt"]
    assert all(len(path.read_text(encoding="utf-8")) > 40_000 for path in perplexity.TEXTS)


def test_the_command_writes_and_shows(model_dir, texts, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    out = tmp_path / "out.jsonl"
    asked = ["--text", texts[0], "--lengths", "600", "--decoded", "8", "--samplers", "full,sketch:64"]
    result = run("eval", "perplexity", "--model", model_dir, "--out", out, *asked)
    assert result.exit_code == 0, result.stderr
    assert "same favourite" in result.stdout.replace("\n", " ")
    assert len(read_results(out).lines) == 2
    shown = run("eval", "show", out, "--markdown").stdout
    assert "| length | sampler | keys read | nll | kl |" in shown
    assert len(json.loads(run("eval", "show", out, "--json").stdout)["cells"]) == 2
