"""The published results of the pocket model, and an abridged version of the run that made them."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from magicpig.cli import app
from magicpig.config import SAMPLERS
from magicpig.studies import pocket
from magicpig.studies.evaluation.matrix import GROUPS
from magicpig.studies.evaluation.results import read_results

TASKS = ("niah_multikey_1", "vt", "cwe", "fwe")
LENGTH = 4096


@pytest.fixture(scope="module")
def published():
    return read_results(Path(__file__).parents[3] / "docs" / "results" / "ruler.jsonl")


def test_they_have_every_task_length_protocol_and_sampler(published):
    settings = published.header["settings"]
    assert set(settings["tasks"]) == set(GROUPS["generated"])
    assert settings["lengths"] == [1 << k for k in range(10, 16)]
    assert settings["protocols"] == ["question-dense", "question-sparse"]
    assert {config["sampler"] for config in settings["samplers"].values()} == set(SAMPLERS)
    cells = len(settings["tasks"]) * len(settings["lengths"]) * len(settings["protocols"]) * len(settings["samplers"])
    assert len(published.lines) == cells * 5


@pytest.mark.slow
def test_the_same_command_on_fewer_texts_gives_such_results(published, tmp_path):
    samplers = ",".join(published.header["settings"]["samplers"])
    out = tmp_path / "results.jsonl"
    command = ["eval", "ruler", "--model", str(pocket.path()), "--out", str(out), "--protocol", "both"]
    command += ["--dense-layers", "0,16,32,48"]  # the default when these results were made
    command += ["--tasks", ",".join(TASKS), "--lengths", str(LENGTH), "--samples", "1", "--samplers", samplers]
    result = CliRunner().invoke(app, command, prog_name="magicpig")
    assert result.exit_code == 0, result.output
    again = read_results(out)
    assert len(again.lines) == len(TASKS) * 2 * len(published.header["settings"]["samplers"])
    expected = {key(line): line for line in published.lines}
    for line in again.lines:
        assert line["answers"] == expected[key(line)]["answers"]
        # Which keys a sampler reads depends on rounding, by which machines differ; how many hardly does.
        if line["share_mean"] is not None:
            assert line["share_mean"] == pytest.approx(expected[key(line)]["share_mean"], rel=0.2)
    scores = [line["score"] for line in again.lines if line["sampler"] == "full"]
    assert sum(scores) / len(scores) > 0.9


def key(line):
    return tuple(line[name] for name in ("task", "length", "index", "protocol", "sampler"))
