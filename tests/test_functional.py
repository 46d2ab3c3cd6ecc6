"""`magicpig.attend`: what it returns, that it obeys the law it samples by, and that bad input is refused."""

import math

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

import magicpig
from magicpig.collision import log_inclusion
from magicpig.errors import ArgumentError, ArgumentTypeError, NotFiniteError
from magicpig.kernels.algorithm import index_end
from magicpig.kernels.hash.reference import segment_centre
from magicpig.types import StepInfo

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
B, H, G, D = 2, 6, 2, 32
BLOCK = 8  # so that short contexts are indexed


def attend(*tensors: object, **settings: object) -> tuple[Tensor, Tensor, StepInfo]:
    return magicpig.attend(*tensors, **{"block": BLOCK, **settings})


def body_end(N: int, recent: int = 64) -> int:
    return index_end(N, recent=recent, stride=BLOCK)


def centred_body(keys: Tensor, sinks: int, recent: int) -> Tensor:
    """Of keys (N, D), those that may be sampled less their centre, in float64."""
    indexed = keys[: body_end(len(keys), recent)].double()
    return (indexed - segment_centre(indexed, BLOCK))[sinks:]


# float64 is the reference's alone.
BOTH_KERNELS = [
    pytest.param(kernels, dtype, id=f"{kernels}-{name}")
    for kernels in ["cpu", "reference"]
    for name, dtype in DTYPES.items()
    if (kernels, name) != ("cpu", "fp64")
]


def tensors(N: int, dtype: torch.dtype = torch.float32, D: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """A query, keys around a common centre, and values."""
    query, keys, values = torch.randn(B, H, 1, D), torch.randn(B, G, N, D), torch.randn(B, G, N, D)
    return query.to(dtype), (keys + torch.linspace(-1, 1, D)).to(dtype), values.to(dtype)


def sdpa(query: Tensor, keys: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
    """Torch's own attention in float64, of the same rounded inputs."""
    return torch.nn.functional.scaled_dot_product_attention(
        query.double(), keys.double(), values.double(), scale=scale, enable_gqa=True
    )


def exact_lse(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    logits = scale * (query.double() @ keys.double().repeat_interleave(H // G, 1).mT)
    return logits.logsumexp(-1)[:, :, 0]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Float32 accumulation, of centred keys that may have been rounded again, and the rounding of the output."""
    eps = torch.finfo(dtype).eps
    return {"rtol": max(1e-5, 2 * eps), "atol": max(1e-5, 4 * eps)} if dtype != torch.float64 else {}


@pytest.mark.parametrize("sampler", ["lsh", "full"])
@pytest.mark.parametrize(
    ("kernels", "dtype"), [*BOTH_KERNELS, *(pytest.param(None, t, id=f"default-{n}") for n, t in DTYPES.items())]
)
def test_shapes_and_dtypes(kernels, sampler, dtype):
    output, lse, info = attend(*tensors(333, dtype), sampler=sampler, kernels=kernels, K=4, L=20)
    assert output.shape == (B, H, 1, D)
    assert output.dtype == dtype
    assert lse.shape == (B, H)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert output.isfinite().all()
    assert lse.isfinite().all()
    assert info.rows.shape == (B, G)
    assert info.rows.dtype == torch.int64
    assert len(info.ids) == len(info.log_u) == B
    for b in range(B):
        assert len(info.ids[b]) == len(info.log_u[b]) == H
        for ids, log_u in zip(info.ids[b], info.log_u[b], strict=True):
            assert ids.dtype == torch.int64
            assert ids.shape == log_u.shape
            assert (len(ids) > 0) == (sampler == "lsh")


@pytest.mark.parametrize(("kernels", "dtype"), BOTH_KERNELS)
def test_full_attention_is_torchs(kernels, dtype):
    query, keys, values = tensors(500, dtype)
    for scale in [None, 0.05]:
        output, lse, info = attend(query, keys, values, sampler="full", scale=scale, kernels=kernels)
        right = sdpa(query, keys, values, scale)
        torch.testing.assert_close(output.double(), right, **tolerance(dtype))
        torch.testing.assert_close(lse.double(), exact_lse(query, keys, scale or D**-0.5), rtol=1e-5, atol=1e-5)
        assert info.rows.eq(0).all()


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
def test_a_sample_of_everything_is_exact_attention(head_dim, kernels, isa):
    # K = 1: a key collides in a table with probability p, and 1 - (1 - p)^1024 is one up to 1e-9 for p > 0.02.
    query, keys, values = tensors(200, D=head_dim)
    output, lse, info = attend(query, keys, values, K=1, L=1024, min_hits=1, kernels=kernels)
    assert all(torch.equal(ids, torch.arange(4, body_end(200))) for row in info.ids for ids in row)
    torch.testing.assert_close(output.double(), sdpa(query, keys, values), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse(query, keys, head_dim**-0.5), rtol=1e-5, atol=1e-5)
    assert info.rows.eq(body_end(200) - 4).all()


@pytest.mark.parametrize("softcap", [None, 2.0], ids=str)
def test_native_kernels_do_what_the_reference_does(softcap):
    query, keys, values = tensors(700)
    same = 0
    settings = {"K": 5, "L": 30, "softcap": softcap, "seed": 3, "sinks": 7, "recent": 33}
    ours = attend(query, keys, values, kernels="cpu", **settings)
    theirs = attend(query, keys, values, kernels="reference", **settings)
    for b in range(B):
        for h in range(H):
            if torch.equal(ours[2].ids[b][h], theirs[2].ids[b][h]):
                same += 1
                # log u is interpolated to 1e-4 and so is each weight; an output is a mean of values below 5.
                torch.testing.assert_close(ours[0][b, h], theirs[0][b, h], rtol=0, atol=5e-4)
                torch.testing.assert_close(ours[1][b, h], theirs[1][b, h], rtol=0, atol=1.5e-4)
    # A projection within rounding of zero may fall on either side: about one in 10^5 of the 700 * 150 per head.
    assert same >= B * H - 3


def test_info_names_sampled_positions_and_their_probabilities():
    N, sinks, recent = 400, 5, 30
    query, keys, values = tensors(N)
    _, _, info = attend(query, keys, values, K=4, L=12, sinks=sinks, recent=recent)
    end = body_end(N, recent)
    for b in range(B):
        for h in range(H):
            ids, log_u = info.ids[b][h], info.log_u[b][h]
            assert (ids.diff() > 0).all()
            assert sinks <= int(ids.min())
            assert int(ids.max()) < end
            centred = centred_body(keys[b, h // 3], sinks, recent)
            cosine = torch.cosine_similarity(centred[ids - sinks], query[b, h].double(), dim=-1)
            torch.testing.assert_close(log_u.double(), log_inclusion(cosine, 4, 12, 2), rtol=0, atol=1.5e-4)
        for g in range(G):
            union = torch.cat(info.ids[b][3 * g : 3 * g + 3]).unique()
            assert int(info.rows[b, g]) == len(union)


def test_the_estimate_is_what_info_says_was_read():
    N = 400
    query, keys, values = tensors(N)
    output, lse, info = attend(query, keys, values, K=4, L=12, scale=0.3)
    static = torch.tensor([*range(4), *range(body_end(N), N)])
    for b in range(B):
        for h in range(H):
            read = torch.cat([static, info.ids[b][h]])
            log_u = torch.cat([torch.zeros(len(static)), info.log_u[b][h]]).double()
            logits = 0.3 * keys[b, h // 3, read].double() @ query[b, h, 0].double() - log_u
            right = logits.softmax(0) @ values[b, h // 3, read].double()
            torch.testing.assert_close(output[b, h, 0].double(), right, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[b, h].double(), logits.logsumexp(0), rtol=1e-5, atol=1e-5)


def test_the_same_call_gives_the_same_bits():
    query, keys, values = tensors(600, torch.bfloat16)
    first = attend(query, keys, values, K=6, L=40)
    again = attend(query, keys, values, K=6, L=40)
    other = attend(query, keys, values, K=6, L=40, seed=1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_refused_unless_nobody_wants_them(dtype):
    plain = tensors(300, dtype)
    wanting = [x.clone().requires_grad_() for x in plain]
    with pytest.raises(ArgumentError, match=r"^query requires a gradient, .* use query.detach\(\)$"):
        attend(*wanting, K=4, L=12)
    with torch.no_grad():
        output, lse, _ = attend(*wanting, K=4, L=12)
    assert not output.requires_grad
    assert not lse.requires_grad
    assert torch.equal(output, attend(*plain, K=4, L=12)[0])


def test_inputs_are_not_changed_and_may_be_strided():
    query, keys, values = tensors(300)
    copies = [x.clone() for x in (query, keys, values)]
    output, lse, _ = attend(query, keys, values, K=4, L=12)
    for x, copy in zip((query, keys, values), copies, strict=True):
        assert torch.equal(x, copy)
    # As a model has them: (B, N, G, D) in memory.
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, keys, values)]
    output_again, lse_again, _ = attend(*strided, K=4, L=12)
    assert torch.equal(output, output_again)
    assert torch.equal(lse, lse_again)


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("N", [1, 2, 3, 4, 5, 63, 64, 65, 67, 68])
def test_contexts_of_sinks_and_window_alone_are_exact(N, kernels):
    query, keys, values = tensors(N)
    output, lse, info = attend(query, keys, values, kernels=kernels)
    torch.testing.assert_close(output.double(), sdpa(query, keys, values), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse(query, keys, D**-0.5), rtol=1e-5, atol=1e-5)
    assert info.rows.eq(0).all()
    assert all(len(ids) == 0 for row in info.ids for ids in row)


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_keys_that_are_their_own_mean_are_sampled(kernels):
    # Less the centre they are zero vectors, with code 0 and the weight of a key at a right angle.
    query, keys, values = tensors(72)
    keys[:, :, :8] = keys[:, :, :1].mul(16).round() / 16
    output, lse, info = attend(query, keys, values, K=1, L=1024, min_hits=1, kernels=kernels)
    assert output.isfinite().all()
    assert lse.isfinite().all()
    assert all(ids.tolist() in ([], [4, 5, 6, 7]) for row in info.ids for ids in row)
    log_u = torch.cat([x for row in info.log_u for x in row])
    assert log_u.abs().max() < 1e-6


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (0, 10), (10, 0), (50, 50)])
def test_any_sinks_and_window(sinks, recent, kernels):
    query, keys, values = tensors(100)
    output, _, info = attend(query, keys, values, K=1, L=1024, min_hits=1, sinks=sinks, recent=recent, kernels=kernels)
    body = torch.arange(sinks, body_end(100, recent)) if body_end(100, recent) > sinks else torch.arange(0)
    assert all(torch.equal(ids, body) for row in info.ids for ids in row)
    torch.testing.assert_close(output.double(), sdpa(query, keys, values), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", ["cpu", "reference"])
def test_nothing_sampled_and_nothing_static_is_zero(kernels):
    query, keys, values = tensors(256)
    output, lse, info = attend(query, keys, values, K=16, L=3, min_hits=3, sinks=0, recent=0, kernels=kernels)
    assert info.rows.eq(0).all()
    assert output.eq(0).all()
    assert lse.eq(-math.inf).all()


SEEDS = 400


@pytest.mark.slow
@pytest.mark.parametrize(("K", "L", "min_hits"), [(3, 5, 1), (4, 12, 2), (5, 24, 3)])
def test_every_key_is_sampled_as_often_as_the_law_says(K, L, min_hits):
    # Another seed is another draw of all tables: inclusions of one key are independent between seeds, so their number
    # is binomial. All counts lie within exact bounds which one in 10^6 such tests would leave (Bonferroni).
    N, sinks, recent = 43, 2, 3
    query, keys, values = tensors(N)
    query, keys, values = query[:1, :4], keys[:1], values[:1]
    counts = torch.zeros(4, N)
    ratios = torch.zeros(SEEDS, 4, dtype=torch.float64)
    exact = torch.zeros(4, dtype=torch.float64)
    log_u = torch.full((4, N), -math.inf, dtype=torch.float64)
    for h in range(4):
        centred = centred_body(keys[0, h // 2], sinks, recent)
        cosine = torch.cosine_similarity(centred, query[0, h].double(), dim=-1)
        log_u[h, sinks : N - recent] = log_inclusion(cosine, K, L, min_hits)
        exact[h] = (D**-0.5 * keys[0, h // 2].double() @ query[0, h, 0].double()).logsumexp(0)
    for seed in range(SEEDS):
        _, lse, info = attend(query, keys, values, K=K, L=L, min_hits=min_hits, seed=seed, sinks=sinks, recent=recent)
        ratios[seed] = (lse[0].double() - exact).exp()
        for h in range(4):
            counts[h, info.ids[0][h]] += 1

    u = log_u.exp()
    chance = 1e-6 / (4 * (N - sinks - recent)) / 2
    lowest = torch.from_numpy(binom.ppf(chance, SEEDS, u.numpy()))
    highest = torch.from_numpy(binom.isf(chance, SEEDS, u.numpy()))
    inside = (counts >= lowest) & (counts <= highest)
    assert inside[:, sinks : N - recent].all()
    assert counts[:, :sinks].eq(0).all()
    assert counts[:, N - recent :].eq(0).all()
    # The bounds are worth something: they are far apart from 0 and SEEDS for many keys.
    assert ((lowest > 0) & (highest < SEEDS)).sum() > 40

    # The denominator is unbiased. Keys of one seed are not independent, seeds are: five standard errors of their mean.
    error = ratios.std(0) / SEEDS**0.5
    assert ((ratios.mean(0) - 1).abs() <= 5 * error).all()
    assert (error < 0.1).all()


def bad_settings() -> dict[str, tuple[dict[str, object], str]]:
    return {
        "K-0": ({"K": 0}, r"^K=0: "),
        "K-17": ({"K": 17}, r"^K=17: "),
        "K-fraction": ({"K": 3.5}, r"^K=3.5: "),
        "L-0": ({"L": 0}, r"^L=0: "),
        "L-1025": ({"L": 1025}, r"^L=1025: "),
        "min_hits-0": ({"min_hits": 0}, r"^min_hits=0: "),
        "min_hits-128": ({"min_hits": 128}, r"^min_hits=128: "),
        "min_hits-above-L": ({"L": 3, "min_hits": 4}, r"^min_hits=4 is larger than L=3: no key could ever be sampled$"),
        "seed": ({"seed": -1}, r"^seed=-1: "),
        "sinks": ({"sinks": -1}, r"^sinks=-1: "),
        "recent": ({"recent": -5}, r"^recent=-5: "),
        "sampler": ({"sampler": "top-k"}, r"^sampler='top-k': .*'lsh', 'sketch', 'full', .* or 'uniform-tail'$"),
        "kernels": ({"kernels": "cuda"}, r"^kernels='cuda' is not one of 'cpu', 'reference'$"),
        "scale": ({"scale": math.nan}, r"^scale=nan must be finite$"),
        "scale-int": ({"scale": 10**400}, r"^scale=inf must be finite$"),
        "scale-huge": ({"scale": 1e307}, r"^scale=1e\+307 with queries of up to .* gives logits that are not finite$"),
        "softcap": ({"softcap": 0.0}, r"^softcap=0.0 must be positive and finite$"),
        "softcap-inf": ({"softcap": math.inf}, r"^softcap=inf must be positive and finite$"),
    }


@pytest.mark.parametrize(("settings", "message"), bad_settings().values(), ids=bad_settings().keys())
def test_settings_out_of_range_are_refused_in_one_line(settings, message):
    # float32 goes to the native kernels by default, float64 to the reference.
    for dtype in [torch.float32, torch.float64]:
        with pytest.raises(ValueError, match=message) as caught:
            attend(*tensors(100, dtype), **settings)
        assert "\n" not in str(caught.value)


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="'tables'"):
        attend(*tensors(10), tables=3)


def bad_tensors() -> dict[str, tuple[tuple[object, ...], str]]:
    q, k, v = torch.zeros(2, 6, 1, 32), torch.zeros(2, 2, 50, 32), torch.zeros(2, 2, 50, 32)
    nan, inf = v.clone(), k.clone()
    nan[1, 1, 49, 31] = math.nan
    inf[0, 0, 0, 0] = -math.inf
    return {
        "query-3d": ((q[0], k, v), r"^query has shape \(6, 1, 32\); expected four dimensions$"),
        "keys-3d": ((q, k[0], v), r"^keys has shape \(2, 50, 32\); expected four dimensions$"),
        "two-queries": ((q.expand(-1, -1, 2, -1), k, v), r"^query has shape \(2, 6, 2, 32\); expected \(B, H, 1, D\)"),
        "no-batch": (
            (q[:0], k[:0], v[:0]),
            r"^query has shape \(0, 6, 1, 32\); no sequence, head or dimension",
        ),
        "no-query-heads": (
            (q[:, :0], k, v),
            r"^query has shape \(2, 0, 1, 32\); no sequence, head or dimension",
        ),
        "batch": ((q, k[:1], v[:1]), r"^keys has shape \(1, 2, 50, 32\); expected \(2, G, N, 32\) with G dividing"),
        "heads": ((q[:, :5], k, v), r"^keys has shape \(2, 2, 50, 32\); .* G dividing the 5 query heads$"),
        "no-heads": ((q, k[:, :0], v[:, :0]), r"^keys has shape \(2, 0, 50, 32\); expected"),
        "head-dim": ((q, k[..., :16], v), r"^keys has shape \(2, 2, 50, 16\); expected \(2, G, N, 32\)"),
        "values": ((q, k, v[:, :, :9]), r"^values has shape \(2, 2, 9, 32\); expected \(2, 2, 50, 32\) as the keys$"),
        "no-tokens": ((q, k[:, :, :0], v[:, :, :0]), r"^keys is empty; at least one token is needed$"),
        "integers": ((q.int(), k.int(), v.int()), r"^query has dtype torch.int32; allowed: float32, bfloat16, float16"),
        "mixed": ((q, k.half(), v), r"^keys has dtype torch.float16 and query torch.float32; expected the same$"),
        "device": ((q.to("meta"), k, v), r"^query is on meta; attend reads host memory, move it to the cpu$"),
        "no-dimensions": (
            (q[..., :0], k[..., :0], v[..., :0]),
            r"^query has shape \(2, 6, 1, 0\); no sequence, head or",
        ),
        "complex": ((q + 0j, k, v), r"^query has dtype torch.complex64; allowed: float32, bfloat16, float16, float64$"),
        "sparse": ((q.to_sparse(), k, v), r"^query is nested or torch.sparse_coo; expected a dense tensor$"),
        "fp8": ((q, k.to(torch.float8_e4m3fn), v), r"^keys has dtype torch.float8_e4m3fn; allowed: float32"),
        "gradient": ((q, k.clone().requires_grad_(), v), r"^keys requires a gradient, .* use keys.detach\(\)$"),
        "huge-keys": ((q + 1e20, k + 1e20, v), r"^scale=0.17.* gives logits that are not finite$"),
        "huge-values": ((q, k, v + 3e38), r"^values of up to 3e\+38 have a weighted sum that float32 does not hold$"),
        "nan-value": ((q, k, nan), r"^values has entries that are not finite"),
        "inf-key": ((q, inf, v), r"^keys has entries that are not finite"),
        "nan-query": ((q * math.nan, k, v), r"^query has entries that are not finite"),
        "too-wide": (
            (torch.zeros(1, 1, 1, 513), torch.zeros(1, 1, 3, 513), torch.zeros(1, 1, 3, 513)),
            r"^head_dim=513 is out of range; allowed: 1 to 512$",
        ),
        "too-many-heads": (
            (torch.zeros(1, 257, 1, 8), torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8)),
            r"^query has 257 heads; expected a multiple of kv_heads=1, at most 256 times it$",
        ),
    }


@pytest.mark.parametrize(("arguments", "message"), bad_tensors().values(), ids=bad_tensors().keys())
def test_tensors_that_do_not_fit_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        attend(*arguments)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, NotFiniteError) == ("not finite" in message or "does not hold" in message)


@pytest.mark.parametrize("sampler", ["full", "lsh", "sketch", "topk", "quest", "oracle"])
def test_a_scale_that_overflows_logits_is_refused_by_every_sampler(sampler):
    more = {"K": 4, "L": 10} if sampler == "lsh" else {}
    with pytest.raises(NotFiniteError, match=r"^scale=1e\+38 "):
        attend(*tensors(100), sampler=sampler, scale=1e38, **more)
    # Nothing overflows of this one, of which a softmax picks one key.
    output, lse, _ = attend(*tensors(100), sampler=sampler, scale=1e34, **more)
    assert output.isfinite().all()
    assert lse.isfinite().all()


def test_a_scale_that_is_no_number_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"^scale='1' must be a number$"):
        attend(*tensors(100), scale="1")


def test_more_threads_than_torch_can_start_are_refused(monkeypatch):
    # Told to use 100,000, torch ends the process at its first parallel operation.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 100_000)
    with pytest.raises(ArgumentError, match=r"^torch.get_num_threads\(\) is 100000; allowed: 1 to 1024$"):
        attend(*tensors(10))


def test_float64_is_the_references_alone():
    with pytest.raises(ValueError, match=r"^dtype=torch.float64 is not supported; allowed: "):
        attend(*tensors(100, torch.float64), kernels="cpu")


@pytest.mark.parametrize("name", ["query", "keys", "values"])
def test_what_is_no_tensor_is_refused(name):
    arguments = dict(zip(["query", "keys", "values"], tensors(10), strict=True))
    with pytest.raises(TypeError, match=rf"^{name} must be a tensor, got list$"):
        attend(**{**arguments, name: [1.0]})
