"""The samplers for comparison: counts, closed forms, unbiasedness, and that a store and plain tensors agree."""

import math

import pytest
import torch
from torch import Tensor

import magicpig
from magicpig import samplers
from magicpig.attention.step import attend_stores, decode_step
from magicpig.config import SAMPLERS, Config
from magicpig.kernels.attend.reference import attend as attend_rows
from magicpig.kernels.attend.reference import with_sink_logits
from magicpig.kernels.pages import PAGE_ROWS, page_ranges, upper_bounds
from magicpig.samplers import comparison
from magicpig.settings import DrawPolicy, IndexSpec
from magicpig.store import KVStore
from magicpig.types import Sample, StepInfo

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = 8


def attend(*tensors: object, **settings: object) -> tuple[Tensor, Tensor, StepInfo]:
    return magicpig.attend(*tensors, **{"block": BLOCK, **settings})


# A normal deviate beyond five standard errors has probability 6e-7; no test below looks at more than a few hundred.
STANDARD_ERRORS = 5.0

CHOOSING = samplers.CHOOSING
SAMPLING = ["oracle", "oracle-replacement", "uniform-tail"]  # unbiased; the others leave rows out for good
WITHOUT_BODY = ["lsh", "full", "window"]
G, R, D = 2, 3, 24
H = G * R


def logits_of(H: int, n: int, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(H, n, generator=torch.Generator().manual_seed(1))


def chosen(name: str, logits: Tensor, rows: int, position: int = 0) -> Tensor:
    return comparison.RULES[name][0](logits, rows, comparison.generator_at(0, 0, 0, position))


def draw(
    config: Config, query: Tensor, keys: list[Tensor], *, position: int, scale: float, sinks: int = 0
) -> list[Sample]:
    """The rows that the heads (H, D) read of keys, piece by piece, but for the first `sinks`."""
    sampler = samplers.sampler_of(IndexSpec.of(config), query.shape[1])
    body = samplers.Body(keys, sinks, position)
    return sampler.draw(query, body, DrawPolicy.of(config), scale=scale, softcap=None)


def read(log_u: Tensor) -> Tensor:
    return log_u < math.inf


def tensors(N: int, dtype: torch.dtype = torch.float32, B: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A query, keys around a common centre, and values."""
    query, keys, values = torch.randn(B, H, 1, D), torch.randn(B, G, N, D), torch.randn(B, G, N, D)
    return 2 * query.to(dtype), (keys + torch.linspace(-1, 1, D)).to(dtype), values.to(dtype)


def test_every_name_is_one_that_is_known():
    assert sorted((*CHOOSING, *WITHOUT_BODY, "sketch")) == sorted(SAMPLERS)


# --- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "body", "rows"),
    [
        (512, 10_000, 512),
        (512, 100, 100),
        (0.02, 10_000, 200),
        (0.02, 7, 1),
        (1, 50, 1),
        (0.999, 1000, 999),
        (2.6, 9, 3),
    ],
)
def test_a_budget_is_rows_or_a_share(budget, body, rows):
    assert DrawPolicy.of(Config(budget=budget)).budget_for(body) == rows


@pytest.mark.parametrize("name", comparison.RULES)
@pytest.mark.parametrize("rows", [1, 2, 15, 299])
def test_as_many_rows_as_asked_for(name, rows):
    counts = read(chosen(name, logits_of(H, 300), rows)).sum(1)
    if name == "oracle-replacement":  # some are drawn more than once
        assert ((counts >= 1) & (counts <= rows)).all()
    else:
        assert counts.eq(rows).all()


@pytest.mark.parametrize(
    ("n", "rows"), [(1, 1), (15, 1), (16, 1), (17, 1), (17, 16), (33, 17), (100, 16), (100, 17), (100, 99)]
)
def test_quest_reads_whole_pages(n, rows):
    pages = -(-n // PAGE_ROWS)
    log_u = comparison.quest(logits_of(H, pages), rows, n)
    assert log_u.shape == (H, n)
    missing = pages * PAGE_ROWS - n  # of the last page
    for head in read(log_u):
        whole = [bool(page.all()) for page in head.split(PAGE_ROWS)]
        assert whole == [bool(page.any()) for page in head.split(PAGE_ROWS)]
        assert sum(whole) == -(-rows // PAGE_ROWS)
        assert int(head.sum()) in (sum(whole) * PAGE_ROWS, sum(whole) * PAGE_ROWS - missing)


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_a_budget_of_the_whole_body_is_exact_attention(name, kernels):
    query, keys, values = tensors(300)
    full, full_lse, _ = attend(query, keys, values, sampler="full", kernels=kernels)
    for budget in (232 - 4, 1e9):
        output, lse, info = attend(query, keys, values, sampler=name, budget=budget, kernels=kernels)
        torch.testing.assert_close(output, full, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, full_lse, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(ids, torch.arange(4, 232)) for heads in info.ids for ids in heads)
        assert all(log_u.eq(0).all() for heads in info.log_u for log_u in heads)


# --- which rows, and how probable -------------------------------------------------------------------------------------


def test_topk_takes_the_largest_logits():
    logits = logits_of(H, 300)
    log_u = chosen("topk", logits, 20)
    for head, each in zip(logits.tolist(), read(log_u), strict=True):
        right = sorted(range(300), key=lambda i: -head[i])[:20]
        assert each.nonzero()[:, 0].tolist() == sorted(right)
    assert log_u[read(log_u)].eq(0).all()


@pytest.mark.parametrize("n", [1, 15, 16, 17, 100])
def test_pages_bound_every_key(n):
    query, keys = torch.randn(H, D, dtype=torch.float64), torch.randn(G, n, D, dtype=torch.float64)
    bounds = upper_bounds(query, page_ranges(keys))
    assert bounds.shape == (H, -(-n // PAGE_ROWS))
    products = (query.view(G, R, D) @ keys.mT).view(H, n)
    for p, page in enumerate(products.split(PAGE_ROWS, 1)):
        assert (bounds[:, p, None] >= page - 1e-12).all()
        # No key need reach the bound, but the best of each coordinate together do: brute force.
        here = keys[:, p * PAGE_ROWS : (p + 1) * PAGE_ROWS].repeat_interleave(R, 0) * query[:, None]
        torch.testing.assert_close(bounds[:, p], here.amax(1).sum(-1))


def test_quest_takes_the_pages_of_the_largest_bounds():
    query, keys = torch.randn(H, D), torch.randn(G, 200, D)
    config = Config(sampler="quest", budget=64)
    drawn = draw(config, query, [keys[:, :70], keys[:, 70:]], position=0, scale=1.0)
    bounds = upper_bounds(query, page_ranges(keys))
    for sample, bound in zip(drawn, bounds.tolist(), strict=True):
        right = sorted(sorted(range(len(bound)), key=lambda p: -bound[p])[:4])
        assert [p for p in range(len(bound)) if (sample.ids // PAGE_ROWS == p).any()] == right


@pytest.mark.parametrize("rows", [1, 7, 50, 199])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0, 60.0])
def test_inclusion_is_proportional_up_to_one_and_sums_to_the_rows(spread, rows):
    weights = logits_of(H, 200, spread).double().softmax(1).clamp(min=torch.finfo(torch.float64).tiny)
    u = comparison.inclusion(weights, rows)
    assert (u <= 1).all()
    torch.testing.assert_close(u.sum(1), torch.full((H,), float(rows), dtype=torch.float64), rtol=1e-12, atol=0)
    for w, each in zip(weights, u, strict=True):
        free = each < 1
        c = (each / w)[free]
        torch.testing.assert_close(c, c[:1].expand_as(c), rtol=1e-12, atol=0)
        assert (w[~free] * c[0] >= 1 - 1e-12).all()  # the certain ones would be above one with the same c


@pytest.mark.slow
def test_systematic_sampling_includes_with_the_given_probability():
    u = torch.rand(3, 40, dtype=torch.float64) ** 2
    u[:, ::9] = 1.0
    draws = 4000
    drawn = torch.stack(
        [comparison.systematic(u, comparison.generator_at(5, 0, 0, position)) for position in range(draws)]
    )
    frequency = drawn.double().mean(0)
    assert ((frequency - u).abs() <= STANDARD_ERRORS * (u * (1 - u) / draws).sqrt()).all()
    assert (drawn[:, u == 1]).all()
    counts, total = drawn.sum(2), u.sum(1)
    assert ((counts == total.floor()) | (counts == total.ceil())).all()


def test_the_oracle_knows_the_denominator():
    # Every uncertain row counts 1 / c, the same, and there are always as many of them.
    logits = logits_of(H, 500).double()
    for name in ("oracle", "oracle-replacement"):
        log_u = chosen(name, logits, 40)
        torch.testing.assert_close((logits - log_u).logsumexp(1), logits.logsumexp(1), rtol=1e-12, atol=1e-12)


def test_drawing_with_replacement_counts_every_draw():
    logits, rows = logits_of(H, 50).double(), 40
    log_u = chosen("oracle-replacement", logits, rows)
    times = rows * (logits.log_softmax(1) - log_u).exp()
    torch.testing.assert_close(times, times.round(), rtol=0, atol=1e-9)
    assert times.sum(1).round().eq(rows).all()
    assert (times > 1.5).any()


def test_a_uniform_tail_is_the_largest_and_any_others():
    logits = logits_of(H, 300)
    log_u = chosen("uniform-tail", logits, 41)
    certain = log_u == 0
    assert torch.equal(certain, read(comparison.topk(logits, 20)))
    assert torch.equal(log_u[read(log_u) & ~certain], torch.full((21 * H,), math.log(21 / 280)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLING)
def test_sums_are_unbiased(name):
    n, rows, draws = 200, 30, 3000
    logits = logits_of(H, n).double()
    values = torch.randn(n, dtype=torch.float64) + 0.5
    right = torch.stack([logits.exp().sum(1), logits.exp() @ values])
    sums = []
    for position in range(draws):
        weights = (logits - chosen(name, logits, rows, position)).exp()
        sums.append(torch.stack([weights.sum(1), weights @ values]))
    drawn = torch.stack(sums)
    error = drawn.std(0) / math.sqrt(draws)
    # The oracle's denominator does not vary at all.
    assert ((drawn.mean(0) - right).abs() <= STANDARD_ERRORS * error + 1e-9 * right.abs()).all()
    # The bound means something: the numerator is known to a few percent, and top-k is nowhere near.
    assert (error[1] < 0.05 * right[0]).all()
    biased = (logits - chosen("topk", logits, rows)).exp()
    assert ((biased.sum(1) - right[0]).abs() > STANDARD_ERRORS * error[0] + 1e-9 * right[0]).all()


@pytest.mark.parametrize("name", SAMPLING)
def test_what_is_drawn_depends_on_seed_and_position_alone(name):
    query, body = torch.randn(H, D), [torch.randn(G, 300, D)]

    def drawn(seed: int, position: int) -> list[list[int]]:
        config = Config(sampler=name, budget=40, seed=seed)
        return [s.ids.tolist() for s in draw(config, query, body, position=position, scale=0.3)]

    torch.manual_seed(3)
    first = drawn(1, 1000)
    torch.manual_seed(4)
    assert drawn(1, 1000) == first
    others = [drawn(1, 1001), drawn(2, 1000), drawn(1000, 1)]
    assert all(other != first for other in others)


@pytest.mark.parametrize("name", CHOOSING)
def test_extreme_logits_are_no_trouble(name):
    # One row has all the weight there is; the others underflow.
    body = [torch.randn(G, 100, D)]
    query = torch.randn(H, D)
    config = Config(sampler=name, budget=10)
    for sample in draw(config, query, body, position=0, scale=1e4):
        assert sample.log_u.isfinite().all()
        assert len(sample.ids) >= 1
    for sample in draw(config, 0 * query, body, position=0, scale=1.0):
        assert sample.log_u.isfinite().all()
        assert len(sample.ids) >= (1 if name == "oracle-replacement" else 10)


# --- through magicpig.attend ------------------------------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("softcap", [None, 2.0], ids=str)
@pytest.mark.parametrize("name", [*CHOOSING, "window"])
def test_a_store_and_plain_tensors_choose_the_same(name, softcap, dtype):
    query, keys, values = tensors(300, dtype)
    settings = {"sampler": name, "budget": 40, "softcap": softcap, "seed": 3, "sinks": 7, "recent": 33}
    output, lse, info = attend(query, keys, values, kernels="cpu", **settings)
    right, right_lse, right_info = attend(query, keys, values, kernels="reference", **settings)
    for b in range(2):
        for h in range(H):
            assert torch.equal(info.ids[b][h], right_info.ids[b][h])
            torch.testing.assert_close(info.log_u[b][h].double(), right_info.log_u[b][h].double(), rtol=0, atol=1e-6)
    assert torch.equal(info.rows, right_info.rows)
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    torch.testing.assert_close(output, right, rtol=2 * rounding, atol=2 * rounding)
    torch.testing.assert_close(lse, right_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [*CHOOSING, "window"])
def test_the_estimate_is_what_info_says_was_read(name):
    N = 300
    query, keys, values = tensors(N, torch.float64)
    output, lse, info = attend(query, keys, values, sampler=name, budget=40, scale=0.3)
    exact = torch.tensor([*range(4), *range((N - 64) // BLOCK * BLOCK, N)])
    for b in range(2):
        for h in range(H):
            rows = torch.cat([exact, info.ids[b][h]])
            log_u = torch.cat([torch.zeros(len(exact)), info.log_u[b][h]])
            logits = 0.3 * keys[b, h // R, rows] @ query[b, h, 0] - log_u
            torch.testing.assert_close(output[b, h, 0], logits.softmax(0) @ values[b, h // R, rows])
            torch.testing.assert_close(lse[b, h], logits.logsumexp(0))


def test_too_short_for_a_body_is_exact():
    query, keys, values = tensors(68)
    full, _, _ = attend(query, keys, values, sampler="full")
    for name in SAMPLERS:
        for kernels in ("cpu", "reference"):
            output, _, info = attend(query, keys, values, sampler=name, kernels=kernels)
            torch.testing.assert_close(output, full, rtol=1e-5, atol=1e-5)
            assert info.rows.eq(0).all()


@pytest.mark.parametrize("name", [*CHOOSING, "window"])
@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_there_may_be_no_exact_rows(name, kernels):
    query, keys, values = tensors(256)
    output, lse, info = attend(query, keys, values, sampler=name, sinks=0, recent=0, budget=20, kernels=kernels)
    if name == "window":
        assert output.eq(0).all()
        assert lse.eq(-math.inf).all()
    else:
        assert output.isfinite().all()
        assert info.rows.gt(0).all()


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_hashing_without_centring_hashes_keys_as_they_are(kernels):
    query, keys, values = tensors(400)
    far = keys - 4 * torch.randn(1, G, 1, D)
    settings = {"K": 4, "L": 20, "kernels": kernels}
    _, _, with_mean = attend(query, far, values, **settings)
    raw, raw_lse, without = attend(query, far, values, centre=False, **settings)
    assert not torch.equal(with_mean.rows, without.rows)
    # Centred keys are found the same wherever they are; uncentred keys are not.
    _, _, moved = attend(query, far + 1.0, values, **settings)
    assert [len(i) for i in moved.ids[0]] == pytest.approx([len(i) for i in with_mean.ids[0]], abs=2)
    right, right_lse, info = attend(query.double(), far.double(), values.double(), centre=False, K=4, L=20)
    same = [torch.equal(a, b) for x, y in zip(info.ids, without.ids, strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(same) >= len(same) - 2  # a projection within rounding of zero may fall on either side
    for i, equal in enumerate(same):
        if equal:
            b, h = divmod(i, H)
            torch.testing.assert_close(raw[b, h].double(), right[b, h], rtol=0, atol=1e-3)
            torch.testing.assert_close(raw_lse[b, h].double(), right_lse[b, h], rtol=0, atol=1e-3)


# --- through stores ---------------------------------------------------------------------------------------------------


def store_of(keys: Tensor, values: Tensor, config: Config) -> KVStore:
    store = KVStore(keys.shape[0], keys.shape[2], keys.dtype, config, sampled=True)
    store.append(keys, values)
    return store


def config_of(name: str, **settings) -> Config:
    return Config(
        **{"sampler": name, "budget": 30, "sinks": 3, "recent": 10, "block": 16, "exact_below": 40} | settings
    )


@pytest.mark.parametrize("name", [*CHOOSING, "window"])
def test_decoding_goes_on_as_one_call_over_all_tokens(name):
    """Tokens leave the recent window for the body block by block; whatever was appended how, the same is read."""
    N, start = 150, 20
    query, keys, values = torch.randn(N, H, D), torch.randn(G, N, D), torch.randn(G, N, D)
    config = config_of(name)
    store = store_of(keys[:, :start], values[:, :start], config)
    bodies = set()
    for t in range(start, N):
        state = decode_step(query[t : t + 1], keys[None, :, t], values[None, :, t], [store], scale=0.2)
        body = store.indexed_to - 3 if store.settled else 0
        bodies.add(body)
        k, v = keys[:, : t + 1], values[:, : t + 1]
        samples = None
        if body and name != "window":
            samples = draw(config, query[t], [k[:, : 3 + body]], position=t + 1, scale=0.2, sinks=3)
        rows_of = [[*range(min(3, t + 1)), *range(3 + body, t + 1)]] * H
        for h in range(H):
            rows = torch.tensor(rows_of[h])
            log_u = torch.zeros(len(rows))
            if samples is not None:
                rows = torch.cat([rows, samples[h].ids])
                log_u = torch.cat([log_u, samples[h].log_u])
            right = attend_rows(query[t, h : h + 1], k[h // R, rows], v[h // R, rows], scale=0.2, log_u=log_u)
            torch.testing.assert_close(state.output[0, h], right.output[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(state.lse[0, h], right.lse[0], rtol=1e-5, atol=1e-5)
    assert len(bodies) == 9  # none, and eight


@pytest.mark.parametrize("name", [*CHOOSING, "window"])
def test_statistics_count_what_was_read(name):
    keys, values = torch.randn(G, 203, D), torch.randn(G, 203, D)
    store = store_of(keys, values, config_of(name))
    store.settle()
    total, largest = 0, 0.0
    for _ in range(3):
        _, info = attend_stores(torch.randn(1, H, D), [store], scale=0.2)
        counts = [len(ids) for ids in info.ids[0]]
        total += sum(counts)
        largest = max(largest, max(counts) / 189)
    stats = store.stats
    assert (stats.steps, stats.sampled_rows, stats.body_rows) == (3, total, 3 * H * 189)
    assert stats.max_share == largest
    assert (total > 0) == (name != "window")
    if name in ("topk", "oracle", "uniform-tail"):
        assert total == 3 * H * 30


@pytest.mark.parametrize("name", [*CHOOSING, "window"])
def test_rows_are_kept_as_they_came(name):
    keys, values = torch.randn(G, 100, D).bfloat16() + 3, torch.randn(G, 100, D).bfloat16()
    store = store_of(keys, values, config_of(name))
    fork = store.fork()
    store.settle()
    assert store.settled
    assert torch.equal(torch.cat([k for k, _ in store.blocks()], 1), keys)
    assert store.blocks().__next__()[0].data_ptr() == fork.blocks().__next__()[0].data_ptr()
    assert (store.nbytes().index > 0) == (name == "quest")


def test_pages_are_those_of_the_body_whatever_happened():
    config = config_of("quest")
    keys, values = torch.randn(G, 5000, D), torch.randn(G, 5000, D)

    def assert_right(store: KVStore, keys: Tensor) -> None:
        pages = store.index.tensors().get("pages", torch.empty(2, G, 0, D))
        assert torch.equal(pages, page_ranges(keys[:, : store.indexed_to]))

    store = store_of(keys[:, :4200], values[:, :4200], config)  # pages lie across blocks of rows
    store.settle()
    assert_right(store, keys)
    for length in (4300, 4333, 5000):
        store.append(keys[:, store.length : length], values[:, store.length : length])
        store.index_due()
        assert store.indexed_to == (length - 10) // 16 * 16
        assert_right(store, keys)
    fork = store.fork()
    for length in (4900, 4700, 50, 13, 5):
        fork.crop(length)
        assert fork.indexed_to == (max(0, length - 10) // 16 * 16 if length >= 40 else 0)
        assert_right(fork, keys)
    others = torch.randn(2, G, 100, D)
    fork.append(*others)
    fork.index_due()
    assert_right(fork, torch.cat([keys[:, :5], others[0]], 1))
    assert store.indexed_to == 4976
    assert_right(store, keys)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("name", [*CHOOSING, "window"])
def test_a_sequence_does_not_see_its_batch(name, dtype):
    """Also beside sequences too short to have a body."""
    config = config_of(name)
    stores = [store_of(torch.randn(G, n, D), torch.randn(G, n, D), config) for n in (60, 20, 85)]
    alone = [store.fork() for store in stores]
    query, keys, values = torch.randn(3, H, D).to(dtype), torch.randn(3, G, D).to(dtype), torch.randn(3, G, D).to(dtype)
    rule = {"scale": 0.2, "softcap": 3.0, "sink_logits": torch.linspace(-1, 1, H)}
    together = decode_step(query, keys, values, stores, **rule)
    assert together.output.dtype == dtype
    for b, store in enumerate(alone):
        each = decode_step(query[b : b + 1], keys[b : b + 1], values[b : b + 1], [store], **rule)
        assert torch.equal(each.output[0], together.output[b])
        assert torch.equal(each.lse[0], together.lse[b])
        assert store.stats == stores[b].stats


@pytest.mark.parametrize("name", [*CHOOSING, "window"])
def test_sink_logits_join_once(name):
    store = store_of(torch.randn(G, 100, D), torch.randn(G, 100, D), config_of(name))
    store.settle()
    query, sinks = torch.randn(1, H, D), torch.linspace(-2, 4, H)
    without, _ = attend_stores(query, [store.fork()], scale=0.2)
    state, _ = attend_stores(query, [store], scale=0.2, sink_logits=sinks)
    right = with_sink_logits(without, sinks[None])
    torch.testing.assert_close(state.output, right.output)
    torch.testing.assert_close(state.lse, right.lse)


@pytest.mark.parametrize("name", CHOOSING)
def test_unfinite_input_is_refused_before_anything_is_stored(name):
    stores = [store_of(torch.randn(G, 100, D), torch.randn(G, 100, D), config_of(name)) for _ in range(2)]
    good = torch.randn(2, H, D), torch.randn(2, G, D), torch.randn(2, G, D)
    for i in range(3):
        bad = [x.clone() for x in good]
        bad[i][1, 0, 0] = math.nan
        with pytest.raises(ValueError, match="not finite"):
            decode_step(*bad, stores, scale=0.2)
        assert [store.length for store in stores] == [101 + i, 100]  # the other one was served
