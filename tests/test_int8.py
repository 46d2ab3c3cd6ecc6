"""Keys and values in whole numbers (kv_dtype="int8"): what a store keeps of them, and what attention makes of that."""

import math

import pytest
import torch
from torch import Tensor

from magicpig import Config, attend
from magicpig.attention.prefill import prefill
from magicpig.attention.step import attend_stores, decode_step
from magicpig.kernels import base
from magicpig.kernels.attend import reference as rows
from magicpig.store import KVStore
from magicpig.store.planner import LayerShape, plan
from magicpig.studies.bench.synthetic import synthetic_context
from magicpig.types import AttentionState

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"kv_dtype": "int8", "K": 4, "L": 20, "budget": 60, "sinks": 3, "recent": 20, "block": 32, "exact_below": 60}
SAMPLERS = ["lsh", "sketch", "full"]


def make_store(G: int, D: int, dtype: torch.dtype = torch.float32, **settings: object) -> KVStore:
    return KVStore(G, D, dtype, Config(**{**SMALL, **settings}), sampled=True)


def context(G: int, n: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys of which a few coordinates are large in all, as trained ones have them, and values."""
    centre = torch.where(torch.rand(G, 1, D) < 0.1, 20.0, 1.0) * torch.randn(G, 1, D)
    return (torch.randn(G, n, D) + centre).to(dtype), torch.randn(G, n, D).to(dtype)


def read(store: KVStore) -> tuple[Tensor, Tensor]:
    """All keys and values, (G, N, D)."""
    keys, values = (torch.cat(x, 1).float() for x in zip(*store.blocks(), strict=True))
    return keys, values


def assert_holds(store: KVStore, keys: Tensor, values: Tensor, times: float = 1.0) -> None:
    """Each entry is within half a scale of its own, and those of a stride that is not full yet are as they came.

    times: more than that, where a crop has cut a stride whose rows had been rounded.
    """
    assert store.length == keys.shape[1]
    stored_keys, stored_values = read(store)
    stride = store.config.block
    whole = store.length // stride * stride
    off = [block - block[:, :stride].mean(1, keepdim=True) * store.config.centre for block in keys.split(4096, 1)]
    for stored, own, scale in (
        (stored_keys, keys, half_scale(torch.cat(off, 1))),
        (stored_values, values, half_scale(values)),
    ):
        excess = (stored - own).abs() - times * scale
        assert whole == 0 or float(excess[:, :whole].max()) <= 1e-4
        assert times > 1 or torch.equal(stored[:, whole:], own[:, whole:])


def half_scale(x: Tensor) -> Tensor:
    return x.abs().amax(-1, keepdim=True) / 254


def test_a_store_keeps_what_is_appended_decoded_cropped_and_forked(isa):
    keys, values = context(2, 400, 40)
    store = make_store(2, 40)
    store.append(keys[:, :50], values[:, :50])
    assert not store.settled
    assert_holds(store, keys[:, :50], values[:, :50])
    for t in range(50, 200):
        decode_step(torch.randn(1, 4, 40), keys[None, :, t], values[None, :, t], [store], scale=0.1)
    assert store.settled
    assert_holds(store, keys[:, :200], values[:, :200])
    fork = store.fork()
    fork.append(keys[:, 200:300], values[:, 200:300])
    store.crop(150)
    store.append(keys[:, 300:], values[:, 300:])
    assert_holds(fork, keys[:, :300], values[:, :300])
    kept = torch.cat([keys[:, :150], keys[:, 300:]], 1), torch.cat([values[:, :150], values[:, 300:]], 1)
    assert_holds(store, *kept, times=2.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunks", [[1] * 600, [31, 33, 32, 504], [100, 500], [256, 344]], ids=lambda c: str(c[:3]))
def test_what_is_stored_depends_on_the_tokens_alone(chunks, dtype):
    keys, values = context(2, 4700, 24, dtype)
    whole, parts = make_store(2, 24, dtype), make_store(2, 24, dtype)
    whole.append(keys, values)
    at = 4700 - sum(chunks)
    parts.append(keys[:, :at], values[:, :at])
    for n in chunks:
        if n == 1:
            query = torch.randn(1, 4, 24).to(dtype)
            decode_step(query, keys[None, :, at], values[None, :, at], [parts], scale=0.1)
        else:
            parts.append(keys[:, at : at + n], values[:, at : at + n])
        at += n
    for store in (whole, parts):
        store.settle()
    for g in range(2):
        for a, b in zip(whole.rows(g), parts.rows(g), strict=True):
            n = min(len(a), len(b), 4672)  # 4700 without what does not fill a stride
            assert torch.equal(a[:n], b[:n])
    assert torch.equal(read(whole)[0], read(parts)[0])
    query = torch.randn(1, 4, 24).to(dtype)
    (x, x_info), (y, y_info) = (attend_stores(query, [store], scale=0.1) for store in (whole, parts))
    assert torch.equal(x.output, y.output)
    assert torch.equal(x_info.ids[0][3], y_info.ids[0][3])
    assert torch.equal(x_info.log_u[0][3], y_info.log_u[0][3])


def test_without_centring_keys_are_rounded_as_they_come():
    keys, values = context(1, 300, 32)
    store = make_store(1, 32, centre=False)
    store.append(keys, values)
    store.settle()
    assert_holds(store, keys, values)


@pytest.mark.parametrize("softcap", [None, 3.0], ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("R", "D"), [(1, 64), (3, 40), (4, 128), (7, 80)])
def test_a_step_is_weighted_attention_over_the_rows_as_they_are(R, D, sampler, softcap, isa):
    keys, values = context(2, 700, D)
    store = make_store(2, D, sampler=sampler)
    store.append(keys, values)
    store.settle()
    query = torch.randn(2 * R, D) * 2
    state, info = attend_stores(query[None], [store], scale=D**-0.5, softcap=softcap)
    stored_keys, stored_values = (x.double() for x in read(store))
    indexed_to = store.indexed_to if store.settled else 3
    exact = torch.cat([torch.arange(3), torch.arange(indexed_to, 700)])
    errors = []
    for h in range(2 * R):
        g, q = h // R, query[h : h + 1].double()
        settings = {"scale": D**-0.5, "softcap": softcap}
        ids, log_u = info.ids[0][h], info.log_u[0][h].double()
        drawn = stored_keys[g, ids], stored_values[g, ids]
        own = rows.attend(q, *drawn, log_u=log_u, **settings)
        right = rows.merge([rows.attend(q, stored_keys[g, exact], stored_values[g, exact], **settings), own])
        output, lse = state.output[0, h : h + 1].double(), state.lse[0, h : h + 1]
        # As for rows of floats: tests/test_decode.py. log u of "lsh" is captured, so its table does not matter.
        assert float((output - right.output).norm() / right.output.norm()) <= 2e-5
        assert float((lse - right.lse).abs()) <= 2e-5 * max(1.0, float(right.lse.abs()))
        errors.append(float(rows.predicted_error(right, q, *drawn, log_u, **settings)))
    if sampler != "full":
        assert sum(len(ids) for ids in info.ids[0]) > 0
        torch.testing.assert_close(info.predicted_error[0], torch.tensor(errors), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_request_has_the_same_bits_in_any_company_and_on_any_pool(sampler, pool):
    stores = []
    for n in (90, 700, 4200):
        store = make_store(2, 40, torch.bfloat16, sampler=sampler)
        store.append(*context(2, n, 40, torch.bfloat16))
        store.settle()
        stores.append(store)
    query = torch.randn(3, 6, 40).bfloat16()
    together, _ = attend_stores(query, stores, scale=0.2)
    for b, store in enumerate(stores):
        alone, _ = attend_stores(query[b : b + 1], [store], scale=0.2)
        assert torch.equal(alone.output[0], together.output[b])
        assert torch.equal(alone.lse[0], together.lse[b])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rounding_adds_little_error_to_a_step(head_dim):
    data = synthetic_context(8192, heads=8, kv_heads=2, head_dim=head_dim, steps=4, dtype=torch.bfloat16, seed=0)
    stores = {}
    for kv_dtype in ("model", "int8"):
        stores[kv_dtype] = KVStore(2, head_dim, torch.bfloat16, Config(sampler="full", kv_dtype=kv_dtype), sampled=True)
        stores[kv_dtype].append(data.keys, data.values)
    added = []
    for query in data.queries:
        right, rounded = (attend_stores(query[None].float(), [s], scale=data.scale)[0] for s in stores.values())
        added.append((rounded.output - right.output).norm(dim=-1) / right.output.norm(dim=-1))
    # A head that gives half of its weight to one token has the rounding of that token's logit in all of its output.
    assert float(torch.stack(added).mean()) <= 1.5e-2
    assert float(torch.stack(added).max()) <= 4e-2
    whole = {name: sum(rows.nbytes for rows in store.rows(0)) for name, store in stores.items()}
    assert whole["int8"] <= 0.54 * whole["model"]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("chunks", [[4500], [100, 4400], [1, 4000, 499], [4096, 1, 403]], ids=str)
def test_prompts_are_read_from_the_rows_in_any_chunks(chunks, sampler):
    keys, values = context(2, 4500, 24)
    query = torch.randn(4, 4500, 24)
    store, first = make_store(2, 24, sampler=sampler), 0
    for k, v in zip(keys.split(chunks, 1), values.split(chunks, 1), strict=True):
        state = prefill(query[:, first : first + k.shape[1]], k, v, store, scale=0.2)
        rounded = read(store)
        # The last of the chunk, each over its own stride as it came and those before it as they are kept.
        for p in range(max(first, first + k.shape[1] - 40), first + k.shape[1]):
            own = p // store.config.block * store.config.block
            seen = [
                torch.cat([x[:, :own], raw[:, own : p + 1]], 1) for x, raw in zip(rounded, (keys, values), strict=True)
            ]
            right = over_all(query[:, p : p + 1], *seen, scale=0.2)
            torch.testing.assert_close(state.output[:, p - first, None].double(), right.output, atol=5e-5, rtol=5e-5)
            torch.testing.assert_close(state.lse[:, p - first, None].double(), right.lse, atol=5e-5, rtol=5e-5)
        first += k.shape[1]


def over_all(query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> AttentionState:
    """Causal attention of the T newest tokens, (H, T, D), in float64."""
    (H, T, _), N, group = query.shape, keys.shape[1], query.shape[0] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(group, 0) for x in (keys, values))
    logits = scale * query.double() @ keys.mT
    later = torch.arange(N) > torch.arange(N - T, N)[:, None]
    logits = logits.masked_fill(later, -math.inf)
    assert logits.shape == (H, T, N)
    return AttentionState(logits.softmax(-1) @ values, logits.logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{"sampler": "full"}, {"K": 1, "L": 60}, {"sampler": "sketch", "budget": 2000}])
def test_functional_kernels_agree(settings, dtype):
    # All rows are read, so that both look at the same ones.
    keys, values = context(2, 500, 40, dtype)
    query = torch.randn(1, 6, 1, 40).to(dtype)
    shared = {**settings, "kv_dtype": "int8", "block": 16}
    results = [attend(query, keys[None], values[None], kernels=kernels, **shared) for kernels in ("cpu", "reference")]
    exact = attend(query.double(), keys[None].double(), values[None].double(), sampler="full")[0]
    for output, _, _ in results:
        # Half a scale in every coordinate, 3 / 254 of a standard deviation, and the rounding of the output.
        assert float(((output.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max()) < 0.03
    assert not torch.equal(results[0][0].double(), exact)


def test_settings_that_rows_of_whole_numbers_do_not_serve():
    with pytest.raises(
        ValueError, match=r"^kv_dtype='int8': sampler='topk' does not read it; allowed: lsh, sketch, full$"
    ):
        Config(kv_dtype="int8", sampler="topk")
    with pytest.raises(ValueError, match=r"^kv_dtype='int4'"):
        Config(kv_dtype="int4")
    store = make_store(1, 32)
    store.append(*context(1, 10, 32))
    for other in (Config(), Config(kv_dtype="int8", centre=False, block=32), Config(kv_dtype="int8", block=64)):
        with pytest.raises(
            ValueError, match=r"^rows that are there stay as they are: kv_dtype cannot change in a fork"
        ):
            store.fork(other)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.5e38])
def test_tokens_that_have_no_scale_are_refused(bad):
    store = make_store(1, 32)
    keys, values = context(1, 5, 32)
    for x in (keys, values):
        right = x.clone()
        x[0, 2, 7] = bad
        with pytest.raises(ValueError, match=r"entries that are not finite, or too large for the store's torch.int8$"):
            store.append(keys, values)
        with pytest.raises(ValueError, match=r"entries that are not finite, or too large for the store$"):
            decode_step(torch.randn(1, 1, 32), keys[None, :, 2], values[None, :, 2], [store], scale=1.0)
        x.copy_(right)
    assert store.length == 0


@pytest.mark.parametrize("tokens", [1, 255, 4096, 9000])
def test_the_plan_counts_rows_of_whole_numbers(tokens):
    config = Config(**{**SMALL, "dense_layers": ()})
    store = KVStore(2, 40, torch.bfloat16, config, sampled=True)
    store.append(*context(2, tokens, 40, torch.bfloat16))
    planned = plan([LayerShape(2, 40, True)], config, sequences=1, tokens=tokens, dtype=torch.bfloat16)
    assert store.nbytes().rows <= planned.kept.rows <= max(2 * store.nbytes().rows, 3 * base.BLOCK_ROWS * 2 * 136)
