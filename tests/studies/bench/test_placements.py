"""All variants of `magicpig bench placements` on a simulated device."""

from __future__ import annotations

import pytest
import torch

from magicpig import Config
from magicpig.errors import ArgumentError
from magicpig.studies.bench import placements
from magicpig.studies.bench.layer import Shape

pytest.importorskip("triton")


def test_every_variant_is_right_and_draws_what_the_processor_draws() -> None:
    device = placements.open_device(placements.SIMULATED)
    shape = Shape(2, 1, 16, 1, torch.bfloat16)
    config = Config(exact_below=0, budget=10)
    found = {each.variant: each for each in placements.run(device, [320], [1], shape, config, repeats=1)}
    assert list(found) == ["cpu", "host", "gpu_index", "gpu", "exact_cpu", "exact_gpu", "exact_copied"]
    for name in ("host", "gpu_index", "gpu"):
        assert found[name].same_samples
        assert found[name].error == pytest.approx(found["cpu"].error, rel=1e-3)
    for name in ("exact_cpu", "exact_gpu", "exact_copied"):
        assert found[name].error < 0.01
    assert found["host"].device_bytes == 0 < found["gpu_index"].device_bytes < found["gpu"].device_bytes


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match=r"--device=cuda, but torch .* finds no CUDA"):
        placements.open_device("cuda")
    with pytest.raises(ArgumentError, match="--device=tpu is not a device"):
        placements.open_device("tpu")
