"""`magicpig generate --jsonl`: every line is answered once, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from magicpig.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], prog_name="magicpig")


@pytest.fixture
def prompts(tmp_path):
    """Six lines with settings of their own, an empty one between them."""
    lines = [
        {"id": f"n{i}", "prompt": f"the sea of {word} is", "max_tokens": 3 + i, "ignore_eos": True, "seed": i}
        for i, word in enumerate(("rome", "gold", "cats", "maps"))
    ]
    lines += [
        {"messages": [{"role": "user", "content": "the cat"}], "magicpig": {"sampler": "full"}, "stop": "the"},
        {"prompt": "the sea", "n": 2},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def read(path):
    return {answer["line"]: answer for answer in map(json.loads, path.read_text().splitlines())}


def test_all_lines_are_answered_and_a_second_run_does_what_is_left(prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    result = run("--jsonl", prompts, "--out", out, "--max-new-tokens", 4)
    assert result.exit_code == 0, result.output
    answers = read(out)
    assert sorted(answers) == [0, 2, 4, 6, 8, 10], "numbers of lines"
    assert [answers[line]["id"] for line in (0, 2, 4, 6)] == ["n0", "n1", "n2", "n3"]
    assert [answers[line]["report"]["new_tokens"] for line in (0, 2, 4, 6)] == [3, 4, 5, 6]
    assert len(answers[10]["texts"]) == 2
    whole = out.read_text().splitlines(keepends=True)
    out.write_text("".join(whole[:3]) + whole[3][:40])  # the fourth is torn
    result = run("--jsonl", prompts, "--out", out, "--max-new-tokens", 4)
    assert "6 prompts answered, 3 of them before; 0 errors" in result.stderr.replace("\n", " ")
    assert out.read_text().startswith("".join(whole[:3]))
    assert {line: answer["text"] for line, answer in read(out).items()} == {
        line: answer["text"] for line, answer in answers.items()
    }
    before = out.read_bytes()
    result = run("--jsonl", prompts, "--out", out, "--max-new-tokens", 4)
    assert (result.exit_code, out.read_bytes()) == (0, before)


def test_what_cannot_be_answered_is_said_in_its_line(tmp_path):
    (tmp_path / "in").write_text(json.dumps({"prompt": "the sea " * 50}) + "\n" + json.dumps({"prompt": "the sea"}))
    result = run("--jsonl", tmp_path / "in", "--out", tmp_path / "out", "--max-length", 40, "--max-new-tokens", 4)
    assert (result.exit_code, "1 error" in result.stderr) == (0, True), result.output
    answers = read(tmp_path / "out")
    assert answers[0]["error"]["code"] == "context_length_exceeded"
    assert answers[1]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":1: not JSON"),
        ("[]", ":1: must be an object with either prompt or messages"),
        ('{"prompt": "a", "messages": []}', "either prompt or messages"),
        ('{"prompt": "a", "colour": 1}', ":1: colour: there is no such setting"),
        ('{"prompt": "a", "temperature": -1}', ":1: temperature=-1"),
        ('{"prompt": "a", "magicpig": {"budget": -1}}', ":1: budget=-1"),
        ('{"prompt": 3}', ":1: "),
    ],
)
def test_lines_that_ask_for_what_does_not_exist_are_refused_before_anything_is_computed(line, message, tmp_path):
    (tmp_path / "in").write_text(line + "\n")
    result = run("--jsonl", tmp_path / "in", "--out", tmp_path / "out")
    assert (result.exit_code, message in result.stderr.replace("\n", "")) == (2, True), result.stderr


def test_files_of_other_runs_are_left_alone(prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    (tmp_path / "one").write_text('{"prompt": "the sea"}\n')
    assert run("--jsonl", tmp_path / "one", "--out", out, "--max-new-tokens", 2).exit_code == 0
    before = out.read_bytes()
    for arguments in (["--jsonl", prompts], ["--jsonl", tmp_path / "one", "--max-new-tokens", 3]):
        result = run(*arguments, "--out", out)
        assert (result.exit_code, "other settings" in result.stderr.replace("\n", " ")) == (2, True)
        assert out.read_bytes() == before
    out.write_text("my diary\nof today\n")
    assert run("--jsonl", prompts, "--out", out).exit_code == 2
    assert out.read_text() == "my diary\nof today\n"
    assert run("--jsonl", prompts).exit_code == 2
    assert run("--jsonl", prompts, "--prompt", "a", "--out", out).exit_code == 2


def test_it_goes_on_after_a_kill(tmp_path):
    lines = [{"prompt": f"the sea of {i} is", "max_tokens": 60, "ignore_eos": True} for i in range(12)]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "magicpig", "generate", "--jsonl", tmp_path / "in", "--out", out]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not out.exists() or out.read_bytes().count(b"\n") < 1:
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    kept = out.read_bytes().rpartition(b"\n")[0]
    assert run("--jsonl", tmp_path / "in", "--out", out).exit_code == 0
    assert out.read_bytes().startswith(kept)
    assert sorted(read(out)) == list(range(12))
    assert out.read_bytes().count(b"\n") == 12
