import pytest
import torch

from magicpig import demo
from magicpig.config import Config

EVERYTHING = Config(K=1, L=64, min_hits=1, exact_below=0, dense_layers=(0,))  # samples every key
FEW = Config(K=8, L=40, exact_below=0, dense_layers=(0,))


@pytest.fixture(scope="module")
def model():
    return demo.build_model(torch.float32, layers=3, hidden=64)


def run(model, text="The quick brown fox jumps over the lazy dog. ", **settings):
    settings = {"tokens": 700, "new_tokens": 6, "config": FEW} | settings
    return demo.run(text, "a text", model=model, **settings)


def test_sampling_everything_is_exact(model):
    result = run(model, config=EVERYTHING)
    assert result.same_token == 5
    for layer in result.errors:
        assert layer.mean <= layer.max < 1e-5


def test_errors_are_of_the_sampled_layers_alone(model):
    result = run(model)
    dense, *sampled = result.errors
    assert (dense.kind, dense.max) == ("dense", 0.0)
    for layer in sampled:
        assert layer.kind == "sampled"
        assert 1e-3 < layer.mean < 1
        assert layer.mean < layer.max


def test_fewer_samples_mean_larger_errors(model):
    few, more = run(model), run(model, config=Config(K=4, L=40, exact_below=0, dense_layers=(0,)))
    assert more.report.sampled_share_mean > few.report.sampled_share_mean
    assert more.errors[1].mean < few.errors[1].mean


def test_the_prompt_is_read_once_and_exactly(model):
    seen = []
    text = "Some text, once through. " * 40
    result = run(model, text, on_prefill=seen.append)
    assert sum(seen) == result.tokens == 700
    ids = torch.tensor([list(text.encode()[:700])])
    expected = int(model(ids, use_cache=False).logits[0, -1].argmax())
    assert result.text.startswith(bytes([expected]).decode(errors="replace"))
    assert not result.repeated


def test_hooks_are_gone_afterwards(model):
    run(model)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_numbers_are_consistent(model):
    result = run(model)
    assert result.repeated  # 45 bytes of text for 700 tokens
    assert result.new_tokens == 6
    assert len(result.errors) == len(result.report.layers) == 3
    assert result.report.layers[1].tokens == 700 + 5 + demo.PROBES
    assert result.prefill_tokens_per_s == 700 / result.prefill_s
    assert min(result.full_ms, result.sampled_ms) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"text": ""}, "the document is empty"), ({"tokens": 0}, "tokens=0"), ({"new_tokens": 2}, "new_tokens=2")],
)
def test_nothing_to_do(settings, message, model):
    with pytest.raises(ValueError, match=message):
        run(model, **settings)


def test_there_is_always_enough_to_read():
    name, text = demo.project_text()
    assert "Python" in name
    assert len(text.encode()) > 100_000


def test_bfloat16_only_where_it_is_fast(monkeypatch):
    for isa, dtype in (("avx512bf16", torch.bfloat16), ("avx512", torch.float32), ("portable", torch.float32)):
        monkeypatch.setattr(demo.native, "isa", lambda isa=isa: isa)
        assert demo.fast_dtype() == dtype
