"""llama.cpp beside ours: the model that is made for it, and sequences that are stretched. Its library is optional."""

import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from typer.testing import CliRunner

from magicpig.cli import app
from magicpig.errors import ArgumentError
from magicpig.studies.bench import llama_cpp, shapes
from magicpig.studies.bench.decode import model_config
from magicpig.studies.bench.llama_cpp import KINDS, LlamaCpp, LlamaCppError, Turns, measure_reading, stretched

TINY = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}

# llama-cpp-python is compiled where it is installed, for ten minutes, so it is no part of what a developer installs.
needs_llama_cpp = pytest.mark.skipif(
    "llama-cpp-python" in llama_cpp.missing(), reason="llama-cpp-python is not installed"
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_that_is_made(tmp_path, kind, tied, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY | {"tie_word_embeddings": tied})
    llama_cpp.write_model(tmp_path / "made.gguf", model_config("tiny", None, 500), kind)
    read = GGUFReader(tmp_path / "made.gguf")
    assert read.fields["llama.context_length"].contents() == 500
    tensors = {each.name: each for each in read.tensors}
    assert ("output.weight" in tensors) == (not tied)
    assert list(tensors["blk.1.ffn_down.weight"].shape) == [96, 64]  # GGUF names the columns first
    assert list(tensors["blk.0.attn_k.weight"].shape) == [64, 64]
    assert list(tensors["token_embd.weight"].shape) == [64, 96]
    for name, tensor in tensors.items():
        if "norm" in name:
            assert tensor.tensor_type == GGMLQuantizationType.F32
            continue
        assert tensor.tensor_type == GGMLQuantizationType[kind.upper()]
        numbers = dequantize(tensor.data, tensor.tensor_type)
        # Uniform numbers whose squares add up to one in a row.
        assert np.square(numbers).sum(1).mean() == pytest.approx(1, rel=0.1)


def test_a_model_that_cannot_be_made(tmp_path):
    config = model_config("qwen3-0.6b", 1, 100)
    with pytest.raises(ArgumentError, match="shapes of Llama"):
        llama_cpp.write_model(tmp_path / "made.gguf", config, "bf16")


def saved(cells: int, *, layers: int = 2, row: int = 6, transposed: int = 0) -> np.ndarray:
    """A sequence as llama.cpp saves it: of two streams the second holds it."""
    parts = [np.array([7, 7, 2, 0, cells], dtype="<u4")]
    for cell in range(cells):
        parts.append(np.array([cell, 1, 0], dtype="<i4"))
    parts.append(np.array([transposed, layers], dtype="<u4"))
    for which in range(2 * layers):
        parts += [np.array([1], dtype="<i4"), np.array([row], dtype="<u8")]
        parts.append((np.arange(cells * row) + 50 * which).astype(np.uint8))
    return np.concatenate([part.view(np.uint8) for part in parts])


@pytest.mark.parametrize("cells", [1, 3, 4, 11])
def test_a_sequence_is_stretched(cells):
    right = saved(cells)
    rows = np.concatenate([np.arange(3 * 6)] * 4)[: cells * 6]  # those of three cells, again and again
    at = len(right)
    for which in reversed(range(4)):
        right[at - cells * 6 : at] = (rows + 50 * which).astype(np.uint8)
        at -= cells * 6 + 12
    assert np.array_equal(stretched(saved(3), cells), right)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (saved(3)[:-1], "laid out in another way"),
        (np.append(saved(3), np.uint8(0)), "laid out in another way"),
        (saved(3, transposed=1), "keeps values transposed"),
    ],
)
def test_a_sequence_of_another_layout_is_refused(state, message):
    with pytest.raises(LlamaCppError, match=message):
        stretched(state, 10)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    for command in ("decode", "prefill"):
        done = CliRunner().invoke(app, ["bench", command, "--shape", "tiny", "--context", "600", "--llama-cpp", "q8_0"])
        assert "pip install llama-cpp-python gguf" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--llama-cpp", "q4_0"], "--llama-cpp 'q4_0' is not one of q8_0, bf16"),
        (["--llama-cpp", "q8_0", "--device", "simulated"], "go without --device simulated"),
    ],
)
def test_what_the_command_refuses(arguments, message):
    done = CliRunner().invoke(app, ["bench", "decode", "--shape", "tiny", "--context", "600", *arguments])
    assert message in " ".join(done.output.split())


@needs_llama_cpp
@pytest.mark.parametrize("batch", [1, 3])
def test_llama_cpp_answers_behind_what_nobody_read(tmp_path, batch):
    config = model_config("tiny", None, 700)
    with LlamaCpp(config, "q8_0", tmp_path, longest=650, batch=batch, threads=1) as llama:
        turns = Turns(llama, 600, 3)
        for _ in range(3):
            turns()
        assert llama.length == 600
        found = turns.result()
        assert (found.context, found.batch, found.calls) == (600, batch, 6)
        assert found.tokens_per_s == pytest.approx(1e3 * batch / found.token_ms)
        reading = measure_reading(llama, 600, 40, repeats=2)
        assert (reading.tokens, reading.calls, llama.length) == (40, 2, 600)


@needs_llama_cpp
def test_a_stretched_sequence_is_what_llama_cpp_would_hold(tmp_path):
    """Behind a sequence that is put back unstretched, it says what it says behind the one that it read."""
    with LlamaCpp(model_config("tiny", None, 700), "bf16", tmp_path, longest=650, batch=1, threads=1) as llama:
        llama._read(200)
        right = np.array(llama._pass([(5, 200, 0)])[0])
        llama.fill(200)
        torch.testing.assert_close(np.array(llama._pass([(5, 200, 0)])[0]), right, rtol=1e-3, atol=1e-3)


@needs_llama_cpp
def test_the_command(tmp_path):
    out = tmp_path / "decode.json"
    arguments = ["--shape", "tiny", "--context", "600", "--samplers", "full", "--steps", "2", "--repeats", "1"]
    done = CliRunner().invoke(app, ["bench", "decode", *arguments, "--llama-cpp", "bf16,q8_0", "--json", str(out)])
    assert done.exit_code == 0
    assert "llama.cpp:q8_0" in done.output
    assert [each["name"] for each in json.loads(out.read_text())["llama_cpp"]] == ["llama.cpp:bf16", "llama.cpp:q8_0"]
