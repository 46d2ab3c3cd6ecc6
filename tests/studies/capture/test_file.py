import json

import pytest
import torch
from safetensors.torch import save

from magicpig.studies.capture import AttentionSet, Capture, CaptureError, load_capture


def capture(dtype=torch.bfloat16) -> Capture:
    layers = {}
    for layer in (2, 11):
        keys, values = torch.randn(2, 2, 9, 16).to(dtype)
        queries = torch.randn(3, 4, 16).to(dtype)
        sinks = torch.randn(4) if layer == 2 else None
        layers[layer] = AttentionSet(keys, values, queries, scale=1 / 3, softcap=None if sinks is None else 30.0)
    return Capture(layers, {"model": "some", "tokens": 9})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_comes_back_bit_for_bit(dtype, tmp_path):
    made = capture(dtype)
    made.layers[2] = AttentionSet(**vars(made.layers[2]) | {"sink_logits": torch.randn(4)})
    (tmp_path / "file").write_bytes(made.to_bytes())
    back = load_capture(tmp_path / "file")
    assert back.about == made.about
    assert list(back.layers) == [2, 11]
    for layer, each in made.layers.items():
        for name, value in vars(each).items():
            got = getattr(back.layers[layer], name)
            assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value
            assert not isinstance(value, torch.Tensor) or got.dtype == value.dtype


def test_same_capture_same_bytes():
    torch.manual_seed(1)
    once = capture().to_bytes()
    torch.manual_seed(1)
    assert capture().to_bytes() == once


def header(**changes):
    described = {"version": 1, "layers": {"0": {"scale": 1.0, "softcap": None}}, "about": {}}
    return {"magicpig.capture": json.dumps(described | changes)}


def tensors(**changes):
    made = {"0.keys": torch.zeros(1, 4, 8), "0.values": torch.zeros(1, 4, 8), "0.queries": torch.zeros(2, 3, 8)}
    return {name: part for name, part in (made | changes).items() if part is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no safetensors at all", "not a safetensors file"),
        (save(tensors()), "not a capture of attention"),
        (save(tensors(), header(version=2)), "version 2 of the format; this package reads 1"),
        (save(tensors(), {"magicpig.capture": "{"}), "Expecting property name"),
        (save(tensors(), {"magicpig.capture": "[]"}), "must be an object"),
        (save(tensors(), header(layers={"0": {"scale": 1.0}})), "'softcap' is missing"),
        (save(tensors(**{"0.values": None}), header()), "'0.values' is missing"),
        (save(tensors(**{"0.values": torch.zeros(1, 5, 8)}), header()), "keys have shape"),
        (save(tensors(**{"0.values": torch.zeros(1, 4, 8).half()}), header()), "0.values is torch.float16"),
        (save(tensors(**{"0.keys": torch.zeros(1, 4, 8).int()}), header()), "0.keys is torch.int32"),
        (save(tensors(**{"0.queries": torch.full((2, 3, 8), torch.nan)}), header()), "0.queries has entries that"),
    ],
)
def test_what_is_no_capture_is_refused(content, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match=message) as caught:
        load_capture(path)
    assert str(path) in str(caught.value)


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(CaptureError, match=r"cannot read .*missing: No such file"):
        load_capture(tmp_path / "missing")
    content = capture().to_bytes()
    (tmp_path / "cut").write_bytes(content[:-1])
    with pytest.raises(CaptureError, match="not a safetensors file"):
        load_capture(tmp_path / "cut")
