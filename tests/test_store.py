"""The store against a plain list of tokens: whatever is appended, generated, forked or cropped, no token is lost."""

import math

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from magicpig.attention.step import attend_stores, decode_step
from magicpig.collision import log_inclusion
from magicpig.config import Config
from magicpig.kernels import base, cpu
from magicpig.kernels.attend.reference import attend
from magicpig.kernels.tables.reference import lookup_brute_force
from magicpig.store import KVStore

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
G, D = 2, 24
SMALL = Config(K=4, L=10, sinks=3, recent=10, block=16, exact_below=40)


@pytest.fixture(params=DTYPES.values(), ids=DTYPES.keys())
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def tokens(n: int, dtype: torch.dtype = torch.bfloat16, *, shift: float = 2.0) -> tuple[Tensor, Tensor]:
    """Keys around a common centre, and values: (G, n, D)."""
    centre = shift * torch.linspace(-1, 1, G * D).reshape(G, 1, D)
    return (torch.randn(G, n, D) + centre).to(dtype), torch.randn(G, n, D).to(dtype)


def store_of(keys: Tensor, values: Tensor, config: Config = SMALL, *, sampled: bool = True) -> KVStore:
    store = KVStore(keys.shape[0], keys.shape[2], keys.dtype, config, sampled=sampled)
    if keys.shape[1]:
        store.append(keys, values)
    return store


def rows_of(store: KVStore) -> tuple[Tensor, Tensor]:
    pieces = list(store.blocks())
    if not pieces:
        nothing = torch.empty(store.kv_heads, 0, store.head_dim, dtype=store.dtype)
        return nothing, nothing
    return torch.cat([k for k, _ in pieces], 1), torch.cat([v for _, v in pieces], 1)


def hashed(keys: Tensor, config: Config, centre: Tensor | None = None) -> Tensor:
    """Codes (G, L, n) of keys (G, n, D) minus a centre (G, D), by a call of their own."""
    heads, n, head_dim = keys.shape
    rows = torch.zeros(heads, n, base.padded(head_dim), dtype=keys.dtype)
    rows[:, :, :head_dim] = keys
    sampler = cpu.make_sampler(head_dim, config.K, config.L, config.seed)
    return cpu.hash_rows([rows], sampler, [] if centre is None else [centre])


def tables_of(store: KVStore) -> list[base.Segment]:
    """The hash tables in position order."""
    return [tables.segment for segment in getattr(store.index, "segments", ()) for tables in segment.tables]


def step(stores: list[KVStore], keys: Tensor, values: Tensor) -> None:
    """One token (G, D) appended to each of the stores by decoding."""
    B = len(stores)
    query = torch.randn(B, stores[0].kv_heads, stores[0].head_dim).to(keys.dtype)
    decode_step(query, keys.expand(B, -1, -1), values.expand(B, -1, -1), stores, scale=0.2)


def assert_holds(store: KVStore, keys: Tensor, values: Tensor) -> None:
    """The store holds just these tokens, and each position is either exact or in one index segment, rightly hashed."""
    config = store.config
    assert store.length == keys.shape[1]
    stored_keys, stored_values = rows_of(store)
    assert torch.equal(stored_values, values)
    assert torch.equal(stored_keys, keys)

    at = 0
    for segment in tables_of(store):
        assert segment.first == at
        assert 0 < segment.count <= base.SEGMENT_ROWS
        at += segment.count
        first = segment.first // base.SEGMENT_ROWS * base.SEGMENT_ROWS
        strides = (min(store.indexed_to, first + base.SEGMENT_ROWS) - first) // config.block
        centred_by = min(16, 1 << strides.bit_length() - 1) * config.block
        mean = stored_keys[:, first : first + centred_by].double().mean(1)
        torch.testing.assert_close(segment.centre.double(), mean, atol=1e-5, rtol=1e-5)
        built = cpu.build(hashed(keys[:, segment.first : at], config, segment.centre), config.K, segment.first)
        assert torch.equal(segment.offsets.to(torch.int64), built.offsets.to(torch.int64))
        assert torch.equal(segment.ids.to(torch.int64), built.ids.to(torch.int64))
    assert at == store.indexed_to
    # The recent window is whole whenever there are tokens for it.
    assert store.length - store.indexed_to >= min(config.recent, store.length)


def assert_attends_to_everything(store: KVStore) -> None:
    """Attention is that over the exact rows and the sample, which is what the codes of the stored keys say."""
    config = store.config
    query = torch.randn(1, store.kv_heads, store.head_dim).to(store.dtype)
    state, info = attend_stores(query, [store], scale=0.2)
    keys, values = rows_of(store)
    exact = torch.ones(store.length, dtype=torch.bool)
    exact[config.sinks : max(config.sinks, store.indexed_to)] = False
    for g in range(store.kv_heads):
        q = query[0, g]
        ids = info.ids[0][g]
        codes = [hashed(q.expand(1, 1, -1), config)[0, :, 0].to(torch.int64)]
        found = []
        for segment in tables_of(store):
            own = keys[g : g + 1, segment.first : segment.first + segment.count]
            key_codes = hashed(own, config, segment.centre[g : g + 1].contiguous())[0].to(torch.int64).T
            found.append(segment.first + lookup_brute_force(codes[0], key_codes, config.min_hits))
        expected = torch.cat([torch.empty(0, dtype=torch.int64), *found])
        assert torch.equal(ids, expected[expected >= config.sinks])
        read = torch.cat([exact.nonzero()[:, 0], ids])
        log_u = torch.cat([torch.zeros(int(exact.sum())), info.log_u[0][g]]).double()
        right = attend(q[None].double(), keys[g, read].double(), values[g, read].double(), scale=0.2, log_u=log_u)
        # float32 sums; the output is then rounded to the dtype.
        rounding = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[store.dtype]
        torch.testing.assert_close(state.output[0, g].double(), right.output[0], rtol=rounding, atol=2e-5)
        torch.testing.assert_close(state.lse[0, g].double(), right.lse[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("chunks", [[5000], [1, 4999], [255, 1, 1, 3839, 1, 903], [4095, 2, 903], [250] * 20], ids=str)
def test_append_in_any_chunks_makes_the_same_store(chunks, dtype):
    keys, values = tokens(5000, dtype)
    store = KVStore(G, D, dtype, SMALL, sampled=True)
    for k, v in zip(keys.split(chunks, 1), values.split(chunks, 1), strict=True):
        store.append(k, v)
    assert_holds(store, keys, values)
    store.settle()
    assert_holds(store, keys, values)
    assert_attends_to_everything(store)


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 4095, 4096, 4097, 8192, 8193])
def test_blocks_give_back_what_was_appended(n, dtype):
    keys, values = tokens(n, dtype)
    store = store_of(keys, values)
    assert_holds(store, keys, values)
    whole, rest = n // 16 * 16, n % 16
    blocks = [min(4096, whole - i) for i in range(0, whole, 4096)]
    assert [k.shape[1] for k, _ in store.blocks()] == blocks + [rest] * (rest > 0)


def test_settling_leaves_the_rows_alone_and_does_nothing_twice(dtype):
    keys, values = tokens(500, dtype)
    store = store_of(keys, values)
    before = addresses(store)
    store.settle()
    index = store.index
    store.settle()
    assert (store.settled, store.indexed_to, store.length) == (True, 480, 500)
    assert store.index is index
    assert addresses(store) == before
    assert_holds(store, keys, values)


@pytest.mark.parametrize(
    ("n", "settings", "settles"),
    [
        (25, {"exact_below": 0}, False),  # the first stride and the window
        (26, {"exact_below": 0}, True),
        (41, {"exact_below": 0, "sinks": 16}, False),  # all sinks
        (42, {"exact_below": 0, "sinks": 16}, True),
        (39, {}, False),
        (40, {}, True),
        (15, {"exact_below": 0, "sinks": 0, "recent": 0}, False),
        (16, {"exact_below": 0, "sinks": 0, "recent": 0}, True),
        (0, {"exact_below": 0, "sinks": 0, "recent": 0}, False),
        (500, {"sampler": "full"}, False),
    ],
)
def test_stores_settle_when_there_is_a_body_and_enough_tokens(n, settings, settles):
    config = Config(**{**SMALL.model_dump(), **settings})
    keys, values = tokens(n)
    store = store_of(keys, values, config)
    store.settle()
    assert store.settled == settles
    assert_holds(store, keys, values)


def test_dense_layers_never_settle():
    keys, values = tokens(500)
    store = store_of(keys, values, sampled=False)
    store.settle()
    for _ in range(50):
        new = tokens(1)
        step([store], new[0][:, 0], new[1][:, 0])
        keys, values = torch.cat([keys, new[0]], 1), torch.cat([values, new[1]], 1)
    assert not store.settled
    assert store.nbytes().index == 0
    assert_holds(store, keys, values)


@pytest.mark.parametrize("how", ["append", "decode"])
def test_tokens_after_settling_are_indexed_in_blocks(how, dtype):
    keys, values = tokens(200, dtype)
    store = store_of(keys[:, :60], values[:, :60])
    store.index_due()
    boundaries = []
    for i in range(60, 200):
        if how == "append":
            store.append(keys[:, i : i + 1], values[:, i : i + 1])
            if store.length >= store.due:
                store.index_due()
        else:
            step([store], keys[:, i], values[:, i])
        window = store.length - store.indexed_to
        assert SMALL.recent <= window <= SMALL.recent + SMALL.block
        boundaries.append(store.indexed_to)
    assert sorted(set(boundaries)) == list(range(48, 190, SMALL.block))
    assert_holds(store, keys, values)
    assert_attends_to_everything(store)


def test_a_long_append_is_indexed_with_the_next_step():
    keys, values = tokens(1000)
    store = store_of(keys[:, :100], values[:, :100])
    store.settle()
    store.append(keys[:, 100:999], values[:, 100:999])
    assert store.indexed_to == 80  # exact until then
    assert_attends_to_everything(store)
    step([store], keys[:, 999], values[:, 999])
    assert store.indexed_to == (999 - SMALL.recent) // 16 * 16
    assert_holds(store, keys, values)
    assert_attends_to_everything(store)


def test_values_and_keys_of_other_float_types_are_rounded_once():
    keys, values = torch.randn(G, 50, D, dtype=torch.float64), torch.randn(G, 50, D, dtype=torch.float64)
    store = KVStore(G, D, torch.bfloat16, SMALL, sampled=False)
    store.append(keys, values)
    assert_holds(store, keys.bfloat16(), values.bfloat16())


def addresses(store: KVStore) -> list[int]:
    return [rows.data_ptr() for rows in store.rows(0)]


def test_a_fork_shares_memory_until_one_side_writes():
    keys, values = tokens(5000)
    store = store_of(keys, values)
    store.settle()
    fork = store.fork()
    assert addresses(fork) == addresses(store)
    assert fork.index is store.index
    before = addresses(store)
    new_keys, new_values = tokens(1)
    step([fork], new_keys[:, 0], new_values[:, 0])
    # Only the tail was copied.
    assert addresses(fork) == addresses(store) == before
    assert fork.tail is not store.tail
    assert_holds(store, keys, values)
    assert_holds(fork, torch.cat([keys, new_keys], 1), torch.cat([values, new_values], 1))


@pytest.mark.parametrize("n", [20, 39, 100, 4096, 4100])
@pytest.mark.parametrize("settled", [False, True], ids=["plain", "settled"])
def test_both_sides_of_a_fork_go_their_own_way(settled, n, dtype):
    keys, values = tokens(n, dtype)
    store = store_of(keys, values)
    if settled:
        store.settle()
    fork = store.fork()
    assert fork.stats.steps == 0
    held = {store: (keys, values), fork: (keys, values)}
    for _ in range(40):
        for side in (store, fork):
            k, v = tokens(1, dtype)
            step([side], k[:, 0], v[:, 0])
            held[side] = torch.cat([held[side][0], k], 1), torch.cat([held[side][1], v], 1)
    for side, (k, v) in held.items():
        assert_holds(side, k, v)
        assert_attends_to_everything(side)
    fork.crop(n // 2)
    assert_holds(store, *held[store])
    assert_holds(fork, held[fork][0][:, : n // 2], held[fork][1][:, : n // 2])


def test_settling_one_side_of_a_fork_leaves_the_other_plain():
    keys, values = tokens(5000)
    store = store_of(keys, values)
    fork = store.fork()
    fork.settle()
    assert (store.settled, fork.settled) == (False, True)
    assert_holds(store, keys, values)
    assert_holds(fork, keys, values)
    store.settle()
    assert_holds(store, keys, values)
    assert_attends_to_everything(store)
    assert_attends_to_everything(fork)


def test_a_fork_of_a_fork_outlives_both():
    keys, values = tokens(300)
    store = store_of(keys, values)
    store.settle()
    last = store.fork().fork()
    store.crop(5)
    del store
    assert_holds(last, keys, values)
    assert_attends_to_everything(last)


# Of 5000 tokens: into the window, at and around its start, into the index, around a block of rows, into the window of
# what is left, into the sinks, and to nothing.
CROPS = [5000, 4999, 4991, 4990, 4989, 4980, 4097, 4096, 4095, 300, 41, 40, 39, 14, 13, 12, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("length", CROPS)
@pytest.mark.parametrize("settled", [False, True], ids=["plain", "settled"])
def test_a_cropped_store_is_as_if_built_from_what_is_left(settled, length, dtype):
    keys, values = tokens(5000, dtype)
    store = store_of(keys, values)
    if settled:
        store.settle()
    store.crop(length)
    assert_holds(store, keys[:, :length], values[:, :length])
    if length:
        assert_attends_to_everything(store)
    # And what comes then is as good as what was there first.
    keys, values = keys[:, :length], values[:, :length]
    for n in [1, 30, 4200]:
        k, v = tokens(n, dtype)
        store.append(k, v)
        keys, values = torch.cat([keys, k], 1), torch.cat([values, v], 1)
    k, v = tokens(1, dtype)
    step([store], k[:, 0], v[:, 0])
    assert store.settled
    assert store.indexed_to == (length + 4231 - SMALL.recent) // 16 * 16
    assert_holds(store, torch.cat([keys, k], 1), torch.cat([values, v], 1))
    assert_attends_to_everything(store)


@pytest.mark.parametrize("length", [-1, 11, 10**12])
def test_a_store_is_not_cropped_to_more_than_it_has(length):
    store = store_of(*tokens(10))
    with pytest.raises(ValueError, match=rf"^length={length} is out of range; allowed: 0 to 10$"):
        store.crop(length)
    assert store.length == 10


class StoreMachine(RuleBasedStateMachine):
    """Up to four stores, each beside the tokens it should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.stores: list[KVStore] = []
        self.held: list[tuple[Tensor, Tensor]] = []

    @initialize(n=st.sampled_from([0, 1, 39, 60, 4090]))
    def begin(self, n: int) -> None:
        torch.manual_seed(n)
        keys, values = tokens(n)
        self.stores.append(store_of(keys, values))
        self.held.append((keys, values))

    def choose(self, which: int) -> int:
        return which % len(self.stores)

    def extend(self, i: int, keys: Tensor, values: Tensor) -> None:
        self.held[i] = torch.cat([self.held[i][0], keys], 1), torch.cat([self.held[i][1], values], 1)

    @rule(which=st.integers(0, 3), n=st.sampled_from([1, 2, 9, 17, 50, 300, 4000]))
    def append(self, which: int, n: int) -> None:
        i = self.choose(which)
        if self.stores[i].length < 20_000:
            keys, values = tokens(n)
            self.stores[i].append(keys, values)
            self.extend(i, keys, values)

    @rule(steps=st.integers(1, 40))
    def decode_all(self, steps: int) -> None:
        for _ in range(steps):
            keys, values = tokens(1)
            step(self.stores, keys[:, 0], values[:, 0])
            for i in range(len(self.stores)):
                self.extend(i, keys, values)

    @rule(which=st.integers(0, 3))
    def settle(self, which: int) -> None:
        self.stores[self.choose(which)].settle()

    @precondition(lambda self: len(self.stores) < 4)
    @rule(which=st.integers(0, 3))
    def fork(self, which: int) -> None:
        i = self.choose(which)
        self.stores.append(self.stores[i].fork())
        self.held.append(self.held[i])

    @precondition(lambda self: len(self.stores) > 1)
    @rule(which=st.integers(0, 3))
    def drop(self, which: int) -> None:
        i = self.choose(which)
        del self.stores[i], self.held[i]

    @rule(which=st.integers(0, 3), back=st.sampled_from([0, 1, 5, 10, 11, 30, 100, 4096]))
    def crop_back(self, which: int, back: int) -> None:
        self.crop(self.choose(which), max(0, self.stores[self.choose(which)].length - back))

    @rule(which=st.integers(0, 3), length=st.sampled_from([0, 1, 3, 4, 13, 14, 40, 4095, 4096, 4097]))
    def crop_to(self, which: int, length: int) -> None:
        self.crop(self.choose(which), min(length, self.stores[self.choose(which)].length))

    def crop(self, i: int, length: int) -> None:
        self.stores[i].crop(length)
        self.held[i] = self.held[i][0][:, :length], self.held[i][1][:, :length]

    @invariant()
    def every_store_holds_its_tokens(self) -> None:
        for store, (keys, values) in zip(self.stores, self.held, strict=True):
            assert_holds(store, keys, values)
            if store.length:
                assert_attends_to_everything(store)


TestAnyOrder = pytest.mark.slow(StoreMachine.TestCase)
TestAnyOrder.settings = settings(max_examples=30, stateful_step_count=20, deadline=None, derandomize=True)


TINY = Config(K=8, L=20, sinks=4, recent=64, block=256, exact_below=300)
TINY_D = 16
GENERATED = 100_000


def planned_bytes(length: int, segments: int) -> tuple[int, int]:
    """Most bytes of rows and of index: one block of rows may be begun, a segment's table has 2^K + 1 bucket starts."""
    row = 2 * base.padded(TINY_D) * 4
    tables = TINY.L * (2 * length + segments * 4 * (2**TINY.K + 1))
    return row * (length + base.BLOCK_ROWS), tables


@pytest.mark.slow
def test_a_hundred_thousand_generated_tokens():
    keys, values = torch.randn(1, GENERATED, TINY_D), torch.randn(1, GENERATED, TINY_D)
    # In the prompt, early and late among the generated tokens, on both sides of the 64K keys of a segment, and last.
    planted = [100, 1000, 50_001, 65_539, 65_540, 70_000, GENERATED - 1000, GENERATED - 1]
    keys[:, planted] = 6 * torch.nn.functional.normalize(torch.randn(1, len(planted), TINY_D), dim=-1)
    store = store_of(keys[:, :300], values[:, :300], TINY)
    store.settle()
    query = torch.randn(1, 1, TINY_D)
    for i in range(300, GENERATED):
        decode_step(query, keys[:, i : i + 1], values[:, i : i + 1], [store], scale=0.25)
        if i % 5000 == 0 or i == GENERATED - 1:
            rows, index = planned_bytes(store.length, len(tables_of(store)))
            assert store.nbytes().rows <= rows
            assert store.nbytes().index <= index
            # Of 65536 keys, the whole 4096 and the younger ones.
            assert len(tables_of(store)) <= 2 * math.ceil(store.length / base.SEGMENT_ROWS)
            assert 64 <= store.length - store.indexed_to <= 64 + 256
    assert store.stats.steps == GENERATED - 300
    # No token was lost or changed, and each is found where the index says.
    assert_holds(store, keys, values)
    assert_attends_to_everything(store)

    stored = rows_of(store)[0][0]
    centres = torch.stack([segment.centre.tensor[0] for segment in store.index.segments])
    centred = stored - centres[torch.arange(len(stored)) // base.SEGMENT_ROWS]
    for position in planted:
        query = centred[position]
        state, info = attend_stores(20 * query[None, None], [store], scale=1.0)
        ids, log_u = info.ids[0][0], info.log_u[0][0]
        if position < store.indexed_to:
            # Along the query a key collides in every table: u = 1.
            at = (ids == position).nonzero()
            assert len(at) == 1
            assert log_u[at].abs().item() < 1e-4
        else:
            assert position not in ids.tolist()
        cosine = torch.nn.functional.cosine_similarity(centred[ids], query[None], dim=-1)
        right = log_inclusion(cosine, TINY.K, TINY.L, TINY.min_hits)
        # 1e-4 of the table; a float32 cosine errs by 3e-7 at most, the slope of log u is below 100 above -0.9.
        seen = cosine > -0.9
        assert (log_u - right)[seen].abs().max() < 1.5e-4
        # Sampled or exact, the key is so much longer along the query that its value is the answer.
        torch.testing.assert_close(state.output[0, 0], values[0, position], rtol=1e-3, atol=1e-3)


def test_segments_stay_few_and_small_whatever_is_appended():
    config = Config(K=3, L=2, sinks=0, recent=5, block=8, exact_below=0)
    store = KVStore(1, 8, torch.bfloat16, config, sampled=True)
    generator = torch.Generator().manual_seed(0)
    while store.length < 300_000:
        n = int(torch.randint(1, 3000, (1,), generator=generator))
        if store.length % 7 == 0:
            n *= 40  # a prompt of its own, longer than a segment
        x = torch.randn(1, n, 8, generator=generator).bfloat16()
        store.append(x, x)
        store.settle()
        counts = [segment.count for segment in tables_of(store)]
        assert max(counts) <= base.SEGMENT_ROWS
        assert sum(counts) == store.indexed_to
        assert len(counts) <= 2 * math.ceil(store.indexed_to / base.SEGMENT_ROWS)


def test_more_than_one_segment_samples_what_the_codes_say():
    config = Config(K=9, L=6, sinks=2, recent=3, exact_below=0, min_hits=2)
    keys, values = torch.randn(1, 140_000, 16).bfloat16(), torch.randn(1, 140_000, 16).bfloat16()
    store = store_of(keys, values, config)
    store.settle()
    assert len(tables_of(store)) >= 3
    assert_attends_to_everything(store)
    # Forks of it share the full segments, and crop into the first.
    fork = store.fork()
    fork.crop(65_000)
    assert len(tables_of(fork)) == 2
    assert_attends_to_everything(fork)
    fork.crop(40_000)
    assert_attends_to_everything(fork)
    assert_attends_to_everything(store)


@pytest.mark.slow
def test_generated_keys_are_found_with_the_probability_the_law_says():
    # The tables are fixed once drawn, so the law is about seeds: one store per seed, whose second half was generated.
    seeds, head_dim, planted = 300, 16, {70: 0.5, 80: 0.8, 90: 0.0}
    query = torch.nn.functional.normalize(torch.randn(head_dim), dim=0)
    across = torch.randn(head_dim)
    across = torch.nn.functional.normalize(across - (across @ query) * query, dim=0)
    keys, values = torch.randn(1, 120, head_dim), torch.randn(1, 120, head_dim)
    # Of the 7 strides that are indexed, 4 make the centre; the planted keys are none of them.
    centre = keys[:, :64].double().mean(1).float()
    for position, cosine in planted.items():
        keys[:, position] = cosine * query + (1 - cosine**2) ** 0.5 * across + centre
    found = dict.fromkeys(planted, 0)
    for seed in range(seeds):
        config = Config(K=5, L=12, seed=seed, sinks=1, recent=4, block=16, exact_below=0)
        store = store_of(keys[:, :60], values[:, :60], config)
        store.settle()
        for new_keys, new_values in zip(keys[:, 60:].split(20, 1), values[:, 60:].split(20, 1), strict=True):
            store.append(new_keys, new_values)
            store.index_due()
        assert store.indexed_to == 112
        _, info = attend_stores(query[None, None], [store], scale=1.0)
        for position in planted:
            found[position] += position in info.ids[0][0].tolist()
    for position, cosine in planted.items():
        u = log_inclusion(torch.tensor(cosine), config.K, config.L, config.min_hits).exp().item()
        assert 0.02 < u < 0.98
        # Five standard deviations of a binomial, exceeded with a chance below 1e-4.
        assert abs(found[position] - seeds * u) <= 5 * (seeds * u * (1 - u)) ** 0.5


def test_bytes_are_those_of_rows_and_tables():
    keys, values = tokens(5000)
    store = store_of(keys, values)
    row = 2 * base.padded(D) * 2
    # Appended at once: the second block is as large as the first; and the tail, of a stride.
    assert store.nbytes().rows == G * row * (2 * 4096 + 16)
    assert store.nbytes().index == 0
    store.settle()
    # Two tables, of 4096 keys and of the younger ones, and a centre.
    tables = SMALL.L * (2 * (4990 // 16 * 16) + 2 * 4 * (2**SMALL.K + 1))
    assert store.nbytes().index == G * (tables + 4 * D)
    assert store.nbytes().total == store.nbytes().rows + store.nbytes().index


@pytest.mark.parametrize("n", [1, 256, 257, 1000, 4096])
def test_short_stores_take_little_memory(n):
    store = store_of(*tokens(n))
    row = G * 2 * base.padded(D) * 2
    assert store.nbytes().rows <= row * max(256, 2 * n)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_rows_that_are_not_finite_are_refused_and_nothing_appended(where, poison, dtype):
    keys, values = tokens(20, dtype)
    store = store_of(keys, values)
    bad = {"keys": keys.clone(), "values": values.clone()}
    bad[where][1, 19, D - 1] = poison
    with pytest.raises(ValueError, match=rf"^{where} has entries that are not finite"):
        store.append(bad["keys"], bad["values"])
    assert_holds(store, keys, values)


@pytest.mark.parametrize("where", ["keys", "values"])
def test_rows_too_large_for_the_stores_dtype_are_refused(where):
    keys, values = tokens(20, torch.float16)
    store = store_of(keys, values)
    large = {"keys": keys.float(), "values": values.float()}
    large[where][1, 19, D - 1] = 7e4  # the largest float16 is 65504
    with pytest.raises(ValueError, match=rf"^{where} has entries that are not finite, or too large for the store's "):
        store.append(large["keys"], large["values"])
    assert_holds(store, keys, values)


def test_nothing_is_appended_by_nothing():
    keys, values = tokens(5)
    store = store_of(keys, values)
    with pytest.raises(ValueError, match=r"^keys has shape \(2, 0, 24\); there must be at least one token$"):
        store.append(keys[:, :0], values[:, :0])


def test_rows_that_do_not_fit_are_refused_in_one_line():
    keys, values = tokens(5)
    store = store_of(keys, values)
    wrong = [
        (keys[:1], values, r"^keys has shape \(1, 5, 24\); expected \(2, T, 24\)"),
        (keys, values[:, :4], r"^values has shape \(2, 4, 24\); expected \(2, T, 24\)"),
        (keys[0], values[0], r"^keys has shape \(5, 24\); expected \(2, T, 24\)"),
        (keys[..., :23], values[..., :23], r"^keys has shape \(2, 5, 23\); expected \(2, T, 24\)"),
        (keys.long(), values, r"^keys has dtype torch.int64; expected a floating point type$"),
        (keys, values.bool(), r"^values has dtype torch.bool; expected a floating point type$"),
    ]
    for k, v, message in wrong:
        with pytest.raises(ValueError, match=message):
            store.append(k, v)
    assert_holds(store, keys, values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 24, torch.float32), r"^kv_heads=0 must be at least 1$"),
        ((2, 0, torch.float32), r"^head_dim=0 is out of range; allowed: 1 to 512$"),
        ((2, 513, torch.float32), r"^head_dim=513 is out of range; allowed: 1 to 512$"),
        ((2, 24, torch.float64), r"^dtype=torch.float64 is not supported; allowed: .*"),
    ],
)
def test_stores_that_kernels_cannot_read_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        KVStore(*arguments, SMALL, sampled=True)
