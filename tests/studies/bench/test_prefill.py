import pytest
import torch
from typer.testing import CliRunner

from magicpig.attention import step
from magicpig.cli import app
from magicpig.studies.bench import prefill, shapes
from magicpig.studies.bench.decode import Decoder

TINY = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(prefill, "_SIZE", 64)


def decoder(weights="auto"):
    return Decoder("tiny", layers=2, dtype=torch.bfloat16, longest=600, steps=40, weights=weights)


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_a_pass_behind_others(weights):
    made, rounds, before = decoder(weights), [], step.prefill
    found = prefill.measure(made, 600, 40, repeats=2, on_round=lambda: rounds.append(1))
    assert step.prefill is before
    assert len(rounds) == found.calls == 2
    assert (found.context, found.tokens) == (600, 40)
    assert found.tokens_per_s == pytest.approx(40 / found.pass_ms * 1e3)
    assert 0 < found.attention_ms < found.pass_ms
    # 4 operations for each of 16 coordinates, 4 heads, 2 layers, and 40 tokens that see 600 and half of themselves.
    operations = 4 * 16 * 4 * 2 * 40 * 620.5
    assert found.attention_gflops == pytest.approx(operations / found.attention_ms / 1e6)
    assert found.product_gflops > 0


def test_what_a_pass_reads_is_forgotten_after_it(monkeypatch):
    made, lengths = decoder(), []
    original = prefill.timed
    cache = made.filled(600, prefill.EXACT)
    monkeypatch.setattr(made, "filled", lambda *_: cache)
    monkeypatch.setattr(prefill, "timed", lambda call: (lengths.append(cache.get_seq_length()), original(call))[1])
    prefill.measure(made, 600, 40, repeats=2)
    assert lengths[:3] == [600, 600, 600]


def test_the_command(tmp_path):
    out = tmp_path / "prefill.json"
    arguments = [
        "bench",
        "prefill",
        "--shape",
        "tiny",
        "--context",
        "512",
        "--tokens",
        "32",
        "--repeats",
        "1",
        "--dtype",
        "float32",
    ]
    result = CliRunner().invoke(app, [*arguments, "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert "tokens/s" in result.output
    assert '"attention_gflops"' in out.read_text()
