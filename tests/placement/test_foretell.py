"""What is said of machines that are not there adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from magicpig import Config
from magicpig.cli import app
from magicpig.errors import ArgumentError
from magicpig.kernels.sketch.reference import candidates_by_noise
from magicpig.placement.foretell import SPARE, USUAL_NOISE, Sizes, Speeds, choose, foretell
from magicpig.store.planner import LayerShape, plan

LAYERS = [LayerShape(8, 128, True, query_heads=32)] * 4
SIZES = Sizes(LAYERS, layer_bytes=400 << 20, layer_weights=200 << 20, other_bytes=1 << 30)
EXACT = Speeds(gpu=1e12, flops=1e15, link=5e10, host=1e11, rows=4e10, overhead=0.0)
GIB = 1 << 30
TOKENS = 98304


def by_place(batch: int = 1, vram: int = 24 * GIB, ram: int = 128 * GIB, speeds: Speeds = EXACT):
    found = foretell(SIZES, Config(), context=TOKENS, batch=batch, vram=vram, ram=ram, speeds=speeds)
    return {each.place: each for each in found}


def test_times_are_the_bytes_over_the_speeds() -> None:
    one = plan(LAYERS, Config(), sequences=1, tokens=TOKENS, dtype=torch.bfloat16).kept
    found, row = by_place(), 2 * 128 * 2
    weights = (SIZES.layer_bytes * 4 + SIZES.other_bytes / 2) / EXACT.gpu
    assert found["exact"].step_s == pytest.approx(weights + TOKENS * 8 * row * 4 / EXACT.gpu)
    recent = TOKENS - (TOKENS - 64) // 256 * 256
    window = 4 * 8 * row * (4 + recent) / EXACT.gpu
    candidates = candidates_by_noise(512, USUAL_NOISE)
    drawn = 4 * 8 * (candidates + 512) / 2 * row  # keys of the ones, values of the others
    sent = 4 * 8 * candidates * row
    on_gpu = weights + window + (one.index + drawn) / EXACT.gpu
    assert found["gpu"].step_s == pytest.approx(on_gpu)
    # The window is attended to while rows are gathered, which takes longer.
    trip = 4 * (8 * candidates * 4 / EXACT.link) + sent / EXACT.rows + sent / EXACT.link
    assert found["gpu_index"].step_s == pytest.approx(on_gpu - window + trip)
    state = 32 * (2 * 128 + 1) * 4 * 4 / EXACT.link
    answer = one.index / EXACT.host + drawn / EXACT.rows
    assert found["host"].step_s == pytest.approx(weights + answer + state)


def test_what_fits_is_counted() -> None:
    one = plan(LAYERS, Config(), sequences=1, tokens=TOKENS, dtype=torch.bfloat16).kept
    found = by_place(batch=8)
    room = 24 * GIB * (1 - SPARE) - SIZES.nbytes
    assert found["exact"].most == room // one.rows
    assert found["gpu"].most == room // one.total
    assert found["gpu_index"].most == min(room // one.index, 128 * GIB // one.rows)
    assert found["host"].most == 128 * GIB // one.total
    assert found["gpu_index"].ram == 8 * one.rows
    assert not by_place(vram=GIB)["host"].fits  # not even the weights


def test_two_micro_batches_are_taken_where_they_pay() -> None:
    slow = Speeds(gpu=1e12, flops=1e15, link=1e10, host=1e10, rows=4e9, overhead=0.0)
    one, eight = by_place(1, speeds=slow)["host"], by_place(8, speeds=slow)["host"]
    host_alone = 8 * one.device.busy("host")
    assert {span.what for span in eight.device.spans if span.where == "host"} == {"sample 0", "sample 1"}
    assert eight.device.busy("host") == pytest.approx(host_alone)
    assert eight.step_s < 8 * one.step_s
    # The host has nothing to do only until the first question comes and after the last answer.
    begin = min(s.begin for s in eight.device.spans if s.where == "host")
    end = max(s.end for s in eight.device.spans if s.where == "host")
    assert eight.device.idle("host", begin, end) < 0.02 * (end - begin)


def test_the_choice_says_why() -> None:
    best, why = choose(list(by_place(batch=16).values()))
    assert best.place == "gpu_index"
    assert why.startswith("gpu_index: ")
    assert "gpu holds " in why
    assert "host would take " in why
    with pytest.raises(ArgumentError, match=r"batch=1000 fits nowhere: .* sequences at most"):
        choose(list(by_place(batch=1000).values()))
    with pytest.raises(ArgumentError, match="sampler='lsh' has no steps on an accelerator"):
        foretell(SIZES, Config(sampler="lsh"), context=1, batch=1, vram=1, ram=1)
    with pytest.raises(ArgumentError, match="batch=0"):
        by_place(batch=0)


def test_the_command_shows_a_table_and_a_timeline(save_tiny_llama, tmp_path: Path) -> None:
    path = save_tiny_llama(tmp_path / "model", ["<unk>", "<eos>", "a"])
    sizes = ["--context", 100_000, "--batch", 3, "--vram", 1, "--ram", 4]
    runner = CliRunner()
    words = [str(x) for x in ["plan", "--model", path, *sizes]]
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    for name in ("exact", "gpu", "gpu_index", "host", "auto would take", "compute |", "   host |"):
        assert name in result.output
    found = json.loads(runner.invoke(app, [*words, "--json"]).output)
    assert [each["placement"] for each in found["placements"]] == ["exact", "gpu", "gpu_index", "host"]
    assert found["placements"][3]["idle_ms"]["compute"] > 0
    again = json.loads(runner.invoke(app, [*words[:2], str(path / "config.json"), *words[3:], "--json"]).output)
    assert again == found
    none = runner.invoke(app, [*words[:-4], "--vram", "0.01", "--ram", "0.01"])
    assert none.exit_code == 2
    assert "fits nowhere" in none.stderr
