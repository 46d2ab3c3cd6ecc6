"""Exact attention of many new tokens: over a store that already holds them, and over plain tensors.

One request at a time, H query heads over G = H / R key/value heads. No matrix of T x N logits is ever built: the keys
come in blocks, each block gives an `AttentionState`, and the states are merged by their log-sum-exps. Knows nothing
of sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from magicpig.errors import ArgumentError
from magicpig.kernels.attend.reference import merge, with_sink_logits
from magicpig.kernels.base import DTYPES, load_kernels
from magicpig.placement import Placement
from magicpig.placement.held import send
from magicpig.store import KVStore
from magicpig.types import AttentionState

KEYS_AT_ONCE = 4096  # as the store's blocks
WINDOW_QUERIES = 512  # queries that share one range of keys under a sliding window
LOGITS_AT_ONCE = 1 << 24  # of the plain path, all heads together: 64 MiB in float32
_CPU = torch.device("cpu")

# Private in torch, but the only attention on the CPU that returns the log-sum-exp; `_plain` stands in without it.
_flash_op: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_flash_op_of_cuda: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention", None)


_Block = Callable[[], tuple[Tensor, Tensor]]
"""Brings keys and values (G, n, D)."""


@dataclass(frozen=True)
class _Rule:
    """What becomes of the logits; see `prefill`."""

    scale: float
    softcap: float | None
    sink_logits: Tensor | None

    def finish(self, state: AttentionState, dtype: torch.dtype) -> AttentionState:
        """After the last key: the sinks join in."""
        if self.sink_logits is not None:
            state = with_sink_logits(state, self.sink_logits[:, None].expand_as(state.lse))
        return AttentionState(state.output.to(dtype), state.lse)


def prefill(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    store: KVStore,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> AttentionState:
    """Stores T new tokens, and exact causal attention of them over everything stored.

    query: (H, T, D); keys, values: (G, T, D), on one device, of any float dtype the store keeps. Where rows are kept in
    int8, a query at position p reads the whole strides before that of p as they are kept, and its own as it came,
    however the tokens are cut into calls.
    softcap: logits s become softcap * tanh(s / softcap). sink_logits: (H,) join the denominator with value zero.
    Returns output (H, T, D) in the query's dtype and lse (H, T) float32, natural log.
    Raises ArgumentError if the shapes do not fit, and NotFiniteError as `KVStore.append`.
    """
    _check(query, store.kv_heads, keys.shape[1], store.head_dim)
    rule, new_from = _Rule(scale, softcap, sink_logits), store.length
    if not store.layout.quantised:
        store.append(keys, values)
        here = query.device
        return _attend_blocks(
            query, _stored(store, 0, new_from, here), _stored(store, new_from, store.length, here), rule
        )
    store.check_numbers(keys, values)
    pieces = []
    for first in range(0, keys.shape[1], KEYS_AT_ONCE):
        at = slice(first, first + KEYS_AT_ONCE)
        pieces.append(_prefill_rounded(query[:, at], keys[:, at], values[:, at], store, rule))
    return _join(pieces)


def _prefill_rounded(query: Tensor, keys: Tensor, values: Tensor, store: KVStore, rule: _Rule) -> AttentionState:
    """`prefill` over rows of int8: stride by stride, since each is read unrounded by its own queries alone."""
    begin, stride = store.length, store.spec.stride
    own = begin // stride * stride  # where the stride of the first query begins
    new, here = [(keys.to(store.dtype), values.to(store.dtype))], query.device
    old = [(k.to(here), v.to(here)) for k, v in store.blocks(own, begin)]
    raw_keys, raw_values = (torch.cat(x, 1) for x in zip(*old, *new, strict=True))
    store.append(keys, values)
    past: AttentionState | None = None
    for block in _stored(store, 0, own, here):
        state = _attend(query, *block(), rule)
        past = state if past is None else merge([past, state])
    last = (store.length - 1) // stride * stride  # where the stride of the last query begins
    rounded = [torch.cat(x, 1).to(here) for x in zip(*store.blocks(own, last), strict=True)] if own < last else []
    pieces = []
    for first in range(own, store.length, stride):
        at = max(first, begin)
        end = min(first + stride, store.length)
        q = query[:, at - begin : end - begin]
        states = [_attend(q, raw_keys[:, at - own : end - own], raw_values[:, at - own : end - own], rule, causal=True)]
        if first < at:
            states.append(_attend(q, raw_keys[:, : at - own], raw_values[:, : at - own], rule))
        if own < first:
            k, v = (x[:, : first - own] for x in rounded)
            states.append(_attend(q, k, v, rule))
        if past is not None:
            part = slice(at - begin, end - begin)
            states.append(AttentionState(past.output[:, part], past.lse[:, part]))
        pieces.append(rule.finish(merge(states), query.dtype))
    return _join(pieces)


def causal_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    positions: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> AttentionState:
    """Exact causal attention over plain tensors, differentiable. The T queries belong to the last T of the N keys.

    query: (H, T, D); keys, values: (G, N, D); any device and float dtype.
    positions: (N,) int64 ascending, where the keys stand in the sequence if tokens between them were left out;
    window: a query at p sees the keys at (p - window, p], None means all up to p.
    softcap, sink_logits and the result are those of `prefill`.
    Raises ArgumentError if the shapes do not fit.
    """
    G, N, D = keys.shape
    _check(query, G, N, D)
    if values.shape != keys.shape:
        raise ArgumentError(f"values has shape {tuple(values.shape)}; expected {tuple(keys.shape)} as the keys")
    rule, new_from = _Rule(scale, softcap, sink_logits), N - query.shape[1]
    if window is not None and _span(positions, N) > window:
        return _attend_window(query, keys, values, rule, positions, window)
    past, new = (
        [_held(*pair) for pair in zip(k.split(KEYS_AT_ONCE, 1), v.split(KEYS_AT_ONCE, 1), strict=True)]
        if k.shape[1]
        else []
        for k, v in (
            (keys[:, :new_from], values[:, :new_from]),
            (keys[:, new_from:], values[:, new_from:]),
        )
    )
    return _attend_blocks(query, past, new, rule)


def prefill_on(
    placement: Placement,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    store: KVStore,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> AttentionState:
    """`prefill` on the placement's accelerator, where the tensors are: it attends while the host stores and indexes.

    The new keys and values come down beside that; those of earlier calls are sent up, block by block, as they are read.
    The index is brought up to the new length on a thread of the placement: wait for it by `Placement.rest`.
    """
    device = placement.accelerator
    assert device is not None
    sinks = None if sink_logits is None else sink_logits.to(query.device)
    if store.layout.quantised:  # what is read has to be rounded before
        state = prefill(query, keys, values, store, scale=scale, softcap=softcap, sink_logits=sinks)
        placement.settle(store)
        return state
    _check(query, store.kv_heads, keys.shape[1], store.head_dim)
    rule, own = _Rule(scale, softcap, sinks), [keys.to(store.dtype), values.to(store.dtype)]
    made, came = (device.buffer("prompt", [2, *keys.shape], store.dtype, pinned=pinned) for pinned in (False, True))
    device.launch("compute", "keep", lambda: torch.stack(own, out=made.tensor), writes=[made])
    device.wait("down", device.record("compute"))
    device.copy("down", made, came)
    down = device.record("down")

    def bring(begin: int, end: int) -> tuple[Tensor, Tensor]:
        keys, values = _read(store, begin, end)
        return send(device, "past", keys), send(device, "past", values)

    past: list[_Block] = [partial(bring, *ends) for ends in _cuts(store, 0, store.length)]
    new = [_held(*pair) for pair in zip(*(x.split(KEYS_AT_ONCE, 1) for x in own), strict=True)]
    state = device.launch("compute", "prefill", lambda: _attend_blocks(query, past, new, rule))
    device.finish(down)
    device.host("store", lambda: store.append(*came.tensor), reads=[came])
    placement.settle(store)
    return state


def _stored(store: KVStore, begin: int, end: int, device: torch.device) -> list[_Block]:
    """The blocks of [begin, end), and the tail; those of int8 are turned into floats only while they are read."""
    return [partial(_read, store, *ends, device) for ends in _cuts(store, begin, end)]


def _cuts(store: KVStore, begin: int, end: int) -> list[tuple[int, int]]:
    inner = {store.flushed, *range((begin // KEYS_AT_ONCE + 1) * KEYS_AT_ONCE, end, KEYS_AT_ONCE)}
    cuts = [begin, *sorted(cut for cut in inner if begin < cut < end), end]
    return [ends for ends in pairwise(cuts) if ends[0] < ends[1]]


def _held(keys: Tensor, values: Tensor) -> _Block:
    return lambda: (keys, values)


def _read(store: KVStore, begin: int, end: int, device: torch.device = _CPU) -> tuple[Tensor, Tensor]:
    keys, values = next(store.blocks(begin, end))
    return keys.to(device), values.to(device)


def _attend_blocks(
    query: Tensor,
    past: list[_Block],
    new: list[_Block],
    rule: _Rule,
) -> AttentionState:
    """Queries cut as the new keys are: each piece sees the blocks before its own fully and its own causally."""
    pieces, first = [], 0
    for i, block in enumerate(new):
        keys, values = block()
        at = slice(first, first + keys.shape[1])
        q = query[:, at]
        state = _attend(q, keys, values, rule, causal=True)
        for before in past + new[:i]:
            state = merge([state, _attend(q, *before(), rule)])
        pieces.append(rule.finish(state, query.dtype))
        first = at.stop
    return _join(pieces)


def _attend_window(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rule: _Rule,
    positions: Tensor | None,
    window: int,
) -> AttentionState:
    T, N = query.shape[1], keys.shape[1]
    if positions is None:
        positions = torch.arange(N, device=keys.device, dtype=torch.int64)
    pieces = []
    for first in range(0, T, WINDOW_QUERIES):
        last = min(first + WINDOW_QUERIES, T)
        at = positions[N - T + first : N - T + last, None]
        oldest = int(torch.searchsorted(positions, at[0] - window + 1))
        seen = slice(oldest, N - T + last)
        mask = (positions[seen] <= at) & (positions[seen] > at - window)
        q, k, v = query[:, first:last], keys[:, seen], values[:, seen]
        pieces.append(rule.finish(_attend(q, k, v, rule, mask=mask), query.dtype))
    return _join(pieces)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rule: _Rule,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
) -> AttentionState:
    """Attention of (H, T, D) over (G, n, D), without sinks; every query must see a key.

    mask: (T, n), True where visible. The state is in float32, or float64 for float64 queries.
    """
    kernels = load_kernels()
    suits = mask is None and _suits_kernel(query, keys, values)
    if suits and kernels.prefers_many(query.dtype, capped=rule.softcap is not None):
        softcap = rule.softcap or 0.0
        return kernels.attend_many(query, keys, values, scale=rule.scale, softcap=softcap, causal=causal)
    if rule.softcap is None and _flash_op is not None and _suits_flash(query, keys, values):
        return _flash(query, keys, values, rule.scale, causal, mask)
    if mask is None and rule.softcap is None and _flash_op_of_cuda is not None and _suits_cuda(query, keys, values):
        return _flash_of_cuda(query, keys, values, rule.scale, causal)
    return _plain(query, keys, values, rule, causal, mask)


def _suits_kernel(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    return (
        query.dtype in DTYPES
        and _suits_flash(query, keys, values)
        and all(x.stride(2) == 1 for x in (query, keys, values))
    )


def _suits_flash(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    return (
        query.device.type == "cpu"
        and query.dtype == keys.dtype == values.dtype
        and query.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        and not _differentiated(query, keys, values)  # the gradient of the log-sum-exp is not defined there
    )


def _differentiated(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _suits_cuda(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype == keys.dtype == values.dtype
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[2] % 8 == 0
        and query.shape[2] <= 256
        and not _differentiated(query, keys, values)
    )


def _flash_of_cuda(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> AttentionState:
    group = len(query) // len(keys)
    every = [x.repeat_interleave(group, 0)[None] for x in (keys, values)]
    output, lse, *_ = _flash_op_of_cuda(query[None], *every, 0.0, causal, False, scale=scale)
    return AttentionState(output[0].float(), lse[0])


def _flash(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, mask: Tensor | None
) -> AttentionState:
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    output, lse = _flash_op(query[None], keys[None], values[None], 0.0, causal, attn_mask=bias, scale=scale)
    return AttentionState(output[0].to(lse.dtype), lse[0])


def _plain(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rule: _Rule,
    causal: bool,
    mask: Tensor | None,
) -> AttentionState:
    (H, T, D), (G, n, _) = query.shape, keys.shape
    working = torch.promote_types(query.dtype, torch.float32)
    keys, values = keys.to(working), values.to(working)
    if causal:
        mask = torch.ones(T, n, dtype=torch.bool, device=keys.device).tril()
    pieces = []
    step = max(1, LOGITS_AT_ONCE // (H * n))
    for first in range(0, T, step):
        at = slice(first, min(first + step, T))
        q = query[:, at].to(working)
        t = q.shape[1]
        logits = (rule.scale * (q.reshape(G, -1, D) @ keys.mT)).view(H, t, n)
        if rule.softcap is not None:
            logits = rule.softcap * torch.tanh(logits / rule.softcap)
        if mask is not None:
            logits = logits.masked_fill(~mask[at], -torch.inf)
        output = (logits.softmax(-1).view(G, -1, n) @ values).view(H, t, D)
        pieces.append(AttentionState(output, logits.logsumexp(-1)))
    return _join(pieces)


def _join(pieces: list[AttentionState]) -> AttentionState:
    """States of consecutive queries as one."""
    if len(pieces) == 1:
        return pieces[0]
    return AttentionState(torch.cat([p.output for p in pieces], 1), torch.cat([p.lse for p in pieces], 1))


def _span(positions: Tensor | None, N: int) -> int:
    return N if positions is None else int(positions[-1] - positions[0]) + 1


def _check(query: Tensor, G: int, N: int, D: int) -> None:
    if query.ndim != 3 or query.shape[0] % G or query.shape[2] != D or not 1 <= query.shape[1] <= N:
        raise ArgumentError(
            f"query has shape {tuple(query.shape)}; expected (H, T, {D}) with H a multiple of {G} and 1 <= T <= {N}"
        )
