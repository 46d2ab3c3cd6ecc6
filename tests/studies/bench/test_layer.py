import dataclasses

import pytest
import torch

from magicpig.config import EXACT, Config
from magicpig.studies.bench import layer
from magicpig.studies.bench.layer import Layer, Shape, check_context

SHAPE = Shape(heads=6, kv_heads=2, head_dim=48, batch=2, dtype=torch.float32)
LSH = Config(sampler="lsh", exact_below=0)


@pytest.fixture(autouse=True)
def small_evictor(monkeypatch):
    monkeypatch.setattr(layer, "EVICTION_BYTES", 1 << 16)


def test_exact_steps_have_the_rounding_of_their_dtype():
    made = Layer(SHAPE.contexts(300, steps=3))
    stores = made.stores(EXACT)
    errors = made.errors(lambda step: made.step(stores, step))
    assert errors.shape == (3, 2, 6)
    assert 0 < float(errors.max()) < 1e-5
    assert [store.length for store in stores] == [303, 303]
    made.forget(stores)
    assert [store.length for store in stores] == [300, 300]


def test_soft_caps_and_sink_logits_are_those_of_the_context():
    (data,) = dataclasses.replace(SHAPE, batch=1).contexts(300, steps=2)
    data = dataclasses.replace(data, softcap=5.0, sink_logits=torch.linspace(-1, 6, 6))
    made = Layer([data])
    stores = made.stores(EXACT)
    assert float(made.errors(lambda step: made.step(stores, step)).max()) < 1e-5


def test_timed_calls_take_turns():
    made = Layer(SHAPE.contexts(100, steps=2))
    order = []
    calls = {name: lambda step, name=name: order.append((name, step)) for name in ("a", "b")}
    rounds = list(made.timed(calls, 2))
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1)] * 2
    assert [{name: len(times) for name, times in each.items()} for each in rounds] == [{"a": 2, "b": 2}] * 2
    assert all(timing.ms >= 0 for each in rounds for times in each.values() for timing in times)


def test_refuses_to_time_when_the_self_check_fails(monkeypatch):
    check = layer.self_check(["portable"])[0]
    monkeypatch.setattr(layer, "self_check", lambda *_, **__: [dataclasses.replace(check, error=float("nan"))])
    with pytest.raises(layer.WrongResultError, match="self-check failed: portable, float32"):
        layer.verify_kernels(SHAPE)


def test_too_short_to_sample():
    with pytest.raises(ValueError, match="context=68 has nothing to sample; it must exceed 68"):
        check_context(68, [LSH], SHAPE)


def test_too_long_for_the_machine():
    with pytest.raises(MemoryError, match=r"needs about [\d.]+ GiB of memory.* fewer kv heads than 2"):
        check_context(10**12, [LSH], SHAPE)


def test_a_million_keys_of_one_head_fit(monkeypatch):
    monkeypatch.setattr(layer, "free_memory", lambda: 8 << 30)
    sketch = Config(sampler="sketch", exact_below=0)
    check_context(1 << 20, [sketch], Shape(heads=4, kv_heads=1))
    with pytest.raises(MemoryError, match="context=1048576 needs about"):
        check_context(1 << 20, [sketch], Shape())


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
