"""The captures that come with the tests: files of this format stay readable, and what is in them can be sampled."""

from pathlib import Path

import pytest
import torch

from magicpig.config import Config
from magicpig.studies.capture import load_capture
from magicpig.studies.figures.study import estimate, exact_outputs

FILES = sorted((Path(__file__).parents[2] / "data" / "captures").glob("*.safetensors"))
LARGEST = 300_000  # bytes; the repository is no place for data


def test_there_are_some():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_capture(path):
    assert path.stat().st_size <= LARGEST
    capture = load_capture(path)
    assert capture.about["model"]
    for attention in capture.layers.values():
        assert attention.keys.dtype in (torch.float16, torch.bfloat16)
        exact = exact_outputs(attention)
        for each in estimate(attention, Config(sampler="full"), exact):
            assert each.error < 1e-4
        shares = [each.share for each in estimate(attention, Config(K=4, L=60, block=16), exact)]
        assert all(0 <= share < 1 for share in shares)
        assert max(shares) > 0
