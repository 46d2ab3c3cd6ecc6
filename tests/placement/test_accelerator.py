"""Placements on an accelerator draw what the processor draws: on a simulated one, by verbs that are interpreted."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from magicpig import Config
from magicpig.attention.step import attend_stores, decode_step
from magicpig.errors import ArgumentError, NotFiniteError
from magicpig.placement.accelerator import WAYS, Accelerated, Way
from magicpig.placement.device import Cuda, Device, DeviceError
from magicpig.placement.simulated import Simulated
from magicpig.store import KVStore

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("one_thread")

G, R, D = 2, 2, 16
SCALE = D**-0.5
SMALL = {"exact_below": 0, "recent": 16, "block": 32, "sinks": 3}
CONFIGS = {
    "sketch": Config(budget=30, candidates=70, bits=2, **SMALL),
    "one phase": Config(budget=30, candidates=30, bits=2, **SMALL),
    "int8": Config(budget=30, bits=3, kv_dtype="int8", **SMALL),
    "epsilon": Config(budget=10, bits=2, epsilon=0.4, **SMALL),
    "everything": Config(budget=10, bits=1, epsilon=1e-4, **SMALL),
    "full": Config(sampler="full", **SMALL),
    "lsh": Config(K=5, L=20, **SMALL),
}


def a_device(**settings: object) -> Device:
    return Cuda() if torch.cuda.is_available() and not settings else Simulated(**settings)  # type: ignore[arg-type]


def filled(config: Config, tokens: int, seed: int = 0) -> KVStore:
    store = KVStore(G, D, torch.bfloat16, config, layer=3, first_head=2)
    keys, values = torch.randn(2, G, tokens, D, generator=torch.Generator().manual_seed(seed))
    store.append(keys + 0.5, values)
    store.settle()
    return store


def new_tokens(B: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, heads, D, generator=generator).bfloat16() for heads in (G * R, G, G)]


def assert_same_attention(stores: list[KVStore], usual: list[KVStore], place: Accelerated) -> None:
    query = new_tokens(len(stores), seed=99)[0].float()
    state, info = attend_stores(query, stores, scale=SCALE, placement=place)
    expected, right = attend_stores(query, usual, scale=SCALE)
    torch.testing.assert_close(state.output, expected.output, rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(state.lse, expected.lse, rtol=1e-5, atol=5e-5)
    for b, h in ((b, h) for b in range(len(stores)) for h in range(G * R)):
        assert torch.equal(info.ids[b][h], right.ids[b][h]), (b, h)
        torch.testing.assert_close(info.log_u[b][h], right.log_u[b][h], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(info.predicted_error, right.predicted_error, rtol=5e-3, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_samples_as_on_the_processor_step_after_step(way: Way) -> None:
    place = Accelerated(a_device(), way)
    stores = [filled(config, 120 + 7 * i, seed=i) for i, config in enumerate(CONFIGS.values())]
    stores.append(filled(CONFIGS["sketch"], 5))
    usual = [store.fork() for store in stores]
    assert_same_attention(stores, usual, place)
    sinks = torch.linspace(-1, 1, G * R)
    for t in range(2):  # over the end of a stride
        new = new_tokens(len(stores), seed=t)
        rule = {"scale": SCALE, "softcap": 4.0 if t == 1 else None, "sink_logits": sinks if t % 2 else None}
        own = decode_step(*new, stores, placement=place, **rule)
        right = decode_step(*new, usual, **rule)
        torch.testing.assert_close(own.output.float(), right.output.float(), rtol=2**-7, atol=1e-4)
        torch.testing.assert_close(own.lse, right.lse, rtol=1e-5, atol=5e-5)
    place.flush()
    for a, b in zip(stores, usual, strict=True):
        one, two = a.stats, b.stats
        assert (one.steps, one.sampled_rows, one.body_rows) == (two.steps, two.sampled_rows, two.body_rows)
        assert (one.predicted.count, one.predicted.unknown) == (two.predicted.count, two.predicted.unknown)


@pytest.mark.parametrize("way", WAYS)
def test_what_the_device_holds_follows_crops_forks_and_growth(way: Way) -> None:
    place = Accelerated(a_device(), way)
    store = filled(CONFIGS["sketch"], 200)
    assert_same_attention([store], [store.fork()], place)
    store.crop(120)
    store.append(*torch.randn(2, G, 70, D, generator=torch.Generator().manual_seed(3)))  # where others were
    store.settle()
    assert_same_attention([store], [store.fork()], place)
    store.crop(120)
    store.settle()
    fork = store.fork()
    for seed, each in enumerate((store, fork)):  # both go on from the same blocks, with other tokens
        more = torch.randn(2, G, 90, D, generator=torch.Generator().manual_seed(7 + seed))
        each.append(*more)
        each.settle()
    both = [store, fork]
    assert_same_attention(both, [each.fork() for each in both], place)


@pytest.mark.parametrize("way", WAYS)
def test_a_sequence_with_bad_numbers_fails_alone(way: Way) -> None:
    stores = [filled(CONFIGS["sketch"], 120, seed=i) for i in range(2)]
    query, keys, values = new_tokens(2)
    keys[1, 0, 3] = math.nan
    with pytest.raises(NotFiniteError, match="sequence 1 of 2"):
        decode_step(query, keys, values, stores, scale=SCALE, placement=Accelerated(a_device(), way))


@pytest.mark.parametrize(("way", "what"), [("host", "select"), ("gpu_index", "merge"), ("gpu", "window")])
def test_an_error_of_the_device_is_one_of_the_step(way: Way, what: str) -> None:
    place = Accelerated(Simulated(fail=[what]), way)

    def step() -> None:
        decode_step(*new_tokens(1), [filled(CONFIGS["sketch"], 120)], scale=SCALE, placement=place)
        place.flush()  # at the latest

    with pytest.raises(DeviceError, match=f"{what} failed on the device"):
        step()


def test_sequences_of_a_step_are_in_flight_together() -> None:
    costs = {"select": 1.0, "gather": 10.0, "merge": 1.0}
    stores = [filled(CONFIGS["sketch"], 120, seed=i) for i in range(3)]
    device = Simulated(costs, down=math.inf, up=math.inf)
    attend_stores(new_tokens(3)[0].float(), stores, scale=SCALE, placement=Accelerated(device, "gpu_index"))
    # The host starts when the first sequence has been selected, and then never waits.
    begin = min(span.begin for span in device.spans if span.what == "gather")
    end = max(span.end for span in device.spans if span.what == "gather")
    assert (begin, end) == (1.0, 31.0)
    assert device.idle("host", begin, end) == 0.0
    assert device.elapsed == 32.0


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "magicpig.kernels.triton", None)
    import magicpig.kernels

    monkeypatch.delattr(magicpig.kernels, "triton", raising=False)
    with pytest.raises(ArgumentError, match=r"placement=gpu needs Triton.*magicpig\[gpu\]"):
        Accelerated(Simulated(), "gpu")
