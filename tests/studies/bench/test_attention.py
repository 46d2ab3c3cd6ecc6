import dataclasses

import pytest
import torch

from magicpig.config import Config
from magicpig.kernels import library
from magicpig.studies.bench import attention, layer
from magicpig.studies.bench.layer import Shape

SHAPE = Shape(heads=6, kv_heads=2, head_dim=48, batch=2, dtype=torch.float32)
LSH = [Config(K=6, L=60, exact_below=0), Config(K=8, L=60, exact_below=0)]
SKETCH = [Config(sampler="sketch", budget=budget, bits=bits, exact_below=0) for budget, bits in ((64, 2), (256, 3))]


@pytest.fixture(autouse=True)
def small_evictor(monkeypatch):
    monkeypatch.setattr(layer, "EVICTION_BYTES", 1 << 16)


def test_one_result_per_setting():
    rounds = []
    loose, strict, small, large = attention.run(
        2000, LSH + SKETCH, SHAPE, repeats=2, steps=3, on_round=lambda: rounds.append(1)
    )
    assert len(rounds) == 8
    for result in (loose, strict, small, large):
        assert result.context == 2000
        assert result.ratio_exact == result.exact_ms / result.step_ms
        assert result.ratio_sdpa == result.sdpa_ms / result.step_ms
        assert 0 < result.step_min_ms <= result.step_ms
        assert 0 < result.stream_min_ms <= result.stream_ms
        assert result.exact_error < 1e-5
        assert result.sdpa_error < 1e-5
        assert 0 < result.error < 0.5
        assert result.error < result.error_p95
        assert result.row_bytes >= 2 * SHAPE.batch * 2 * 2000 * 64 * 4  # head dim 48 is kept as 64
        assert result.index_bytes_per_key == result.index_bytes / (2 * 2 * (7 * 256 - 4))
    assert 0 < strict.sampled_share < loose.sampled_share < 1
    assert strict.sampled_rows < loose.sampled_rows < 2000
    assert small.sampled_rows == pytest.approx(64, abs=1)
    assert large.sampled_rows == pytest.approx(256, abs=1)
    assert large.error < small.error


def test_results_name_the_settings_of_their_sampler():
    named = ("sampler", "K", "L", "budget", "bits")
    results = attention.run(500, [LSH[0], SKETCH[1]], SHAPE, repeats=1, steps=1)
    assert [tuple(getattr(result, name) for name in named) for result in results] == [
        ("lsh", 6, 60, None, None),
        ("sketch", None, None, 256, 3),
    ]


def test_a_sketch_of_two_bits_takes_36_bytes_of_a_key():
    shape = Shape(heads=4, kv_heads=1, head_dim=128)
    # Two blocks of 4096 keys, but for the last stride and the recent ones.
    (result,) = attention.run(8192 + 64, SKETCH[:1], shape, repeats=1, steps=1)
    assert 34 <= result.index_bytes_per_key < 36


def test_rows_in_whole_numbers_take_less():
    small = Config(sampler="sketch", budget=64, exact_below=0, kv_dtype="int8")
    whole, eighth = attention.run(2000, [SKETCH[0], small], SHAPE, repeats=1, steps=2)
    assert (whole.kv_dtype, eighth.kv_dtype) == ("model", "int8")
    assert eighth.row_bytes < 0.5 * whole.row_bytes
    assert eighth.exact_error < 1e-5  # the exact kernel reads the model's rows


@pytest.mark.parametrize("config", [LSH[0], SKETCH[0]], ids=["lsh", "sketch"])
def test_steps_are_forgotten_and_do_not_lengthen_the_context(config, monkeypatch):
    lengths = set()
    step = layer.decode_step

    def spy(query, keys, values, stores, **options):
        lengths.add(stores[0].length)
        return step(query, keys, values, stores, **options)

    monkeypatch.setattr(layer, "decode_step", spy)
    attention.run(1000, [config], SHAPE, repeats=4, steps=3)
    assert lengths == {1000, 1001, 1002}


@pytest.mark.parametrize("broken", ["exact", "sdpa", "step"])
def test_refuses_to_time_what_is_wrong(broken, monkeypatch):
    module, name = (attention, "scaled_dot_product_attention") if broken == "sdpa" else (layer, "decode_step")
    right = getattr(module, name)

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        if broken == "sdpa":
            return 2 * result
        settled = arguments[3][0].settled
        if settled != (broken == "step"):
            return result
        return dataclasses.replace(result, output=2 * result.output)

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(layer.WrongResultError, match=f"^{broken} has a relative error"):
        attention.run(1000, LSH[:1], SHAPE, repeats=1, steps=2)


def test_description_names_machine_software_and_settings():
    described = attention.describe(SHAPE, LSH[0], repeats=2, steps=3)
    assert described["dtype"] == "float32"
    assert described["threads"] == library.threads()
    assert {"machine", "isa", "pool", "commit", "date", "versions"} <= described.keys()
    assert described["versions"]["torch"] == torch.__version__
    assert "K" not in described["config"]
