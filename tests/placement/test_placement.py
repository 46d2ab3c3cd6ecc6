"""Every placement takes the same step: the same samples, bit for bit, and the same outputs up to rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from magicpig import Config
from magicpig.attention.step import LayerDecoder, Phase, Segment, attend_layer, attend_stores, decode_step
from magicpig.errors import NotFiniteError
from magicpig.kernels.base import load_kernels
from magicpig.placement import CPU, GpuIndex, Host, Placement
from magicpig.store import KVStore

pytestmark = pytest.mark.usefixtures("one_thread")

G, R, D = 2, 2, 64
SCALE = D**-0.5
SMALL = {"exact_below": 0, "recent": 16, "block": 32, "sinks": 3}
CONFIGS = {
    "lsh": Config(K=6, L=40, **SMALL),
    "lsh of int8": Config(K=5, L=30, kv_dtype="int8", centre=False, **SMALL),
    "sketch": Config(budget=60, bits=2, **SMALL),
    "sketch of int8": Config(budget=60, bits=3, kv_dtype="int8", **SMALL),
    "sketch by epsilon": Config(budget=20, bits=2, epsilon=0.2, **SMALL),
    "all by epsilon": Config(budget=20, bits=1, epsilon=0.001, **SMALL),
    "full": Config(sampler="full", **SMALL),
    "window": Config(sampler="window", **SMALL),
    "oracle": Config(sampler="oracle", budget=30, **SMALL),
}
PLACEMENTS: dict[str, Placement] = {
    f"{name} on {device}": kind(load_kernels(device))
    for name, kind in (("host", Host), ("gpu_index", GpuIndex))
    for device in ("cpu", "reference")
}


@pytest.fixture(params=PLACEMENTS.values(), ids=PLACEMENTS)
def placement(request: pytest.FixtureRequest) -> Placement:
    chosen: Placement = request.param
    return chosen


def filled(config: Config, tokens: int, seed: int = 0) -> KVStore:
    store = KVStore(G, D, torch.bfloat16, config, layer=3, first_head=2)
    keys, values = torch.randn(2, G, tokens, D, generator=torch.Generator().manual_seed(seed))
    store.append(keys + 0.5, values)
    store.settle()
    return store


def new_tokens(B: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, heads, D, generator=generator).bfloat16() for heads in (G * R, G, G)]


def test_the_same_steps_of_all_kinds_of_stores(placement: Placement) -> None:
    stores = [filled(config, 300 + 41 * i, seed=i) for i, config in enumerate(CONFIGS.values())]
    stores += [filled(CONFIGS["sketch"], 5), filled(CONFIGS["lsh"], 9001)]
    usual = [store.fork() for store in stores]
    sinks, apart = torch.linspace(-1, 1, G * R), 0
    for t in range(20):  # over the end of a stride
        new = new_tokens(len(stores), seed=t)
        rule = {"scale": SCALE, "softcap": 4.0 if t % 3 == 0 else None, "sink_logits": sinks if t % 2 else None}
        own = decode_step(*new, stores, placement=placement, **rule)
        right = decode_step(*new, usual, **rule)
        # A weight within rounding of where a step ends may make that another key's.
        same = torch.isclose(own.lse, right.lse, rtol=1e-5, atol=5e-5).all(1)
        apart += int((~same).sum())
        torch.testing.assert_close(own.output.float()[same], right.output.float()[same], rtol=2**-7, atol=1e-4)
    assert apart <= 2
    assert [store.length for store in stores] == [store.length for store in usual]
    query = new_tokens(len(stores), seed=99)[0]
    state, info = attend_stores(query.float(), stores, scale=SCALE, placement=placement)
    expected, right_info = attend_stores(query.float(), usual, scale=SCALE)
    torch.testing.assert_close(state.output, expected.output, rtol=1e-4, atol=5e-5)
    assert torch.equal(info.rows, right_info.rows)
    for b, h in ((b, h) for b in range(len(stores)) for h in range(G * R)):
        assert torch.equal(info.ids[b][h], right_info.ids[b][h]), (b, h)
        torch.testing.assert_close(info.log_u[b][h], right_info.log_u[b][h], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(info.predicted_error, right_info.predicted_error, rtol=5e-3, atol=1e-5, equal_nan=True)
    for a, b in zip(stores, usual, strict=True):
        one, two = a.stats, b.stats
        assert (one.steps, one.sampled_rows, one.body_rows) == (two.steps, two.sampled_rows, two.body_rows)
        assert (one.predicted.count, one.predicted.unknown) == (two.predicted.count, two.predicted.unknown)
        for (keys, values), (others, more) in zip(a.blocks(), b.blocks(), strict=True):
            assert torch.equal(keys, others)
            assert torch.equal(values, more)


@pytest.mark.parametrize("kind", [Host, GpuIndex])
@pytest.mark.parametrize("name", ["sketch", "lsh", "sketch by epsilon"])
def test_the_same_kernels_elsewhere_draw_the_very_same_on_every_level(
    name: str, kind: type[Host] | type[GpuIndex], isa: str
) -> None:
    store = filled(CONFIGS[name], 9001)
    query = new_tokens(1)[0]
    _, own = attend_stores(query, [store], scale=SCALE, placement=kind(load_kernels()))
    _, right = attend_stores(query, [store], scale=SCALE)
    for h in range(G * R):
        assert len(right.ids[0][h]) > 0
        assert torch.equal(own.ids[0][h], right.ids[0][h])
        torch.testing.assert_close(own.log_u[0][h], right.log_u[0][h], rtol=1e-5, atol=1e-5)


def test_a_sequence_with_bad_numbers_fails_alone(placement: Placement) -> None:
    names = ["lsh", "sketch", "full", "oracle", "sketch of int8"]
    for bad in range(3):
        stores = [filled(CONFIGS[name], 200, seed=i) for i, name in enumerate(names)]
        usual = [store.fork() for store in stores]
        new = new_tokens(len(stores))
        new[bad][1, 0, 3] = math.nan
        segments = [Segment(store, i, 1, Phase.DECODE) for i, store in enumerate(stores)]
        result = attend_layer(segments, *new, scale=SCALE, placement=placement)
        right = attend_layer([Segment(s, i, 1, Phase.DECODE) for i, s in enumerate(usual)], *new, scale=SCALE)
        assert [type(e) for e in result.errors] == [type(e) for e in right.errors]
        assert isinstance(result.errors[1], NotFiniteError)
        assert result.output[1].isnan().all()
        assert result.lse[1].isnan().all() or (result.lse[1] == right.lse[1]).all()
        assert [store.length for store in stores] == [201, 200, 201, 201, 201]
        served = [0, 2, 3, 4]
        torch.testing.assert_close(result.output[served].float(), right.output[served].float(), rtol=2**-7, atol=1e-4)


def test_only_the_fused_step_is_repeated() -> None:
    stores = [filled(CONFIGS["sketch"], 200)]
    new = [x[:, :, None] for x in new_tokens(1)]
    assert LayerDecoder(stores, G * R, scale=SCALE, softcap=None).takes(*new)
    for placement in (*PLACEMENTS.values(),):
        assert placement.repeated(stores, G * R, SCALE, 0.0) is None
        assert not LayerDecoder(stores, G * R, scale=SCALE, softcap=None, placement=placement).takes(*new)
    assert CPU.repeated([filled(CONFIGS["oracle"], 200)], G * R, SCALE, 0.0) is None
