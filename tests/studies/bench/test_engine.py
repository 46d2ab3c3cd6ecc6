"""The engine is measured beside the bare model, on the same contexts, and gives its network back."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from magicpig import Config, generation
from magicpig.cli import app
from magicpig.studies import pocket
from magicpig.studies.bench import engine as bench


@pytest.fixture(scope="module")
def opened():
    return generation.open_model(pocket.path())


def test_results_and_table(tmp_path, one_thread, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out.json"
    arguments = [
        "--running",
        "3",
        "--context",
        "300",
        "--samplers",
        "full,sketch:budget=64",
        "--steps",
        "2",
        "--repeats",
        "2",
    ]
    result = CliRunner().invoke(app, ["bench", "engine", *arguments, "--json", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert [each["name"] for each in found["results"]] == ["full", "sketch:budget=64"]
    for each in found["results"]:
        assert each["overhead"] > -1
        assert 0 < each["packed_ms"] < each["step_ms"]
        assert each["calls"] == 8
        assert each["tokens_per_s"] == pytest.approx(3000 / each["step_ms"])
    assert "overhead" in result.stdout


def test_the_overhead_is_that_of_pairs_which_never_waited():
    ours = [bench.Timing(ms, waited) for ms, waited in ((3, False), (50, True), (6, False), (22, False))]
    others = [bench.Timing(ms, waited) for ms, waited in ((2, False), (2, False), (5, False), (20, False))]
    assert bench.ratio(ours, others) == pytest.approx(1.2)
    assert bench.ratio(ours[1:2], others[1:2]) == 25


def test_the_network_is_given_back(opened, one_thread):
    network = generation.load(opened)
    before = network.config._attn_implementation
    (result,) = bench.measure(
        network, opened.tokenizer, [("sketch", Config(exact_below=0))], running=2, context=600, steps=1, rounds=1
    )
    assert (result.running, result.context) == (2, 600)
    assert network.config._attn_implementation == before
