"""bench decode with a device: all of it runs on a simulated one; what does not fit is not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from magicpig.cli import app
from magicpig.config import EXACT
from magicpig.placement.simulated import Simulated
from magicpig.studies.bench.decode_device import DeviceDecoder

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = [
    "bench",
    "decode",
    "--shape",
    "tiny",
    "--dtype",
    "float32",
    "--context",
    "150",
    "--steps",
    "1",
    "--repeats",
    "1",
]


def test_full_attention_and_the_papers_own_way(tmp_path: Path) -> None:
    file = tmp_path / "decode.json"
    given = ["--device", "simulated", "--samplers", "full,lsh", "--batch", "1,2", "--json", str(file)]
    result = CliRunner().invoke(app, [*TINY, *given])
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    results = found["results"]
    assert [(each["variant"], each["batch"]) for each in results] == [
        (variant, batch)
        for variants in (("exact_gpu", "exact_copied", "exact_cpu"), ("host_lsh",))
        for batch in (1, 2)
        for variant in variants
    ]
    assert all(each["fits"] and each["step_ms"] > 0 and each["steps"] == 1 for each in results)
    assert result.output.count("tokens/s") == len(results)


def test_what_does_not_fit_is_told_and_not_run() -> None:
    device = Simulated(memory=1 << 20)
    decoder = DeviceDecoder("tiny", device, layers=None, dtype=torch.float32, contexts=[150], steps=1, vram=300_000)
    (result,) = [each for each in decoder.measure(150, [64], {"full": EXACT}) if each.variant == "exact_gpu"]
    assert not result.fits
    assert result.step_ms is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--vram-limit", "2"], "--vram-limit goes with --device cuda"),
        (["--device", "simulated", "--batch", "0"], "--batch 0: must be from 1 to 1024"),
        (
            ["--device", "simulated", "--weights", "int8"],
            "--weights, --threads and --llama-cpp go without --device simulated",
        ),
        (["--device", "simulated", "--samplers", "sketch:9,sketch:8"], "--samplers names one twice"),
        (["--device", "tpu"], "--device=tpu is not a device"),
    ],
)
def test_what_cannot_be_is_refused(given: list[str], said: str) -> None:
    result = CliRunner().invoke(app, [*TINY, *given])
    assert result.exit_code == 2
    assert said in result.output
