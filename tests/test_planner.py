"""The plan is an upper bound of what stores really take, and a close one."""

import pytest
import torch

from magicpig.config import EXACT, Config
from magicpig.errors import InsufficientMemoryError
from magicpig.kernels import base
from magicpig.samplers import CHOOSING
from magicpig.store import KVStore
from magicpig.store.planner import LayerShape, check, plan

CONFIG = Config(K=6, L=10, exact_below=100, sinks=4, recent=16, block=64)


@pytest.mark.parametrize("tokens", [1, 99, 100, 255, 257, 4096, 4097, 9000, 70_000])
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "dense"])
def test_plan_bounds_what_a_store_takes(tokens: int, sampled: bool) -> None:
    store = KVStore(2, 40, torch.float32, CONFIG, sampled=sampled)
    for first in range(0, tokens, 20_000):
        n = min(20_000, tokens - first)
        store.append(torch.randn(2, n, 40), torch.randn(2, n, 40))
        store.settle()
        store.index_due()
    planned = plan([LayerShape(2, 40, sampled)], CONFIG, sequences=1, tokens=tokens, dtype=torch.float32)
    held = store.nbytes()
    assert held.rows <= planned.kept.rows <= max(2 * held.rows, held.rows + base.BLOCK_ROWS * 2 * 128 * 4)
    offsets = 2 * CONFIG.L * 4 * (2**CONFIG.K + 1)
    assert held.index <= planned.kept.index <= held.index + 4 * offsets


@pytest.mark.parametrize("sampler", ["topk", "quest"])
def test_samplers_without_tables_are_planned_without_them(sampler: str) -> None:
    config = Config(sampler=sampler, exact_below=100, block=64)
    store = KVStore(2, 40, torch.bfloat16, config, sampled=True)
    store.append(torch.randn(2, 5000, 40), torch.randn(2, 5000, 40))
    store.settle()
    planned = plan([LayerShape(2, 40, True)], config, sequences=1, tokens=5000, dtype=torch.bfloat16)
    assert planned.kept.index == store.nbytes().index == (2 * 308 * 2 * 40 * 2 if sampler == "quest" else 0)


def test_layers_and_sequences_add_up() -> None:
    layers = [LayerShape(2, 64, True), LayerShape(2, 64, False), LayerShape(2, 64, False, window=128)]
    one = plan(layers, CONFIG, sequences=1, tokens=10_000, dtype=torch.bfloat16)
    three = plan(layers, CONFIG, sequences=3, tokens=10_000, dtype=torch.bfloat16)
    assert three.kept.total == 3 * one.kept.total
    assert three.transient == one.transient
    full = 3 * base.BLOCK_ROWS * 2 * 2 * 64 * 2
    tails = 2 * CONFIG.block * 2 * 2 * 64 * 2
    assert one.kept.rows == 2 * full + tails + 2 * 128 * 2 * 64 * 2


def test_too_much_is_refused_in_one_line_with_the_numbers() -> None:
    needed = plan([LayerShape(8, 128, True)], Config(sampler="lsh"), sequences=2, tokens=200_000, dtype=torch.bfloat16)
    check(needed, free=needed.total)
    with pytest.raises(
        InsufficientMemoryError, match=r"^2 sequences of 200000 tokens need 2\.80 GiB .* are free;"
    ) as e:
        check(needed, free=needed.total - 1)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("sampler", CHOOSING)
def test_room_for_the_logits_of_every_head_is_planned(sampler: str) -> None:
    config, tokens, heads = Config(sampler=sampler, exact_below=0), 100_000, 24
    layer = LayerShape(2, 8, sampled=True, query_heads=heads)
    transient = plan([layer] * 3, config, sequences=1, tokens=tokens, dtype=torch.bfloat16).transient
    body = tokens - config.sinks - config.recent
    wide = 8 if sampler.startswith("oracle") else 4  # the result alone, before it is rounded
    assert transient >= heads * body * wide
    assert plan([layer], EXACT, sequences=1, tokens=tokens, dtype=torch.bfloat16).transient == 0


@pytest.mark.parametrize(("sequences", "tokens"), [(0, 1), (1, 0)])
def test_sizes_below_one_are_refused(sequences: int, tokens: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        plan([], CONFIG, sequences=sequences, tokens=tokens, dtype=torch.float32)


def test_each_layer_is_planned_by_its_own_settings() -> None:
    shape = LayerShape(2, 40, sampled=True)

    def index(config: Config, layers: int) -> int:
        return plan([shape] * layers, config, sequences=1, tokens=5000, dtype=torch.float32).kept.index

    mixed = Config(K=6, L=10, layers={1: {"sampler": "sketch", "bits": 1}})
    assert index(mixed, 2) == index(Config(K=6, L=10), 1) + index(Config(sampler="sketch", bits=1), 1)
