"""The fused decode step: batches of ragged, mixed stores against float64, against itself, and against misuse."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from magicpig.attention.step import LayerDecoder, attend_stores, decode_step, make_ready
from magicpig.config import Config
from magicpig.errors import NotFiniteError
from magicpig.kernels import base, cpu, library
from magicpig.kernels.algorithm import attend_full, attend_lsh
from magicpig.kernels.attend.reference import attend, with_sink_logits
from magicpig.kernels.hash.reference import make_planes
from magicpig.store import KVStore
from magicpig.types import AttentionState

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
G, R, D = 2, 3, 64
H = G * R
SCALE = D**-0.5

SAMPLED = Config(K=4, L=20, exact_below=0, block=8)
# With K = 1 a key collides in a table with probability p, and u = 1 - (1 - p)^1024 is one up to 1e-9 for every
# p > 0.02, that is for all keys not opposite to the query: the sample is the whole body, every weight is one.
EVERYTHING = Config(K=1, L=1024, min_hits=1, exact_below=0, block=8)

# Relative error of float32 accumulation, as in the kernels' own tests.
RELATIVE_ERROR = 1e-5
# Rounding of an entry of the output: relative, and absolute where float16 gets denormal.
OUTPUT_ROUNDING = {torch.float32: (0.0, 0.0), torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, 2.0**-25)}


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def make_store(
    tokens: int,
    config: Config = SAMPLED,
    dtype: torch.dtype = torch.float32,
    *,
    sampled: bool = True,
    shift: float = 0.0,
) -> KVStore:
    store = KVStore(G, D, dtype, config, sampled=sampled)
    if tokens:
        keys = torch.randn(G, tokens, D) + shift * torch.randn(G, 1, D)
        store.append(keys.to(dtype), torch.randn(G, tokens, D).to(dtype))
    return store


def new_token(B: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, H, D), key and value (B, G, D)."""
    return torch.randn(B, H, D).to(dtype), torch.randn(B, G, D).to(dtype), torch.randn(B, G, D).to(dtype)


def rows_of(store: KVStore) -> tuple[Tensor, Tensor]:
    """Keys and values as stored, (G, N, D) float64."""
    pieces = list(store.blocks())
    if not pieces:
        return torch.empty(G, 0, D).double(), torch.empty(G, 0, D).double()
    return torch.cat([k for k, _ in pieces], 1).double(), torch.cat([v for _, v in pieces], 1).double()


def exact(query: Tensor, store: KVStore, softcap: float | None = None) -> AttentionState:
    """Attention of one request's query (H, D) over all of its stored rows, in float64."""
    keys, values = rows_of(store)
    states = []
    for g, group in enumerate(query.double().unflatten(0, (G, R))):
        states.append(attend(group, keys[g], values[g], scale=SCALE, softcap=softcap))
    return AttentionState(torch.cat([s.output for s in states]), torch.cat([s.lse for s in states]))


def assert_close(state: AttentionState, right: AttentionState, tolerance: float = RELATIVE_ERROR) -> None:
    output = state.output.double()
    assert output.isfinite().all()
    relative, absolute = OUTPUT_ROUNDING[state.output.dtype]
    allowed = (tolerance + relative) * right.output.norm(dim=-1) + absolute * output.shape[-1] ** 0.5
    assert ((output - right.output).norm(dim=-1) <= allowed).all()
    assert float((state.lse - right.lse).abs().max()) <= tolerance * max(1.0, float(right.lse.abs().max()))


def of_request(state: AttentionState, b: int) -> AttentionState:
    return AttentionState(state.output[b], state.lse[b])


def assert_same_bits(a: AttentionState, b: AttentionState) -> None:
    assert torch.equal(a.output, b.output)
    assert torch.equal(a.lse, b.lse)


@pytest.mark.parametrize(
    "lengths",
    [[0], [1], [3000], [5, 0, 100], [0, 1, 5, 100, 3000, 64, 4097]],
    ids=lambda lengths: f"B{len(lengths)}-{lengths}",
)
def test_ragged_exact_stores_are_exact_attention(lengths, dtype, isa):
    stores = [make_store(n, dtype=dtype, sampled=False) for n in lengths]
    query, keys, values = new_token(len(lengths), dtype)
    state = decode_step(query, keys, values, stores, scale=SCALE)
    assert state.output.shape == query.shape
    assert state.output.dtype == dtype
    assert state.lse.shape == query.shape[:2]
    assert state.lse.dtype == torch.float32
    for b, store in enumerate(stores):
        assert store.length == lengths[b] + 1
        assert_close(of_request(state, b), exact(query[b], store))


def test_the_first_token_attends_to_itself_alone():
    store = make_store(0)
    query, keys, values = new_token(1)
    state = decode_step(query, keys, values, [store], scale=SCALE)
    torch.testing.assert_close(state.output[0], values[0].repeat_interleave(R, 0), rtol=1e-6, atol=1e-6)
    logits = SCALE * (query[0] * keys[0].repeat_interleave(R, 0)).sum(-1)
    torch.testing.assert_close(state.lse[0], logits, rtol=1e-5, atol=1e-5)


def test_an_empty_store_attended_without_a_new_token_is_empty():
    state, info = attend_stores(torch.randn(1, H, D), [make_store(0)], scale=SCALE)
    assert state.output.eq(0).all()
    assert state.lse.eq(-math.inf).all()
    assert info.rows.tolist() == [[0, 0]]


@pytest.mark.parametrize("tokens", [72, 80, 500, 4200])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_a_sample_of_everything_is_exact_attention(shift, tokens, dtype, isa):
    # `shift` moves all keys together, as trained keys are: centring must not change the result.
    store = make_store(tokens, EVERYTHING, dtype, shift=shift)
    query, keys, values = new_token(1, dtype)
    state = decode_step(query, keys, values, [store], scale=SCALE)
    assert store.settled
    assert store.stats.sampled_rows == store.stats.body_rows == H * ((tokens - 64) // 8 * 8 - 4)
    assert_close(of_request(state, 0), exact(query[0], store))


def decided(vectors: Tensor, config: Config) -> Tensor:
    """Which of the vectors (n, D) have no projection so near to zero that rounding in float32 could change its sign."""
    rounded, planes = vectors.to(torch.bfloat16).double(), make_planes(D, config.K, config.L, config.seed).double()
    return ((rounded @ planes).abs() > (D + 2) * 2.0**-24 * (rounded.abs() @ planes.abs())).all(1)


@pytest.mark.parametrize(
    "config",
    [SAMPLED, Config(K=8, L=75, exact_below=0, block=16), Config(K=10, L=150, exact_below=0)],
    ids=lambda c: f"K{c.K}-L{c.L}",
)
def test_the_step_is_the_reference_algorithm(config, isa):
    # Keys of the body come in opposite pairs about a centre, all on a grid that float32 holds: the mean is exactly this
    # centre, whatever sums it up. And no projection is so near to zero that the order of a sum decides its sign.
    tokens = 1500
    pairs = (tokens - config.sinks - config.recent) // 2
    grid = torch.randn(G, 2 * pairs, D).mul(1024).round() / 1024
    sides = torch.stack([own[decided(own, config)][:pairs] for own in grid])
    body = torch.cat([sides, -sides], 1)[:, torch.randperm(2 * pairs)]
    static = torch.randn(G, config.sinks + config.recent, D)
    centre = torch.randn(G, 1, D).mul(8).round() / 8
    keys = torch.cat([static[:, : config.sinks], body + centre, static[:, config.sinks :]], 1)
    values = torch.randn(G, tokens, D)
    store = KVStore(G, D, torch.float32, config, sampled=True)
    store.append(keys, values)
    store.settle()
    query = torch.randn(1, 4 * H, D) + torch.randn(1, 1, D)
    query = query[:, decided(query[0], config)][:, :H]
    state, info = attend_stores(query, [store], scale=SCALE)
    right, samples = attend_lsh(
        query[0].double(), keys.double(), values.double(), K=config.K, L=config.L, min_hits=config.min_hits,
        seed=config.seed, sinks=config.sinks, recent=config.recent, stride=config.block, scale=SCALE,
    )  # fmt: skip
    for h, sample in enumerate(samples):
        assert len(sample.ids) > 0
        assert torch.equal(info.ids[0][h], sample.ids)
        # The table of log u is good to 1e-4 and so is each weight; the output errs by at most twice that of the values
        # it mixes.
        assert float((info.log_u[0][h] - sample.log_u).abs().max()) < 1.5e-4
        error = (state.output[0, h] - right.output[h]).norm() / right.output[h].norm()
        assert float(error) < 3e-4
        assert abs(float(state.lse[0, h] - right.lse[h])) < 1.5e-4


def test_the_new_token_is_not_sampled_and_the_body_is():
    store = make_store(300)
    query, keys, values = new_token(1)
    decode_step(query, keys, values, [store], scale=SCALE)
    assert (store.length, store.indexed_to) == (301, 232)
    _, info = attend_stores(query, [store], scale=SCALE)
    for ids in info.ids[0]:
        assert len(ids) > 0
        assert int(ids.min()) >= 4
        assert int(ids.max()) < 232


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16, 256])
def test_any_number_of_query_heads_per_key_head(group, isa):
    query = torch.randn(1, G * group, D)
    for config in [EVERYTHING, Config(exact_below=10**6)]:
        store = make_store(200, config)
        store.settle()
        state, info = attend_stores(query, [store], scale=SCALE)
        assert len(info.ids[0]) == G * group
        keys, values = rows_of(store)
        assert_close(of_request(state, 0), attend_full(query[0].double(), keys, values, scale=SCALE))


@pytest.mark.parametrize("head_dim", [1, 40, 80, 96, 128, 192, 256, 512])
def test_any_head_dimension(head_dim, dtype, isa):
    config = Config(K=1, L=1024, min_hits=1, exact_below=0, recent=5, block=8)
    store = KVStore(1, head_dim, dtype, config, sampled=True)
    keys, values = torch.rand(1, 100, head_dim), torch.randn(1, 100, head_dim)
    store.append(keys.to(dtype), values.to(dtype))
    query = torch.rand(1, 3, head_dim).to(dtype)
    state = decode_step(
        query, torch.rand(1, 1, head_dim).to(dtype), torch.randn(1, 1, head_dim).to(dtype), [store], scale=0.2
    )
    stored = [torch.cat(x, 1) for x in zip(*store.blocks(), strict=True)]
    # At D = 1 keys on the other side of the centre never collide, as the law says: u = 0 at cosine -1.
    kept = torch.ones(101, dtype=torch.bool)
    if head_dim == 1:
        kept[4:88] = stored[0][0, 4:88, 0] > store.index.tables[0].centre[0, 0]
    right = attend(query[0].double(), stored[0][0, kept].double(), stored[1][0, kept].double(), scale=0.2)
    assert_close(of_request(state, 0), right)


@pytest.mark.parametrize("softcap", [None, 1.5, 50.0], ids=str)
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sink-logits"])
@pytest.mark.parametrize("tokens", [0, 40, 900])
def test_softcap_and_sink_logits_on_settled_and_plain_stores(tokens, sinks, softcap, dtype, isa):
    store = make_store(tokens, EVERYTHING, dtype, shift=2.0)
    query, keys, values = new_token(1, dtype)
    sink_logits = torch.linspace(-30, 30, H) if sinks else None
    state = decode_step(query, keys, values, [store], scale=SCALE, softcap=softcap, sink_logits=sink_logits)
    assert store.settled == (tokens == 900)
    right = exact(query[0], store, softcap)
    if sink_logits is not None:
        right = with_sink_logits(right, sink_logits.double())
    assert_close(of_request(state, 0), right)


@pytest.mark.parametrize("sampler", ["lsh", "sketch"])
@pytest.mark.parametrize("B", [1, 3])
def test_a_layer_decoder_takes_the_steps_of_decode_step(B, sampler, dtype):
    config = Config(sampler=sampler, K=4, L=20, budget=40, exact_below=0, recent=20, block=16)
    stores = [make_store(80 + 20 * b, config, dtype) for b in range(B)]
    others = [store.fork() for store in stores]
    decoder = LayerDecoder(stores, H, scale=SCALE, softcap=20.0)
    for _ in range(40):  # over several blocks that are indexed on the way
        query, keys, values = new_token(B, dtype)
        new = [x.unsqueeze(2) for x in (query, keys, values)]
        assert decoder.takes(*new)
        expected = decode_step(query, keys, values, others, scale=SCALE, softcap=20.0).output
        output, errors = decoder.step(*new)
        assert errors is None
        assert torch.equal(output, expected.unsqueeze(1))
    assert stores[0].indexed_to == others[0].indexed_to > 60
    assert stores[0].stats.sampled_rows == others[0].stats.sampled_rows > 0


def test_a_layer_decoder_leaves_the_unusual_to_decode_step():
    stores = [make_store(80) for _ in range(2)]
    decoder = LayerDecoder(stores, H, scale=SCALE, softcap=None)
    query, keys, values = (x.unsqueeze(2) for x in new_token(2))
    assert decoder.takes(query, keys, values)
    wide = torch.randn(2, H, 1, 2 * D)[..., ::2]
    assert not wide.is_contiguous()
    for other in (
        (wide, keys, values),
        (query[:1], keys, values),
        (query, keys[:, :1], values),
        (query, keys, values.expand(2, G, 2, D)),
        (query, keys.bfloat16(), values.bfloat16()),
        (query.half(), keys.half(), values.half()),
        (query.to("meta"), keys, values),
    ):
        assert not decoder.takes(*other)
    chosen = [make_store(80, Config(sampler="oracle", budget=8, exact_below=0, block=8)) for _ in range(2)]
    assert not LayerDecoder(chosen, H, scale=SCALE, softcap=None).takes(query, keys, values)


def test_a_layer_decoder_checks_what_it_is_made_of_and_every_token():
    store = make_store(80)
    with pytest.raises(ValueError, match=r"^query has 5 heads; expected a multiple of kv_heads=2"):
        LayerDecoder([store], 5, scale=SCALE, softcap=None)
    with pytest.raises(ValueError, match=r"^softcap=-1.0 must be positive and finite"):
        LayerDecoder([store], H, scale=SCALE, softcap=-1.0)
    query, keys, values = (x.unsqueeze(2) for x in new_token(1))
    keys[0, 1, 0, 3] = math.nan
    output, errors = LayerDecoder([store], H, scale=SCALE, softcap=None).step(query, keys, values)
    assert output.isnan().all()
    assert [str(error) for error in errors] == ["keys has entries that are not finite, or too large for the store"]
    assert store.length == 80


def test_sink_logits_of_an_empty_store_are_the_whole_denominator():
    sink_logits = torch.linspace(-5, 5, H)
    state, _ = attend_stores(torch.randn(1, H, D), [make_store(0)], scale=SCALE, sink_logits=sink_logits)
    assert state.output.eq(0).all()
    torch.testing.assert_close(state.lse[0], sink_logits)


def mixed_stores(dtype: torch.dtype = torch.float32) -> list[KVStore]:
    """Sampled, too short to sample, dense, empty, and sampled again with several segments' worth of tokens."""
    short = Config(K=4, L=20, exact_below=1000, block=8)
    return [
        make_store(700, dtype=dtype),
        make_store(300, short, dtype),
        make_store(400, dtype=dtype, sampled=False),
        make_store(0, dtype=dtype),
        make_store(5000, dtype=dtype, shift=1.0),
        make_store(72, dtype=dtype),
        make_store(71, dtype=dtype),
    ]


@pytest.mark.parametrize("B", [1, 3, 7])
def test_a_mixed_batch_is_the_same_as_one_call_per_request(B, dtype, isa, two_threads):
    stores = mixed_stores(dtype)[:B]
    alone = [store.fork() for store in stores]
    for _ in range(3):
        query, keys, values = new_token(B, dtype)
        together = decode_step(query, keys, values, stores, scale=SCALE)
        for b, store in enumerate(alone):
            one = slice(b, b + 1)
            state = decode_step(query[one], keys[one], values[one], [store], scale=SCALE)
            assert_same_bits(of_request(together, b), of_request(state, 0))
    for store, other in zip(stores, alone, strict=True):
        assert torch.equal(rows_of(store)[0], rows_of(other)[0])
        assert store.stats == other.stats


def stores_of_all_kinds(dtype: torch.dtype) -> list[KVStore]:
    """Samplers, budgets, seeds and dtypes of rows, all different."""
    shared = {"exact_below": 0, "block": 16, "recent": 20}
    configs = [
        Config(K=8, L=75, **shared),
        Config(K=7, L=60, min_hits=1, seed=3, **shared),
        Config(K=7, L=60, min_hits=3, kv_dtype="int8", **shared),
        Config(sampler="sketch", budget=128, bits=2, **shared),
        Config(sampler="sketch", budget=128, candidates=100, bits=2, **shared),
        Config(sampler="sketch", budget=300, epsilon=0.05, bits=3, seed=7, **shared),
        Config(sampler="sketch", budget=0.1, bits=2, kv_dtype="int8", **shared),
        Config(sampler="full", **shared),
        Config(sampler="full", kv_dtype="int8", **shared),
        Config(sampler="sketch", budget=128, bits=2, **{**shared, "block": 256}),
    ]
    kinds = [torch.float32 if i == 3 else dtype for i in range(len(configs))]
    return [
        make_store(900 + 37 * i, c, kind, shift=2.0) for i, (c, kind) in enumerate(zip(configs, kinds, strict=True))
    ]


@pytest.mark.parametrize(("where", "failing"), [("query", 0), ("keys", 4), ("values", 8), (None, None)])
def test_stores_of_all_kinds_take_one_step_as_each_would_alone(where, failing, two_threads):
    dtype = torch.bfloat16
    stores = stores_of_all_kinds(dtype)
    alone = [store.fork() for store in stores]
    B = len(stores)
    for step in range(3):
        new = dict(zip(("query", "keys", "values"), new_token(B, dtype), strict=True))
        lengths = [store.length for store in stores]
        if failing is not None and step == 1:
            new[where][failing, 1, 5] = math.nan
            make_ready(stores)
            result = cpu.decode_step([store.view for store in stores], *new.values(), scale=SCALE)
            assert [base.FAULTS[fault] for fault in result.faults] == [where if b == failing else "" for b in range(B)]
            assert stores[failing].length == lengths[failing]
            for x in (result.output, result.lse, result.predicted_error):
                assert x[failing].isnan().all()
            together = AttentionState(result.output, result.lse)
        else:
            together = decode_step(*new.values(), stores, scale=SCALE)
        for b, store in enumerate(alone):
            one = slice(b, b + 1)
            if failing == b and step == 1:
                message = rf"^{where} has entries that are not finite, or too large for the store$"
                with pytest.raises(NotFiniteError, match=message):
                    decode_step(*(x[one] for x in new.values()), [store], scale=SCALE)
                continue
            state = decode_step(*(x[one] for x in new.values()), [store], scale=SCALE)
            assert_same_bits(of_request(together, b), of_request(state, 0))
    for b, (store, other) in enumerate(zip(stores, alone, strict=True)):
        assert store.length == other.length == 900 + 37 * b + 3 - (failing == b)
        assert store.stats.steps == other.stats.steps == 3 - (failing == b)
        assert store.stats.sampled_rows == other.stats.sampled_rows
        assert torch.equal(rows_of(store)[0], rows_of(other)[0])


def test_the_sequences_that_failed_are_named():
    stores = [make_store(10) for _ in range(3)]
    query, keys, values = new_token(3)
    keys[0, 0, 0], values[2, 0, 0] = math.inf, math.nan
    message = r"^keys has entries that are not finite, or too large for the store, in sequence 0, 2 of 3$"
    with pytest.raises(NotFiniteError, match=message):
        decode_step(query, keys, values, stores, scale=SCALE)
    assert [store.length for store in stores] == [10, 11, 10]


def test_a_policy_may_change_between_two_steps():
    config = Config(sampler="sketch", budget=20, exact_below=0, block=16)
    store = make_store(900, config)
    store.settle()
    query = torch.randn(1, H, D)
    fixed = attend_stores(query, [store], scale=SCALE)[1]
    for budget, seed in [(20, 1), (200, 0), (200, 1), (0.5, 0)]:
        cpu.set_policy(store.view, budget=budget, seed=seed)
        _, info = attend_stores(query, [store], scale=SCALE)
        wanted = budget if budget >= 1 else budget * (store.indexed_to - 4)
        assert abs(int(info.rows[0, 0]) - wanted) <= 1
    cpu.set_policy(store.view, budget=20)
    assert torch.equal(attend_stores(query, [store], scale=SCALE)[1].ids[0][0], fixed.ids[0][0])


@pytest.mark.parametrize("how", ["layers", "heads"])
def test_layers_and_heads_have_luck_of_their_own(how):
    # Flat attention: all rows weigh the same, so what is drawn depends on where the walk starts alone.
    config = Config(sampler="sketch", budget=256, exact_below=0, sinks=0, recent=0, block=256)
    tokens, drawn = 8192, []
    for i in range(20):
        place = {"layer": i} if how == "layers" else {"first_head": i}
        store = KVStore(1, D, torch.float32, config, sampled=True, **place)
        store.append(torch.randn(1, tokens, D), torch.randn(1, tokens, D))
        store.settle()
        _, info = attend_stores(torch.zeros(1, 1, D), [store], scale=SCALE)
        drawn.append(set(info.ids[0][0].tolist()))
    shared = torch.tensor([len(drawn[i] & drawn[j]) for i in range(20) for j in range(i)]).double()
    # Two of 256 rows of 8192 have 8 in common by chance. Systematic samples of equal weights have nearly all in common
    # or nothing: of 190 pairs one in 32 is expected to have all. Ten times as many would mean that starts are alike.
    assert float(shared.mean()) < 10 * 256 / 32


def test_a_head_draws_the_same_on_any_rank():
    config = Config(sampler="sketch", budget=40, exact_below=0, block=16, recent=20)
    keys, values = torch.randn(4, 700, D), torch.randn(4, 700, D)
    query = torch.randn(1, 8, D)

    def rank(first: int, heads: int) -> tuple[AttentionState, list[Tensor]]:
        store = KVStore(heads, D, torch.float32, config, sampled=True, layer=5, first_head=first)
        store.append(keys[first : first + heads], values[first : first + heads])
        store.settle()
        state, info = attend_stores(query[:, 2 * first : 2 * (first + heads)], [store], scale=SCALE)
        return state, info.ids[0]

    whole, ids = rank(0, 4)
    parts = [rank(0, 2), rank(2, 2)]
    assert torch.equal(whole.output, torch.cat([state.output for state, _ in parts], 1))
    for own, right in zip([x for _, each in parts for x in each], ids, strict=True):
        assert torch.equal(own, right)
    assert not torch.equal(ids[0], ids[2])


def test_settled_and_plain_stores_of_a_batch_are_each_right(dtype):
    configs = [EVERYTHING, Config(K=1, L=1024, min_hits=1, exact_below=1000, block=8), EVERYTHING]
    stores = [make_store(n, config, dtype, shift=2.0) for n, config in zip([500, 600, 0], configs, strict=True)]
    query, keys, values = new_token(3, dtype)
    state = decode_step(query, keys, values, stores, scale=SCALE)
    assert [store.settled for store in stores] == [True, False, False]
    for b, store in enumerate(stores):
        assert_close(of_request(state, b), exact(query[b], store))


def test_repeated_calls_give_the_same_bits(dtype, two_threads):
    stores = mixed_stores(dtype)
    query = torch.randn(len(stores), H, D).to(dtype)
    first, info = attend_stores(query, stores, scale=SCALE)
    for _ in range(5):
        state, again = attend_stores(query, stores, scale=SCALE)
        assert_same_bits(state, first)
        assert all(
            torch.equal(a, b) for x, y in zip(again.ids, info.ids, strict=True) for a, b in zip(x, y, strict=True)
        )


def test_pools_and_thread_counts_change_no_bit(pool):
    stores = [*mixed_stores(), make_store(9000, sampled=False)]
    query = torch.randn(len(stores), H, D)
    state, info = attend_stores(query, stores, scale=SCALE)
    library.use_pool("torch")
    torch.set_num_threads(1)
    alone, right = attend_stores(query, stores, scale=SCALE)
    assert_same_bits(state, alone)
    assert torch.equal(info.rows, right.rows)


def test_levels_differ_by_rounding_only():
    before = library.isa()
    stores = [make_store(3000, EVERYTHING), make_store(2000, sampled=False)]
    for store in stores:
        store.settle()
    query = torch.randn(2, H, D)
    try:
        states = []
        for level in library.isa_levels(True):
            library.use_isa(level)
            states.append(attend_stores(query, stores, scale=SCALE)[0])
    finally:
        library.use_isa(before)
    for state in states[1:]:
        right = AttentionState(states[0].output.double(), states[0].lse.double())
        for b in range(2):
            assert_close(of_request(state, b), of_request(right, b), 2e-6)


def test_the_sample_depends_on_the_seed_alone():
    tokens = torch.randn(2, G, 600, D)
    query = torch.randn(1, H, D)
    samples = []
    for seed in [0, 0, 1]:
        store = KVStore(G, D, torch.float32, Config(K=6, L=30, seed=seed, exact_below=0, block=8), sampled=True)
        torch.randn(3)  # whatever the global generator has been through
        store.append(tokens[0], tokens[1])
        store.settle()
        samples.append(torch.cat(attend_stores(query, [store], scale=SCALE)[1].ids[0]))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_stats_count_steps_and_rows():
    store = make_store(500)
    for step in range(1, 4):
        query, keys, values = new_token(1)
        decode_step(query, keys, values, [store], scale=SCALE)
        assert store.stats.steps == step
    assert store.stats.body_rows == 3 * H * (432 - 4)
    assert 0 < store.stats.sampled_rows < store.stats.body_rows
    assert store.stats.mean_share == store.stats.sampled_rows / store.stats.body_rows
    assert store.stats.mean_share <= store.stats.max_share <= 1
    before = store.stats.sampled_rows
    _, info = attend_stores(query, [store], scale=SCALE)
    assert store.stats.sampled_rows - before == sum(len(ids) for ids in info.ids[0])


def test_rows_are_the_distinct_sampled_rows_of_a_key_head():
    store = make_store(500)
    store.settle()
    _, info = attend_stores(torch.randn(1, H, D), [store], scale=SCALE)
    assert info.rows.shape == (1, G)
    for g in range(G):
        union = {int(i) for ids in info.ids[0][g * R : (g + 1) * R] for i in ids}
        assert int(info.rows[0, g]) == len(union)
    assert all((ids.diff() > 0).all() for ids in info.ids[0])
    assert all((log_u <= 0).all() for log_u in info.log_u[0])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_a_new_token_that_is_not_finite_is_refused_and_nothing_appended(where, poison, dtype):
    stores = [make_store(n, dtype=dtype) for n in [500, 10]]
    query, keys, values = new_token(2, dtype)
    bad = {"keys": keys.clone(), "values": values.clone()}
    bad[where][1, 1, D - 1] = poison
    with pytest.raises(ValueError, match=rf"^{where} has (values|entries) that are not finite"):
        decode_step(query, bad["keys"], bad["values"], stores, scale=SCALE)
    assert [store.length for store in stores] == [501, 10]  # only the one with bad numbers
    # And the stores go on as if nothing had happened.
    state = decode_step(query, keys, values, stores, scale=SCALE)
    assert state.output.isfinite().all()
    assert [store.length for store in stores] == [502, 11]


def test_arguments_that_do_not_fit_are_refused_in_one_line():
    store = make_store(10)
    query, keys, values = new_token(1)
    scaled = {"scale": SCALE}
    wrong = {
        r"^stores is empty; one store per sequence is needed$": (query, keys, values, [], scaled),
        r"^query has shape \(1, 6, 64\); expected \(2, H, 64\)$": (query, keys, values, [store, make_store(3)], scaled),
        r"^query has shape \(6, 64\); expected \(1, H, 64\)$": (query[0], keys, values, [store], scaled),
        r"^query has shape \(1, 6, 63\); expected \(1, H, 64\)$": (query[..., :63], keys, values, [store], scaled),
        r"^query has 5 heads; expected a multiple of kv_heads=2, at most 256 times it$": (
            query[:, :5], keys, values, [store], scaled,
        ),
        r"^query has 514 heads; expected a multiple of kv_heads=2, at most 256 times it$": (
            torch.randn(1, 514, D), keys, values, [store], scaled,
        ),
        r"^query is on meta; decoding reads stores in host memory and needs it on the cpu$": (
            query.to("meta"), keys, values, [store], scaled,
        ),
        r"^dtype=torch.float64 is not supported; allowed: torch.float32, torch.bfloat16, torch.float16$": (
            query.double(), keys.double(), values.double(), [store], scaled,
        ),
        r"^keys has shape \(1, 1, 64\); expected \(1, 2, 64\)$": (query, keys[:, :1], values, [store], scaled),
        r"^values has shape \(1, 2, 32\); expected \(1, 2, 64\)$": (query, keys, values[..., :32], [store], scaled),
        r"^keys is torch.bfloat16 on cpu; expected torch.float32 on cpu as the query$": (
            query, keys.bfloat16(), values, [store], scaled,
        ),
        r"^values is torch.float32 on meta; expected torch.float32 on cpu as the query$": (
            query, keys, values.to("meta"), [store], scaled,
        ),
        r"^query has 0 heads; expected a multiple of kv_heads=2, at most 256 times it$": (
            query[:, :0], keys, values, [store], scaled,
        ),
        r"^scale=nan must be finite$": (query, keys, values, [store], {"scale": math.nan}),
        r"^softcap=inf must be positive and finite$": (query, keys, values, [store], {**scaled, "softcap": math.inf}),
        r"^softcap=nan must be positive and finite$": (query, keys, values, [store], {**scaled, "softcap": math.nan}),
        r"^softcap=0.0 must be positive": (query, keys, values, [store], {**scaled, "softcap": 0.0}),
        r"^softcap=-3.0 must be positive": (query, keys, values, [store], {**scaled, "softcap": -3.0}),
        r"^sink_logits has shape \(2,\); expected \(6,\)$": (
            query, keys, values, [store], {**scaled, "sink_logits": torch.zeros(2)},
        ),
    }  # fmt: skip
    for message, (*arguments, settings) in wrong.items():
        with pytest.raises(ValueError, match=message) as caught:
            decode_step(*arguments, **settings)
        assert "\n" not in str(caught.value)
    assert store.length == 10


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_query_that_is_not_finite_is_refused(poison, dtype):
    # All its logits would be NaN, which no maximum sees: attention over nothing, silently.
    store = make_store(500, dtype=dtype)
    query, keys, values = new_token(1, dtype)
    query[0, 3, 17] = poison
    with pytest.raises(ValueError, match=r"^query has (values|entries) that are not finite"):
        decode_step(query, keys, values, [store], scale=SCALE)
    assert store.length == 500
    with pytest.raises(ValueError, match=r"^query has (values|entries) that are not finite"):
        attend_stores(query, [store], scale=SCALE)


@pytest.mark.parametrize("where", ["keys", "values"])
def test_a_new_token_too_large_for_the_store_is_refused(where):
    store = make_store(10, dtype=torch.float16)
    query, keys, values = new_token(1)
    new = {"keys": keys, "values": values}
    new[where][0, 0, 0] = 7e4  # the largest float16 is 65504
    with pytest.raises(ValueError, match=rf"^{where} has entries that are not finite, or too large for the store"):
        decode_step(query, new["keys"], new["values"], [store], scale=SCALE)
    assert store.length == 10


def test_stores_that_do_not_belong_together_are_refused():
    query, keys, values = new_token(2)
    one = make_store(500)
    others = {
        r"^stores differ in kv_heads or head_dim; ": [
            KVStore(G + 1, D, torch.float32, SAMPLED, sampled=True),
            KVStore(G, D - 1, torch.float32, SAMPLED, sampled=True),
        ],
        r"^stores has the same store twice": [one],
    }
    for message, stores in others.items():
        for other in stores:
            one.settle()
            other.settle()
            before = one.length, other.length
            with pytest.raises(ValueError, match=message):
                decode_step(query, keys, values, [one, other], scale=SCALE)
            assert (one.length, other.length) == before
            with pytest.raises(ValueError, match=message):
                attend_stores(query, [one, other], scale=SCALE)


def run_with(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )


def test_an_unknown_instruction_set_is_refused_with_those_there_are():
    ran = run_with("from magicpig.kernels import library; library.isa()", MAGICPIG_ISA="sse9")
    assert ran.returncode == 1
    levels = ", ".join(library.isa_levels(True))
    expected = f"MAGICPIG_ISA=sse9 cannot run here; this machine and build have {levels}"
    assert ran.stderr.splitlines()[-1] == f"magicpig.errors.EnvironmentVariableError: {expected}"


def test_unknown_pools_and_thread_counts_are_refused():
    code = (
        "import os\nfrom magicpig.errors import EnvironmentVariableError\nfrom magicpig.kernels import library\n"
        "for pool, threads in [('gpu', ''), ('std', 'many'), ('std', '0'), ('std', '-1'), ('std', '5000')]:\n"
        "    os.environ['MAGICPIG_POOL'], os.environ['MAGICPIG_THREADS'] = pool, threads\n"
        "    try:\n        library.threads()\n"
        "    except EnvironmentVariableError as error:\n        print(error)"
    )
    allowed = "is not a number from 1 to 1024"
    assert run_with(code).stdout.splitlines() == [
        "MAGICPIG_POOL=gpu is not available; allowed: torch (2.10 or newer, imported first), std, serial",
        *(f"MAGICPIG_THREADS={threads} {allowed}" for threads in ["many", "0", "-1", "5000"]),
    ]


def test_environment_variables_choose_level_pool_and_threads():
    # The number of threads comes from here or from the machine, not from a constant in the source.
    code = (
        "import torch\nfrom magicpig import Config\nfrom magicpig.attention.step import decode_step\n"
        "from magicpig.kernels import library\nfrom magicpig.store import KVStore\n"
        "store = KVStore(1, 8, torch.float32, Config(), sampled=True)\n"
        "x = torch.ones(1, 1, 8)\n"
        "print(library.isa(), library.pool(), library.threads(), decode_step(x, x, x, [store], scale=1.0).lse.item())"
    )
    ran = run_with(code, MAGICPIG_ISA="portable", MAGICPIG_POOL="std", MAGICPIG_THREADS="3")
    assert ran.stdout.split() == ["portable", "std", "3", "8.0"], ran.stderr


def test_the_thread_count_is_torchs(two_threads):
    assert library.pool() == "torch"
    assert library.threads() == 2
    torch.set_num_threads(1)
    assert library.threads() == 1
