"""One decode step of one layer: append the new token, attend over what is exact and over a sample of the rest.

`decode_step` is the fused, native step. What it computes, told in verbs, is `kernels/reference.py`. Where a sampler of
samplers.py chooses rows of the body, the native step attends over the exact rows alone, and the others are added here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from magicpig.errors import NotFiniteError
from magicpig.kernels import native
from magicpig.kernels.attend.reference import merge, with_sink_logits
from magicpig.samplers import NAMES, draw
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
    Samplers, budgets, seeds and dtypes are each store's own.
    Returns output (B, H, D) in the query's dtype and lse (B, H) float32, natural log.
    Raises ValueError on shapes or dtypes that do not fit; then nothing has been appended. Raises NotFiniteError where
    the numbers of a sequence are not finite or do not fit: its store is as it was, the others have been served.
    """
    _check_query(query, stores, scale)
    _check_new(query, keys, values, stores)
    make_ready(stores)
    return _step(query, keys, values, stores, scale, softcap, sink_logits)[0]


class LayerDecoder:
    """`decode_step` for stores that stay together: what does not change from token to token is checked once.

    Between two layers the weights of a model pass through the caches, and every object that is touched comes from
    memory again: what a step in Python costs is how much of it there is.
    """

    def __init__(self, stores: Sequence[KVStore], query_heads: int, *, scale: float, softcap: float | None) -> None:
        """Raises ValueError as `decode_step`."""
        first, B = stores[0], len(stores)
        _check_query(torch.empty(B, query_heads, first.head_dim, dtype=first.dtype, device="cpu"), stores, scale)
        self.scale, self.softcap = scale, softcap
        self._stores, self._views, self._dtype = stores, [store.view for store in stores], first.dtype
        self._choosing = any(store.config.sampler in NAMES for store in stores)
        self._query_shape = (B, query_heads, 1, first.head_dim)
        self._new_shape = (B, first.kv_heads, 1, first.head_dim)
        self._step = native.RepeatedStep(B, query_heads, first.head_dim, scale, _checked_softcap(softcap))

    def takes(self, query: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether they are what `step` expects; never where samplers.py chooses rows. If not, take `decode_step`."""
        return (
            not self._choosing
            and query.shape == self._query_shape
            and keys.shape == self._new_shape
            and values.shape == self._new_shape
            and query.dtype is self._dtype
            and keys.dtype is self._dtype
            and values.dtype is self._dtype
            and query.is_cpu
            and keys.is_cpu
            and values.is_cpu
            and query.is_contiguous()
            and keys.is_contiguous()
            and values.is_contiguous()
        )

    def step(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Appends one token to each store and attends over them: query (B, H, 1, D), keys and values (B, G, 1, D).

        All as `takes` asks for. Returns (B, 1, H, D). Raises NotFiniteError as `decode_step`.
        """
        make_ready(self._stores)
        output, faults = self._step(self._views, query, keys, values)
        if faults:
            raise _not_finite(faults)
        return output


def make_ready(stores: Sequence[KVStore]) -> None:
    """Indexes what is due and makes room for one more token in each store."""
    for store in stores:
        length = store.view.length
        if length >= store.due:
            store.index_due()
        if length >= store.writable_to:
            store.make_room()


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
    state, samples, errors = _step(query, None, None, stores, scale, softcap, sink_logits, capture=True)
    return state, step_info(samples, errors, stores[0].kv_heads)


def step_info(samples: list[list[Sample]], predicted_error: Tensor, kv_heads: int) -> StepInfo:
    """The `StepInfo` of samples[b][h] and the errors (B, H) predicted from them.

    Counts the distinct rows that the query heads of each kv head drew.
    """
    rows = []
    for heads in samples:
        group = len(heads) // kv_heads
        drawn = [torch.cat([s.ids for s in heads[g * group : (g + 1) * group]]) for g in range(kv_heads)]
        rows.append([ids.unique().numel() for ids in drawn])
    return StepInfo(
        ids=[[sample.ids for sample in heads] for heads in samples],
        log_u=[[sample.log_u for sample in heads] for heads in samples],
        rows=torch.tensor(rows, dtype=torch.int64, device="cpu"),
        predicted_error=predicted_error,
    )


def _step(
    query: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    stores: Sequence[KVStore],
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    *,
    capture: bool = False,
) -> tuple[AttentionState, list[list[Sample]], Tensor]:
    """The checked step, with `capture` the sample of every head of every sequence, and the predicted errors (B, H)."""
    (B, H, _), dtype = query.shape, query.dtype
    softcap, sink_logits = _checked_softcap(softcap), _checked_sinks(sink_logits, H)
    choosing = any(store.sampled and store.config.sampler in NAMES for store in stores)
    if choosing:  # then there is something to merge, before anything is rounded and before sink logits join
        query = query.float()
        keys, values = (None if x is None else x.float() for x in (keys, values))
    result = native.decode_step(
        [store.view for store in stores],
        query.contiguous(),
        None if keys is None else keys.contiguous(),
        None if values is None else values.contiguous(),
        scale=scale,
        softcap=softcap,
        sink_logits=None if choosing else sink_logits,
        capture=capture,
    )
    if result.faults:
        raise _not_finite(result.faults)
    state = AttentionState(result.output, result.lse)
    samples = [[Sample(*result.samples[b * H + h]) for h in range(H)] for b in range(B)] if capture else []
    if not choosing:
        return state, samples, result.predicted_error
    for b, store in enumerate(stores):
        if not store.settled:
            continue
        exact = AttentionState(state.output[b], state.lse[b])
        chosen, drawn = _attend_chosen(query[b], store, scale, softcap)
        merged = merge([exact, chosen])
        state.output[b], state.lse[b] = merged.output, merged.lse
        result.predicted_error[b] = math.nan
        if capture:
            samples[b] = drawn
    if sink_logits is not None:
        state = with_sink_logits(state, sink_logits.expand_as(state.lse))
    return AttentionState(state.output.to(dtype), state.lse), samples, result.predicted_error


def _attend_chosen(query: Tensor, store: KVStore, scale: float, softcap: float) -> tuple[AttentionState, list[Sample]]:
    """Attention of the heads (H, D) of one sequence over rows that samplers.py chooses, and which these are."""
    first = store.config.sinks
    body = [keys for keys, _ in store.blocks(first, store.indexed_to)]
    samples = [
        Sample(first + sample.ids, sample.log_u)
        for sample in draw(
            store.config,
            query,
            body,
            position=store.length,
            scale=scale,
            softcap=softcap or None,
            pages=store.pages,
        )
    ]
    store.count_drawn([len(sample.ids) for sample in samples])
    group = len(query) // store.kv_heads
    states = [
        native.attend(q, store.rows(h // group), sample.ids, sample.log_u, scale=scale, softcap=softcap)
        for h, (q, sample) in enumerate(zip(query, samples, strict=True))
    ]
    state = AttentionState(torch.stack([s.output for s in states]), torch.stack([s.lse for s in states]))
    return state, samples


def _not_finite(faults: list[int]) -> NotFiniteError:
    """What kept sequences out of a step, from the native faults of all of them."""
    found = [(b, native.FAULTS[fault]) for b, fault in enumerate(faults) if fault]
    message = f"{found[0][1]} has entries that are not finite, or too large for the store"
    if len(faults) == 1:
        return NotFiniteError(message)
    return NotFiniteError(f"{message}, in sequence {', '.join(str(b) for b, _ in found)} of {len(faults)}")


def _check_query(query: Tensor, stores: Sequence[KVStore], scale: float) -> None:
    if len(stores) == 0:
        raise ValueError("stores is empty; one store per sequence is needed")
    first = stores[0]
    G, D = first.kv_heads, first.head_dim
    if len(stores) > 1:
        if any((store.kv_heads, store.head_dim) != (G, D) for store in stores):
            raise ValueError("stores differ in kv_heads or head_dim; one step takes stores of one layer")
        if len({id(store) for store in stores}) < len(stores):
            raise ValueError("stores has the same store twice; fork it")
    shape = query.shape
    if len(shape) != 3 or shape[0] != len(stores) or shape[2] != D:
        raise ValueError(f"query has shape {tuple(shape)}; expected ({len(stores)}, H, {D})")
    H = shape[1]
    if H < 1 or H % G or H // G > native.MAX_GROUP:
        raise ValueError(
            f"query has {H} heads; expected a multiple of kv_heads={G}, at most {native.MAX_GROUP} times it"
        )
    if not query.is_cpu:
        raise ValueError(f"query is on {query.device}; decoding reads stores in host memory and needs it on the cpu")
    native.dtype_code(query.dtype)
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be finite")


def _check_new(query: Tensor, keys: Tensor, values: Tensor, stores: Sequence[KVStore]) -> None:
    expected = (len(stores), stores[0].kv_heads, stores[0].head_dim)
    for name, x in (("keys", keys), ("values", values)):
        if x.shape != expected:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected {expected}")
        if x.dtype != query.dtype or not x.is_cpu:
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
