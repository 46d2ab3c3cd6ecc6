"""Both implementations of the verbs: over one store they take the same step, whole or in halves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from magicpig import Config
from magicpig.attention.step import LayerDecoder, attend_stores, decode_step
from magicpig.errors import ArgumentError, EnvironmentVariableError
from magicpig.kernels.attend.reference import merge, with_sink_logits
from magicpig.kernels.base import Kernels, SampledHalf, Segment, interleave_heads, load_kernels, sketch_shapes
from magicpig.samplers import sampler_of
from magicpig.store import KVStore
from magicpig.types import AttentionState

pytestmark = pytest.mark.usefixtures("one_thread")

CPU, REFERENCE = load_kernels("cpu"), load_kernels("reference")
G, R, D = 2, 3, 40
SCALE = D**-0.5
SMALL = {"exact_below": 0, "recent": 16, "block": 32, "sinks": 3}
CONFIGS = {
    "lsh": Config(K=5, L=30, **SMALL),
    "lsh, as keys are": Config(K=4, L=30, min_hits=1, centre=False, **SMALL),
    "lsh of int8": Config(K=5, L=30, kv_dtype="int8", **SMALL),
    "sketch": Config(budget=60, bits=2, **SMALL),
    "sketch in one phase": Config(budget=60, candidates=60, bits=2, **SMALL),
    "sketch of all": Config(budget=60, candidates=1000, bits=1, **SMALL),
    "sketch of three bits and a share": Config(budget=0.2, bits=3, **SMALL),
    "sketch of int8": Config(budget=60, bits=4, kv_dtype="int8", **SMALL),
    "sketch by epsilon": Config(budget=20, bits=2, epsilon=0.2, **SMALL),
    "sketch by an epsilon that takes all": Config(budget=20, bits=1, epsilon=0.001, **SMALL),
    "full": Config(sampler="full", **SMALL),
    "window": Config(sampler="window", **SMALL),
}


def filled(config: Config, tokens: int = 437, *, kernels: Kernels = CPU, seed: int = 0, **more: object) -> KVStore:
    store = KVStore(G, D, torch.bfloat16, config, kernels=kernels, layer=2, first_head=1, **more)
    keys, values = torch.randn(2, G, tokens, D, generator=torch.Generator().manual_seed(seed))
    store.append(keys + 0.5, values)
    store.settle()
    return store


def new_token(B: int = 1, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, heads, D, generator=generator).to(dtype) for heads in (G * R, G, G)]


def assert_close(a: AttentionState, b: AttentionState, tolerance: float = 1e-5) -> None:
    """Sums of float32 terms of logits of order one, as in test_decode.py."""
    assert float((a.output.double() - b.output.double()).norm(dim=-1).max()) <= tolerance * math.sqrt(D)
    torch.testing.assert_close(a.lse.double(), b.lse.double(), rtol=tolerance, atol=3 * tolerance)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_both_take_the_same_step_over_one_store(config: Config, softcap: float | None) -> None:
    own = filled(config)
    other = own.fork(kernels=REFERENCE)
    sinks, apart = torch.linspace(-1, 2, G * R), 0
    for t in range(20):  # over the end of a stride
        query, keys, values = (x.float() for x in new_token(seed=t))
        rule = {"scale": SCALE, "softcap": softcap, "sink_logits": sinks if t % 2 else None}
        for store in (own, other):
            decode_step(query, keys, values, [store], **rule)
        assert own.length == other.length
        (state, a), (right, b) = (attend_stores(query, [store], **rule) for store in (own, other))
        if config.sketches and any(not torch.equal(*ids) for ids in zip(a.ids[0], b.ids[0], strict=True)):
            apart += 1  # a coordinate of the query, or a weight, within rounding of the next whole number
            continue
        # Of a row of whole numbers within rounding of the next ones, the two may keep either: in one of the values that
        # is a part in 127, times what the row has of a small sample, and another logit moves all probabilities.
        rounded = config.kv_dtype == "int8" and own.flushed >= 448
        assert_close(state, right, 1e-3 if rounded else 1e-5)
        for h in range(G * R):
            assert torch.equal(a.ids[0][h], b.ids[0][h])
            torch.testing.assert_close(a.log_u[0][h], b.log_u[0][h], rtol=1e-4, atol=2e-2 if rounded else 1e-5)
        assert torch.equal(a.rows, b.rows)
        torch.testing.assert_close(
            a.predicted_error, b.predicted_error, rtol=5e-2 if rounded else 1e-3, atol=1e-6, equal_nan=True
        )
    assert apart <= 2
    one, two = own.stats, other.stats
    assert (one.steps, one.body_rows) == (two.steps, two.body_rows)
    assert abs(one.sampled_rows - two.sampled_rows) <= 3 * R * apart
    assert one.predicted.count == two.predicted.count
    assert one.predicted.unknown == two.predicted.unknown
    # Where they drew apart, each of a group's heads predicts something else, when decoding and after it.
    assert abs(one.predicted.mean - two.predicted.mean) <= 1e-3 + apart * 0.2 / 40 or one.predicted.count == 0


@pytest.mark.parametrize("name", ["lsh", "lsh of int8", "sketch", "sketch of int8"])
def test_a_store_of_the_reference_alone_decodes_as_one_of_the_compiled_code(name: str) -> None:
    # Codes of keys within rounding of a border may differ, so here only what is attended to is compared.
    a, b = filled(CONFIGS[name]), filled(CONFIGS[name], kernels=REFERENCE)
    assert b.sampler is not a.sampler
    assert (a.length, a.indexed_to) == (b.length, b.indexed_to)
    for t in range(40):
        query, keys, values = new_token(seed=t)
        for store in (a, b):
            assert decode_step(query, keys, values, [store], scale=SCALE).output.isfinite().all()
    assert (a.length, a.indexed_to, a.flushed) == (b.length, b.indexed_to, b.flushed)
    _, one = attend_stores(query, [a], scale=SCALE)
    _, two = attend_stores(query, [b], scale=SCALE)
    for ids, others in zip(one.ids[0], two.ids[0], strict=True):
        assert len(set(ids.tolist()) & set(others.tolist())) >= 0.9 * len(ids)
    for (keys, values), (others, more) in zip(a.blocks(), b.blocks(), strict=True):
        torch.testing.assert_close(keys, others, rtol=0.01, atol=0.02)
        torch.testing.assert_close(values, more, rtol=0.01, atol=0.02)


def test_a_layer_decoder_of_the_reference_takes_its_steps() -> None:
    stores = [filled(CONFIGS["sketch"], kernels=REFERENCE, seed=i) for i in range(2)]
    alone = [store.fork() for store in stores]
    decoder = LayerDecoder(stores, G * R, scale=SCALE, softcap=None)
    query, keys, values = (x[:, :, None] for x in new_token(2))
    assert decoder.takes(query, keys, values)
    output, errors = decoder.step(query, keys, values)
    assert errors is None
    right = decode_step(query[:, :, 0], keys[:, :, 0], values[:, :, 0], alone, scale=SCALE)
    assert torch.equal(output[:, 0], right.output)


def test_the_reference_leaves_a_sequence_with_bad_numbers_as_it_was() -> None:
    stores = [filled(CONFIGS["lsh"], kernels=REFERENCE, seed=i) for i in range(3)]
    new = new_token(3)
    new[0][0, 1, 2], new[2][2, 0, 0] = math.nan, math.inf
    errors: list[Exception | None] = []
    state = decode_step(*new, stores, scale=SCALE, errors=errors)
    assert [None if e is None else str(e).split()[0] for e in errors] == ["query", None, "values"]
    assert [store.length for store in stores] == [437, 438, 437]
    assert state.output[[0, 2]].isnan().all()
    assert state.output[1].isfinite().all()


def test_stores_of_two_kernels_do_not_take_one_step() -> None:
    stores = [filled(CONFIGS["lsh"]), filled(CONFIGS["lsh"], kernels=REFERENCE)]
    with pytest.raises(ArgumentError, match=r"^stores differ in kernels; one step is one computation$"):
        decode_step(*new_token(2), stores, scale=SCALE)


def test_kernels_are_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_kernels().NAME == "cpu"
    monkeypatch.setenv("MAGICPIG_KERNELS", "reference")
    assert load_kernels() is REFERENCE
    assert KVStore(G, D, torch.float32, Config()).kernels is REFERENCE
    monkeypatch.setenv("MAGICPIG_KERNELS", "cuda")
    with pytest.raises(EnvironmentVariableError, match=r"^MAGICPIG_KERNELS=cuda is not one of cpu, reference$"):
        load_kernels()
    with pytest.raises(ArgumentError, match=r"^kernels='gpu' is not one of 'cpu', 'reference'$"):
        load_kernels("gpu")


# --- verb by verb -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 7, 16])
def test_tables_are_the_same(K: int) -> None:
    codes = torch.randint(0, 2**K, (2, 5, 300)).to(torch.uint16)
    pieces = [(codes[:, :, :170].contiguous(), 0), (codes[:, :, 170:].contiguous(), 170)]
    parts = [[kernels.build(piece, K, first) for piece, first in pieces] for kernels in (CPU, REFERENCE)]
    for a, b in zip(*parts, strict=True):
        assert_same_tables(a, b)
    joined = [kernels.extend(*each) for kernels, each in zip((CPU, REFERENCE), parts, strict=True)]
    assert_same_tables(*joined)
    for count in (0, 1, 169, 300):
        assert_same_tables(CPU.shorten(joined[0], count), REFERENCE.shorten(joined[1], count))
    for head in range(2):
        query = codes[head, :, 17].contiguous()
        assert torch.equal(CPU.lookup(query, joined[0], head, 2), REFERENCE.lookup(query, joined[1], head, 2))


def assert_same_tables(a: Segment, b: Segment) -> None:
    assert torch.equal(a.offsets, b.offsets)
    assert torch.equal(a.ids, b.ids)
    assert a.first == b.first


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("head_dim", [1, 40, 96, 130])
def test_sketches_have_the_same_form(head_dim: int, bits: int) -> None:
    keys = torch.randn(2, 192, head_dim) + 1
    made = []
    for kernels in (CPU, REFERENCE):
        sampler = kernels.make_sketcher(head_dim, bits, 0)
        store = KVStore(2, head_dim, torch.float32, Config(budget=20, bits=bits, **SMALL), kernels=kernels)
        store.append(keys, keys)
        store.settle()
        made.append((sampler, store.index.segments()))
        shapes = sketch_shapes(2, 192, sampler, 32)
        assert shapes == sketch_shapes(2, 192, CPU.make_sketcher(head_dim, bits, 0), 32)
    (_, (a,)), (_, (b,)) = made
    blocks = store.indexed_to // 64
    assert float((a.words[:, :blocks] == b.words[:, :blocks]).double().mean()) > 0.99  # but within rounding of a border
    torch.testing.assert_close(a.scales[:, : 64 * blocks], b.scales[:, : 64 * blocks], rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(a.centres[:, :blocks], b.centres[:, :blocks], rtol=2**-7, atol=1e-6)
    # The same sketch weighs the same for both.
    query = 2 * torch.randn(3, head_dim)
    weights = [
        kernels.weigh(query, [a], 1, sampler, stride=32, scale=0.3, sinks=2).weights
        for kernels, (sampler, _) in zip((CPU, REFERENCE), made, strict=True)
    ]
    assert float(((weights[0] - weights[1]).abs() - 1).div(weights[1].clamp(min=1)).max()) <= 1e-4


def test_hashes_and_rotations_of_queries_are_the_same() -> None:
    query = torch.randn(7, D)
    codes = [kernels.hash_queries(query, kernels.make_sampler(D, 6, 50, 3)) for kernels in (CPU, REFERENCE)]
    assert codes[0].shape == (7, 50)
    assert torch.equal(*codes)
    rows = interleave_heads(query[None])
    assert torch.equal(CPU.hash_rows([rows], CPU.make_sampler(D, 6, 50, 3))[0].T, codes[0])
    rotated = [kernels.rotate(query, kernels.make_sketcher(D, 2, 0)) for kernels in (CPU, REFERENCE)]
    torch.testing.assert_close(*rotated, rtol=1e-5, atol=1e-6)


# --- a step in two halves ---------------------------------------------------------------------------------------------


def joined(
    stores: list[KVStore],
    new: list[Tensor],
    *,
    prepared: bool,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[AttentionState, Tensor, SampledHalf]:
    """The exact half by a store of which the body is cut out, and the sampled one; merged."""
    query, keys, values = new
    exact = []
    for b, store in enumerate(stores):
        ends = [(0, store.policy.sinks), (store.indexed_to, store.length)] if store.body else [(0, store.length)]
        window = KVStore(G, D, torch.float32, Config(sampler="full", **SMALL))
        for begin, end in ends:
            for k, v in store.blocks(begin, end, torch.float32):
                window.append(k, v)
        one = [x[b : b + 1].to(store.dtype).float() for x in (keys, values)]
        state = decode_step(query[b : b + 1].float(), *one, [window], scale=SCALE, softcap=softcap or None)
        exact.append(state)
    other = AttentionState(torch.cat([s.output for s in exact]), torch.cat([s.lse for s in exact]))
    given = [
        sampler_of(store.spec, D, store.kernels).prepare(q) if prepared and store.settled else None
        for store, q in zip(stores, query.float(), strict=True)
    ]
    half = stores[0].kernels.sampled_half(
        [store.view for store in stores],
        query,
        keys,
        values,
        scale=SCALE,
        softcap=softcap,
        sink_logits=sinks,
        prepared=given,
        exact=other if any(store.draw.epsilon for store in stores) else None,
        capture=True,
    )
    whole = merge([other, half.state])
    whole = whole if sinks is None else with_sink_logits(whole, sinks.expand_as(whole.lse))
    return whole, half.predicted_error(whole), half


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize("prepared", [False, True], ids=["made here", "made elsewhere"])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_halves_joined_are_the_whole_step(kernels: Kernels, prepared: bool, softcap: float) -> None:
    """All kinds of stores side by side; scratch is poisoned, as in all tests."""
    stores = [filled(config, 437 + i, kernels=kernels, seed=i) for i, config in enumerate(CONFIGS.values())]
    stores.append(filled(CONFIGS["lsh"], 20, kernels=kernels))  # too short for an index
    check_halves(stores, prepared=prepared, softcap=softcap)


@pytest.mark.parametrize("head_dim", [1, 33, 128])
def test_halves_on_every_level_and_of_odd_sizes(head_dim: int, isa: str) -> None:
    stores = []
    for i, config in enumerate(CONFIGS.values()):
        store = KVStore(1, head_dim, torch.float32, config)
        keys, values = torch.randn(2, 1, 300 + 37 * i, head_dim)
        store.append(keys, values)
        store.settle()
        stores.append(store)
    whole = [store.fork() for store in stores]
    new = [torch.randn(len(stores), heads, head_dim) for heads in (5, 1, 1)]
    rule = {"scale": head_dim**-0.5}
    result = CPU.decode_step([store.view for store in whole], *new, **rule, capture=True)
    given = [sampler_of(store.spec, head_dim).prepare(q) for store, q in zip(stores, new[0], strict=True)]
    for b, store in enumerate(stores):
        if store.draw.epsilon:
            continue
        for prepared in (None, given[b] if store.settled else None):
            fork = store.fork()
            fork.make_room()
            one = [x[b : b + 1] for x in new]
            half = CPU.sampled_half([fork.view], *one, **rule, prepared=[prepared], capture=True)
            assert fork.length == store.length + 1
            for (ids, log_u), (right, right_u) in zip(half.samples, result.samples[b * 5 : b * 5 + 5], strict=True):
                assert torch.equal(ids, right)
                assert torch.equal(log_u, right_u)
            assert not half.spread.isnan().any()


def check_halves(stores: list[KVStore], *, prepared: bool, softcap: float) -> None:
    B, sinks = len(stores), torch.linspace(-1, 2, G * R)
    whole = [store.fork() for store in stores]
    new = new_token(B)
    for store in (*stores, *whole):
        store.make_room()
    result = whole[0].kernels.decode_step(
        [store.view for store in whole], *new, scale=SCALE, softcap=softcap, sink_logits=sinks, capture=True
    )
    state, predicted, half = joined(stores, new, prepared=prepared, softcap=softcap, sinks=sinks)
    assert [store.length for store in stores] == [store.length for store in whole]
    for (ids, log_u), (right, right_u) in zip(half.samples, result.samples, strict=True):
        assert torch.equal(ids, right)
        assert torch.equal(log_u, right_u)
    # The output of the whole step has been rounded to bfloat16.
    torch.testing.assert_close(state.output.float(), result.output.float(), rtol=2**-8, atol=2e-5)
    torch.testing.assert_close(state.lse.float(), result.lse, rtol=1e-5, atol=2e-5)
    known = ~result.predicted_error.isnan()
    torch.testing.assert_close(predicted[known], result.predicted_error[known], rtol=2e-3, atol=1e-6)
    assert not predicted[~known].any()  # of nothing drawn; who merges knows whether that says something
    for a, b in zip(stores, whole, strict=True):
        assert a.stats.sampled_rows == b.stats.sampled_rows
        assert a.stats.predicted.count == 0


@pytest.mark.parametrize("kernels", [CPU, REFERENCE], ids=["cpu", "reference"])
def test_half_of_a_step_by_an_epsilon_needs_the_other_half(kernels: Kernels) -> None:
    store = filled(CONFIGS["sketch by epsilon"], kernels=kernels)
    store.make_room()
    with pytest.raises(ArgumentError, match=r"^exact is missing: a store with an epsilon draws until the whole output"):
        kernels.sampled_half([store.view], *new_token(), scale=SCALE)
    assert store.length == 437


def test_half_of_a_step_keeps_faults_apart() -> None:
    stores = [filled(CONFIGS[name]) for name in ("lsh", "sketch", "full")]
    for store in stores:
        store.make_room()
    new = new_token(3)
    new[1][1, 0, 0] = math.nan
    half = CPU.sampled_half([store.view for store in stores], *new, scale=SCALE)
    assert half.faults == [0, 2, 0]
    assert half.state.output[1].isnan().all()
    assert half.state.lse[1].isnan().all()
    assert half.state.output[[0, 2]].isfinite().all()
    assert (half.state.lse[2] == -math.inf).all()
    assert [store.length for store in stores] == [438, 437, 438]


def test_prepared_queries_of_another_form_are_refused() -> None:
    store = filled(CONFIGS["lsh"])
    store.make_room()
    for wrong in (torch.zeros(G * R, D, dtype=torch.float64), torch.zeros(1, D), torch.zeros(D, G * R).T):
        with pytest.raises(ArgumentError, match=r"^prepared queries must be "):
            CPU.sampled_half([store.view], *new_token(), scale=SCALE, prepared=[wrong])
