"""One decode step of one layer: append the new token, attend over what is exact and over a sample of the rest.

`decode_step` is the fused, native step. What it computes, told in verbs, is `kernels/reference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from magicpig.kernels import native
from magicpig.kernels._native import LshSampler
from magicpig.store import KVStore
from magicpig.types import AttentionState, Sample, StepInfo


def decode_step(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    stores: Sequence[KVStore],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> AttentionState:
    """Appends one token to each of B stores and attends over them.

    query: (B, H, D); keys, values: (B, G, D), all of one dtype (float32, bfloat16 or float16), on the CPU.
    softcap: logits s become softcap * tanh(s / softcap). sink_logits: (H,) join the denominator with value zero.
    Returns output (B, H, D) in the query's dtype and lse (B, H) float32, natural log.
    Raises ValueError on shapes or dtypes that do not fit, and on keys or values that are not finite; then nothing
    has been appended.
    """
    _check_query(query, stores, scale)
    _check_new(query, keys, values, stores)
    for store in stores:
        if store.length >= store.due:
            store.index_due()
        if store.length >= store.writable_to:
            store.make_room()
    result = native.decode_step(
        [store.view for store in stores],
        _sampler(stores),
        query.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        scale=scale,
        softcap=_checked_softcap(softcap),
        sink_logits=_checked_sinks(sink_logits, query.shape[1]),
    )
    return AttentionState(result.output, result.lse)


def attend_stores(
    query: Tensor,
    stores: Sequence[KVStore],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[AttentionState, StepInfo]:
    """The same attention without a new token, with the sample of every head. Shapes as in `decode_step`."""
    _check_query(query, stores, scale)
    B, H, _ = query.shape
    result = native.decode_step(
        [store.view for store in stores],
        _sampler(stores),
        query.contiguous(),
        None,
        None,
        scale=scale,
        softcap=_checked_softcap(softcap),
        sink_logits=_checked_sinks(sink_logits, H),
        capture=True,
    )
    samples = [[Sample(*result.samples[b * H + h]) for h in range(H)] for b in range(B)]
    return AttentionState(result.output, result.lse), step_info(samples, stores[0].kv_heads)


def step_info(samples: list[list[Sample]], kv_heads: int) -> StepInfo:
    """The `StepInfo` of samples[b][h], counting the distinct rows that the query heads of each kv head drew."""
    rows = []
    for heads in samples:
        group = len(heads) // kv_heads
        drawn = [torch.cat([s.ids for s in heads[g * group : (g + 1) * group]]) for g in range(kv_heads)]
        rows.append([ids.unique().numel() for ids in drawn])
    return StepInfo(
        ids=[[sample.ids for sample in heads] for heads in samples],
        log_u=[[sample.log_u for sample in heads] for heads in samples],
        rows=torch.tensor(rows, dtype=torch.int64),
    )


def _sampler(stores: Sequence[KVStore]) -> LshSampler | None:
    """The hash directions of the stores that sample; they must all have the same."""
    settled = [store for store in stores if store.settled]
    if len({(store.config.K, store.config.L, store.config.min_hits, store.config.seed) for store in settled}) > 1:
        raise ValueError("stores differ in K, L, min_hits or seed; one step takes stores of one setting")
    return settled[0].sampler if settled else None


def _check_query(query: Tensor, stores: Sequence[KVStore], scale: float) -> None:
    if len(stores) == 0:
        raise ValueError("stores is empty; one store per sequence is needed")
    first = stores[0]
    G, D = first.kv_heads, first.head_dim
    if len(stores) > 1:
        if any((store.kv_heads, store.head_dim, store.dtype) != (G, D, first.dtype) for store in stores):
            raise ValueError("stores differ in kv_heads, head_dim or dtype; one step takes stores of one layer")
        if len({id(store) for store in stores}) < len(stores):
            raise ValueError("stores has the same store twice; fork it")
    if query.ndim != 3 or query.shape[0] != len(stores) or query.shape[2] != D:
        raise ValueError(f"query has shape {tuple(query.shape)}; expected ({len(stores)}, H, {D})")
    H = query.shape[1]
    if H < 1 or H % G or H // G > native.MAX_GROUP:
        raise ValueError(
            f"query has {H} heads; expected a multiple of kv_heads={G}, at most {native.MAX_GROUP} times it"
        )
    if query.device.type != "cpu":
        raise ValueError(f"query is on {query.device}; decoding reads stores in host memory and needs it on the cpu")
    native.dtype_code(query.dtype)
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")


def _check_new(query: Tensor, keys: Tensor, values: Tensor, stores: Sequence[KVStore]) -> None:
    expected = (len(stores), stores[0].kv_heads, stores[0].head_dim)
    for name, x in (("keys", keys), ("values", values)):
        if x.shape != expected:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {expected}")
        if x.dtype != query.dtype or x.device != query.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}; expected {query.dtype} on {query.device} as the query"
            )


def _checked_softcap(softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    if not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap} must be positive and finite")
    return softcap


def _checked_sinks(sink_logits: Tensor | None, heads: int) -> Tensor | None:
    if sink_logits is None:
        return None
    if sink_logits.shape != (heads,):
        raise ValueError(f"sink_logits has shape {tuple(sink_logits.shape)}; expected ({heads},)")
    return sink_logits.detach().to("cpu", torch.float32).contiguous()
