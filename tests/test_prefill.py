"""Exact attention of many tokens against softmax written out in float64."""

import pytest
import torch
from torch import Tensor

from magicpig import Config
from magicpig.attention import prefill
from magicpig.kernels.base import load_kernels
from magicpig.store import KVStore

SCALE = 0.3
# Largest rounding of one number in [1, 2), times a margin for sums over a few hundred weighted values of size ~ 3.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-12}


def expected(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    positions: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    q, k, v = query.double(), keys.double(), values.double()
    (H, T, _), (G, N, _) = q.shape, k.shape
    k, v = k.repeat_interleave(H // G, 0), v.repeat_interleave(H // G, 0)
    logits = SCALE * q @ k.mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    at = torch.arange(N) if positions is None else positions
    distance = at[N - T :, None] - at
    visible = (distance >= 0) & (distance < (window or 1 << 40))
    logits = logits.masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        logits = torch.cat([logits, sink_logits.double()[:, None, None].expand(H, T, 1)], 2)
        v = torch.cat([v, torch.zeros(H, 1, v.shape[2], dtype=v.dtype)], 1)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def tensors(H: int, G: int, T: int, N: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return torch.randn(H, T, D).to(dtype), torch.randn(G, N, D).to(dtype), torch.randn(G, N, D).to(dtype)


@pytest.fixture(params=["own", "flash", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways to the same attention: the kernel, torch's private operator, the fallback in small slices of queries."""
    monkeypatch.setattr(load_kernels(), "prefers_many", lambda *_, **__: request.param == "own")
    if request.param == "plain":
        monkeypatch.setattr(prefill, "_flash_op", None)
        monkeypatch.setattr(prefill, "LOGITS_AT_ONCE", 3000)
    return str(request.param)


def test_torch_has_the_operator() -> None:
    # Without it nothing else fails, long prompts only take many times as long.
    assert prefill._flash_op is not None


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("H", "G", "T", "N", "D"),
    [(1, 1, 1, 1, 16), (6, 2, 17, 17, 80), (4, 4, 15, 300, 64), (8, 1, 257, 1000, 16), (3, 1, 1, 129, 96)],
)
@pytest.mark.usefixtures("path")
def test_causal(H: int, G: int, T: int, N: int, D: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "KEYS_AT_ONCE", 100)  # several blocks
    query, keys, values = tensors(H, G, T, N, D, dtype)
    state = prefill.causal_attention(query, keys, values, scale=SCALE)
    output, lse = expected(query, keys, values)
    assert state.output.dtype == dtype
    torch.testing.assert_close(state.output.double(), output, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(state.lse.double(), lse, atol=max(1e-4, TOLERANCE[dtype] / 10), rtol=1e-4)


@pytest.mark.parametrize("window", [1, 7, 64, 200, 1000])
@pytest.mark.parametrize("holes", [False, True], ids=["dense", "holes"])
@pytest.mark.usefixtures("path")
def test_sliding_window(window: int, holes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "WINDOW_QUERIES", 50)
    query, keys, values = tensors(4, 2, 123, 201, 32)
    # Distances count the tokens that were left out.
    positions = torch.randperm(300)[:201].sort().values if holes else None
    sinks = torch.randn(4)
    state = prefill.causal_attention(
        query, keys, values, scale=SCALE, window=window, positions=positions, sink_logits=sinks
    )
    output, lse = expected(query, keys, values, window=window, positions=positions, sink_logits=sinks)
    torch.testing.assert_close(state.output.double(), output, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(state.lse.double(), lse, atol=2e-5, rtol=2e-5)


def test_sliding_window_costs_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    def watched(query: Tensor, keys: Tensor, *args: object, **kwargs: object) -> object:
        nonlocal largest
        largest = max(largest, query.shape[1] * keys.shape[1])
        return attend(query, keys, *args, **kwargs)

    attend = prefill._attend
    monkeypatch.setattr(prefill, "_attend", watched)
    query, keys, values = tensors(1, 1, 6000, 6000, 16)
    prefill.causal_attention(query, keys, values, scale=SCALE, window=100)
    assert 0 < largest <= prefill.WINDOW_QUERIES * (prefill.WINDOW_QUERIES + 100)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["no softcap", "softcap"])
@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("past", [0, 1, 700, 4090])
@pytest.mark.parametrize("settled", [False, True], ids=["unsettled", "settled"])
@pytest.mark.usefixtures("path")
def test_store(settled: bool, past: int, sinks: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crosses a block of the store."""
    monkeypatch.setattr(prefill, "LOGITS_AT_ONCE", 1 << 18)
    D, T = 40, 23
    query, keys, values = tensors(6, 2, T, past + T, D)
    config = Config(K=4, L=10, sinks=1, recent=5, block=8, exact_below=0)
    store = KVStore(2, D, torch.float32, config, sampled=settled)
    if past:
        store.append(keys[:, :past], values[:, :past])
        store.settle()
    assert store.settled == (settled and past > 6)
    logits = torch.randn(6) if sinks else None
    new = keys[:, past:], values[:, past:]
    state = prefill.prefill(query, *new, store, scale=SCALE, softcap=softcap, sink_logits=logits)
    assert store.length == past + T
    output, lse = expected(query, keys, values, softcap=softcap, sink_logits=logits)
    torch.testing.assert_close(state.output.double(), output, atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(state.lse.double(), lse, atol=5e-5, rtol=5e-5)


def test_gradients_are_those_of_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "KEYS_AT_ONCE", 8)
    inputs = [x.requires_grad_() for x in tensors(4, 2, 12, 20, 16, torch.float64)]
    target = torch.randn(4, 12, 16, dtype=torch.float64)
    (prefill.causal_attention(*inputs, scale=SCALE).output * target).sum().backward()
    gradients = [x.grad.clone() for x in inputs]
    for x in inputs:
        x.grad = None
    (expected(*inputs)[0] * target).sum().backward()
    for ours, x in zip(gradients, inputs, strict=True):
        torch.testing.assert_close(ours, x.grad)


@pytest.mark.parametrize(
    ("query", "keys", "values"),
    [
        ((4, 6, 16), (2, 5, 16), (2, 5, 16)),
        ((4, 0, 16), (2, 5, 16), (2, 5, 16)),
        ((3, 5, 16), (2, 5, 16), (2, 5, 16)),
        ((4, 5, 32), (2, 5, 16), (2, 5, 16)),
        ((4, 5, 16), (2, 5, 16), (2, 5, 8)),
    ],
    ids=["more queries than keys", "no query", "heads not a multiple", "head dims differ", "values differ"],
)
def test_shapes_that_do_not_fit(query: tuple[int, ...], keys: tuple[int, ...], values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^(query|values) has shape"):
        prefill.causal_attention(torch.zeros(query), torch.zeros(keys), torch.zeros(values), scale=1.0)
