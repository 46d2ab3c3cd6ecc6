import dataclasses

import pytest
import torch

from magicpig.bench import attention
from magicpig.config import Config

SHAPE = attention.Shape(heads=6, kv_heads=2, head_dim=48, batch=2, dtype=torch.float32)
SETTINGS = [Config(K=6, L=60, exact_below=0), Config(K=8, L=60, exact_below=0)]


@pytest.fixture(autouse=True)
def small_evictor(monkeypatch):
    monkeypatch.setattr(attention, "EVICTION_BYTES", 1 << 16)


def test_one_result_per_setting():
    rounds = []
    loose, strict = attention.run(2000, SETTINGS, SHAPE, repeats=2, steps=3, on_round=lambda: rounds.append(1))
    assert len(rounds) == 4
    for config, result in zip(SETTINGS, (loose, strict), strict=True):
        assert (result.context, result.K, result.L) == (2000, config.K, config.L)
        assert result.ratio_exact == result.exact_ms / result.step_ms
        assert result.ratio_sdpa == result.sdpa_ms / result.step_ms
        assert 0 < result.step_min_ms <= result.step_ms
        assert 0 < result.stream_min_ms <= result.stream_ms
        assert result.exact_error < 1e-5
        assert result.sdpa_error < 1e-5
        assert 0 < result.error < 0.5
        assert result.row_bytes >= 2 * SHAPE.batch * 2 * 2000 * 64 * 4  # head dim 48 is kept as 64
    assert 0 < strict.sampled_share < loose.sampled_share < 1
    assert strict.sampled_rows < loose.sampled_rows < 2000


def test_steps_are_forgotten_and_do_not_lengthen_the_context(monkeypatch):
    lengths = set()
    step = attention.decode_step

    def spy(query, keys, values, stores, **options):
        lengths.add(stores[0].length)
        return step(query, keys, values, stores, **options)

    monkeypatch.setattr(attention, "decode_step", spy)
    attention.run(1000, SETTINGS[:1], SHAPE, repeats=4, steps=3)
    assert lengths == {1000, 1001, 1002}


@pytest.mark.parametrize("broken", ["exact", "sdpa", "step"])
def test_refuses_to_time_what_is_wrong(broken, monkeypatch):
    name = "scaled_dot_product_attention" if broken == "sdpa" else "decode_step"
    right = getattr(attention, name)

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        if broken == "sdpa":
            return 2 * result
        settled = arguments[3][0].settled
        if settled != (broken == "step"):
            return result
        return dataclasses.replace(result, output=2 * result.output)

    monkeypatch.setattr(attention, name, wrong)
    with pytest.raises(attention.WrongResultError, match=f"^{broken} has a relative error"):
        attention.run(1000, SETTINGS[:1], SHAPE, repeats=1, steps=2)


def test_refuses_to_time_when_the_self_check_fails(monkeypatch):
    check = attention.self_check(["portable"])[0]
    monkeypatch.setattr(attention, "self_check", lambda *_, **__: [dataclasses.replace(check, error=float("nan"))])
    with pytest.raises(attention.WrongResultError, match="self-check failed: portable, float32"):
        attention.verify_kernels(SHAPE)


def test_too_short_to_sample():
    with pytest.raises(ValueError, match="context=68 has nothing to sample; it must exceed 68"):
        attention.run(68, SETTINGS, SHAPE)


def test_too_long_for_the_machine():
    with pytest.raises(MemoryError, match=r"needs about [\d.]+ GiB of memory"):
        attention.run(10**12, SETTINGS, SHAPE)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("heads", 5, "heads=5 is not a multiple of kv_heads=2"),
        ("batch", 0, "batch=0 must be at least 1"),
        ("head_dim", 4096, "head_dim=4096 is out of range"),
        ("dtype", torch.float64, "dtype=torch.float64 is not supported"),
    ],
)
def test_impossible_shapes(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHAPE, **{field: value})


def test_description_names_machine_software_and_settings():
    described = attention.describe(SHAPE, SETTINGS[0], repeats=2, steps=3)
    assert described["dtype"] == "float32"
    assert described["threads"] == attention.native.threads()
    assert {"machine", "isa", "pool", "commit", "date", "versions"} <= described.keys()
    assert described["versions"]["torch"] == torch.__version__
    assert "K" not in described["config"]
