"""`magicpig tune`: a file of settings that the other commands take, a plot, a table; or one line and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from magicpig.cli import app
from magicpig.config_file import load_config
from magicpig.model_dir import ModelError
from magicpig.studies import pocket
from magicpig.studies.bench import layer as bench_layer
from magicpig.studies.tune import Trials
from magicpig.studies.tune import run as tuning

TEXT = " ".join(f"w{7 * i % 31}" for i in range(2300))
QUICK = ("--samplers", "sketch:256,lsh:K=8,L=60", "--steps", "4", "--epsilon", "0.3")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, save_tiny_llama: Callable[..., Path]) -> Path:
    """A tiny Llama with random weights and a tokenizer of 31 words."""
    words = ["<unk>", *(f"w{i}" for i in range(31))]
    path = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny_llama(path, words, special={}, max_position_embeddings=4096)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def run(*arguments: object) -> object:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="magicpig")


def tune(model, text, out, *arguments):
    return run("tune", "--model", model, "--text", text, "--out", out, *arguments)


def assert_refused(result, *causes):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    for cause in causes:
        assert str(cause) in line


def test_a_file_a_plot_and_a_table(model_dir, text, tmp_path):
    out = tmp_path / "tuned.json"
    done = tune(model_dir, text, out, *QUICK)
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", "tuned.json", "tuned.png", "tuned.svg"}
    about = json.loads(out.read_text())["about"]
    assert about["text"] == {"file": "text.txt", "tokens": 2300}
    assert about["goal"] == {"mean": 0.3, "p95": 0.6}
    assert [row["layer"] for row in about["layers"]] == [0, 1]
    assert all(len(row["heads"]) == 4 for row in about["layers"])
    assert about["ms_per_token"]["tuned"] <= about["ms_per_token"]["full"]
    assert {"model", "machine", "date", "versions", "threads"} <= about.keys()
    config = load_config(out)
    assert set(config.layers) | set(config.dense_layers or (0, 1)) == {0, 1}
    assert "Settings in" in done.stdout
    answer = run("generate", "--model", model_dir, "--config", out, "--prompt", TEXT, "--max-new-tokens", 3)
    assert answer.exit_code == 0, answer.output


def test_json_has_every_setting_of_every_layer(model_dir, text, tmp_path):
    done = tune(model_dir, text, tmp_path / "tuned.json", *QUICK, "--length", 2200, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["about"]["text"]["tokens"] == 2200
    assert [row["layer"] for row in found["measured"]] == [0, 0, 0, 1, 1, 1]
    assert [row["setting"]["sampler"] for row in found["measured"][:3]] == ["full", "sketch", "lsh"]
    assert found["settings"] == json.loads((tmp_path / "tuned.json").read_text())["settings"]


def test_a_goal_out_of_reach_leaves_all_layers_dense(model_dir, text, tmp_path):
    out = tmp_path / "tuned.json"
    done = tune(model_dir, text, out, "--samplers", "sketch:16,bits=1", "--steps", 4, "--epsilon", 1e-6)
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["settings"] == {"sampler": "full"}


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--length", "9K"), "--length 9216: the text has 2300 tokens"),
        (("--length", "1K"), "the text has 1024 tokens; with fewer than 2048"),
        (("--length", "many"), "length 'many' is not a number of tokens"),
        (("--epsilon", "0"), "mean=0.0"),
        (("--epsilon", "0.2", "--p95", "0.1"), "p95=0.1"),
        (("--samplers", "topk"), "--samplers 'topk' cannot be measured here; allowed: lsh, sketch"),
        (("--samplers", "sketch:bits=9"), "bits=9"),
        (("--samplers", "sketch:kv_dtype=int8"), "kv_dtype cannot be tuned"),
        (("--steps", "1"), "--steps"),
        (("--text", "/nowhere"), "cannot read /nowhere"),
        (("--model", "/nowhere"), "/nowhere: no such directory"),
    ],
    ids=lambda each: each[0] if isinstance(each, tuple) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, cause, model_dir, text, tmp_path):
    assert_refused(tune(model_dir, text, tmp_path / "tuned.json", *arguments), cause)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("name", ["tuned.png", "no/such/folder.json"])
def test_files_that_cannot_be_written(name, model_dir, text, tmp_path):
    assert_refused(tune(model_dir, text, tmp_path / name), tmp_path / name)


def test_no_tuning_where_the_kernels_are_wrong(model_dir, text, tmp_path, monkeypatch):
    def wrong(shape: bench_layer.Shape) -> None:
        raise bench_layer.WrongResultError("self-check failed")

    monkeypatch.setattr(tuning, "verify_kernels", wrong)
    done = tune(model_dir, text, tmp_path / "tuned.json", *QUICK)
    assert done.exit_code == 1
    assert "the results are wrong: self-check failed" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_text_that_does_not_fit_is_refused_before_it_is_read(model_dir, text, tmp_path, monkeypatch):
    monkeypatch.setattr("magicpig.store.planner.free_memory", lambda: 100_000)
    assert_refused(tune(model_dir, text, tmp_path / "tuned.json", *QUICK), "2300 tokens need", "are free")


def test_without_a_model_the_pocket_model_is_tuned(text, tmp_path, monkeypatch):
    def missing() -> Path:
        raise ModelError("there is no pocket model")

    monkeypatch.setattr(pocket, "path", missing)
    assert_refused(
        run("tune", "--text", text, "--out", tmp_path / "a.json"), "there is no pocket model, or pass --model"
    )


def test_an_interrupted_tuning_leaves_nothing(model_dir, text, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        assert len(list(tmp_path.glob(".tuned.*.part"))) == 3
        raise KeyboardInterrupt

    monkeypatch.setattr(Trials, "again", interrupt)
    done = tune(model_dir, text, tmp_path / "tuned.json", *QUICK)
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "magicpig: interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
