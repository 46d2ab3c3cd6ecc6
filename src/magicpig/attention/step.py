"""One layer of one step: every sequence appends its new tokens and attends, exactly or over a sample.

`attend_layer` is the one way in: segments of any length, settings and phase side by side. What a decode step computes,
told in verbs, is `kernels/algorithm.py`; where its parts run is the affair of its placement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from magicpig.attention.prefill import prefill, prefill_on
from magicpig.errors import ArgumentError, InsufficientMemoryError, MagicPigError, NotFiniteError
from magicpig.kernels.base import MAX_GROUP, check_dtype
from magicpig.placement import CPU, LayerStep, Placement, Rule
from magicpig.placement.base import errors_of
from magicpig.store import KVStore
from magicpig.types import AttentionState, Sample, StepInfo


class Phase(Enum):
    """What becomes of new tokens. STORE: they are kept, and their outputs are zeros. PREFILL: they attend exactly, all
    at once. DECODE: one after the other, each over an index of those before it. VERIFY: all at once, to the bit as if
    each had been decoded without a sampler; for few tokens, all of whose outputs matter.
    """

    STORE = "store"
    PREFILL = "prefill"
    DECODE = "decode"
    VERIFY = "verify"


@dataclass(frozen=True)
class Segment:
    """The new tokens of one sequence: `count` rows of the layer's tensors, from `begin` on."""

    store: KVStore
    begin: int
    count: int
    phase: Phase


@dataclass(frozen=True)
class LayerResult:
    """output: (T, H, D) in the query's dtype. lse: (T, H) float32, natural log. errors: one for each segment, or None.

    The output of a segment with an error is NaN, and its store is as it was before.
    """

    output: Tensor
    lse: Tensor
    errors: list[MagicPigError | None]


def attend_layer(
    segments: Sequence[Segment],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    placement: Placement = CPU,
) -> LayerResult:
    """Appends the new tokens of every segment to its store, and attends over it.

    query: (T, H, D); keys, values: (T, G, D), all of one dtype (float32, bfloat16 or float16), on the CPU, or where the
    placement's accelerator has its tensors, as then is the result; with the tokens of all segments one after the other.
    Stores are those of one layer, each once; their samplers, settings and lengths may differ, and a result does not
    depend on who else is in the step.
    softcap: logits s become softcap * tanh(s / softcap). sink_logits: (H,) join the denominator with value zero.
    placement: where the parts of decode steps run.
    Raises ArgumentError on shapes or dtypes that do not fit; numbers that are not finite are an error of their segment.
    """
    stores = [segment.store for segment in segments]
    _check_stores(stores, query, sum(segment.count for segment in segments), scale, placement)
    _check_new(query, keys, values, stores[0])
    begin = 0
    for segment in segments:
        if segment.begin != begin or segment.count < 1:
            raise ArgumentError(
                f"a segment has begin={segment.begin} and count={segment.count}; expected begin={begin}, behind the "
                "one before, and a token at least"
            )
        begin += segment.count
    rule: dict[str, Any] = {
        "scale": scale,
        "softcap": softcap,
        "sink_logits": _checked_sinks(sink_logits, query.shape[1]),
    }
    lse = torch.full(query.shape[:2], -math.inf, dtype=torch.float32, device=query.device)
    result = LayerResult(torch.zeros_like(query), lse, [None] * len(segments))
    for i, segment in enumerate(segments):
        if segment.phase is not Phase.DECODE:
            _read(i, segment, query, keys, values, result, rule, placement)
    rule["placement"] = placement
    _decode([i for i, s in enumerate(segments) if s.phase is Phase.DECODE], segments, query, keys, values, result, rule)
    return result


def _read(
    i: int,
    segment: Segment,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    result: LayerResult,
    rule: dict[str, Any],
    placement: Placement,
) -> None:
    """Stores the tokens of a segment, and attends exactly where outputs are wanted."""
    at = slice(segment.begin, segment.begin + segment.count)
    q, k, v = (x[at].transpose(0, 1) for x in (query, keys, values))
    length = segment.store.length
    try:
        if segment.phase is Phase.STORE:
            segment.store.append(k, v)
        elif placement.accelerator is not None and segment.phase is Phase.PREFILL:
            state = prefill_on(placement, q, k, v, segment.store, **rule)
            result.output[at], result.lse[at] = state.output.transpose(0, 1), state.lse.T
        elif segment.phase is Phase.VERIFY:
            if placement.accelerator is not None:
                raise ArgumentError("tokens are verified to the bit by the processor alone: placement must be cpu")
            _verify(at, segment.store, query, keys, values, result, rule)
        else:
            state = prefill(q, k, v, segment.store, **rule)
            result.output[at], result.lse[at] = state.output.transpose(0, 1), state.lse.T
    except (NotFiniteError, InsufficientMemoryError) as error:
        segment.store.crop(length)
        result.errors[i] = error
        result.output[at] = math.nan


def _verify(
    at: slice, store: KVStore, query: Tensor, keys: Tensor, values: Tensor, result: LayerResult, rule: dict[str, Any]
) -> None:
    """Step by step in what is computed, but the rows of a stride of the store are read once for all tokens."""
    softcap = _checked_softcap(rule["softcap"])
    begin = at.start
    while begin < at.stop:
        store.make_room()
        end = min(at.stop, begin + store.room)
        q, k, v = (x[begin:end].contiguous() for x in (query, keys, values))
        views = store.exact_views(end - begin)
        own = {"scale": rule["scale"], "softcap": softcap, "sink_logits": rule["sink_logits"]}
        step = store.kernels.decode_step(views, q, k, v, **own)
        if (errors := errors_of(step.faults)) is not None:
            raise next(error for error in errors if error is not None)
        store.grow(end - begin)
        result.output[begin:end], result.lse[begin:end] = step.output, step.lse
        begin = end


def _decode(
    left: list[int],
    segments: Sequence[Segment],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    result: LayerResult,
    rule: dict[str, Any],
) -> None:
    """Token by token, all segments together as long as they have any."""
    before = {i: segments[i].store.length for i in left}
    for i in left:
        at = slice(segments[i].begin, segments[i].begin + segments[i].count)
        if segments[i].count > 1:  # so that none fails on the way
            result.errors[i] = _refusal(segments[i].store, query[at], keys[at], values[at])
    t = 0
    while left := [i for i in left if result.errors[i] is None and t < segments[i].count]:
        rows = [segments[i].begin + t for i in left]
        errors: list[MagicPigError | None] = []
        q, k, v = (x[rows] for x in (query, keys, values))
        state = decode_step(q, k, v, [segments[i].store for i in left], errors=errors, **rule)
        result.output[rows], result.lse[rows] = state.output, state.lse
        for i, error in zip(left, errors, strict=True):
            if error is not None:
                segments[i].store.crop(before[i])
                result.errors[i] = error
        t += 1
    for i in before:
        if result.errors[i] is not None:
            result.output[segments[i].begin : segments[i].begin + segments[i].count] = math.nan


def _refusal(store: KVStore, query: Tensor, keys: Tensor, values: Tensor) -> MagicPigError | None:
    """The error that these tokens (n, H or G, D) would be, if any."""
    if not bool(torch.isfinite(query).all()):
        return NotFiniteError("query has entries that are not finite")
    try:
        store.check_numbers(keys, values)
    except NotFiniteError as error:
        return error
    return None


def decode_step(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    stores: Sequence[KVStore],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    placement: Placement = CPU,
    errors: list[MagicPigError | None] | None = None,
) -> AttentionState:
    """Appends one token to each of B stores and attends over them.

    query: (B, H, D); keys, values: (B, G, D); all of one dtype. Where they are, and the rest, as for `attend_layer`.
    Returns output (B, H, D) in the query's dtype and lse (B, H) float32, natural log.
    errors: an empty list, to which one is appended for each sequence; without one the first is raised, naming all.
    A sequence whose query, keys or values are not finite has NaN for output and is as it was; the others are served.
    """
    _check_stores(stores, query, len(stores), scale, placement)
    _check_new(query, keys, values, stores[0])
    rule = _rule(scale, softcap, sink_logits, query.shape[1])
    found: list[MagicPigError | None] = [None] * len(stores)
    for b, store in enumerate(stores):
        try:
            make_ready([store])
        except InsufficientMemoryError as error:
            found[b] = error
    ready = [b for b, error in enumerate(found) if error is None]
    if len(ready) == len(stores):
        stepped = placement.step(LayerStep(query, keys, values, stores, rule))
        state, found = stepped.state, stepped.errors
    else:
        lse = torch.full(query.shape[:2], math.nan, dtype=torch.float32, device=query.device)
        state = AttentionState(torch.full_like(query, math.nan), lse)
        if ready:
            q, k, v = (x[ready] for x in (query, keys, values))
            own = placement.step(LayerStep(q, k, v, [stores[b] for b in ready], rule))
            state.output[ready], state.lse[ready] = own.state.output, own.state.lse
            for b, error_of in zip(ready, own.errors, strict=True):
                found[b] = error_of
    if errors is not None:
        errors += found
    else:
        _raise_any(found)
    return state


class LayerDecoder:
    """`decode_step` for stores that stay together: what does not change from token to token is checked once.

    Between two layers the weights of a model pass through the caches, and every object that is touched comes from
    memory again: what a step in Python costs is how much of it there is.
    new_shape: of the keys and of the values that `step` takes.
    """

    def __init__(
        self,
        stores: Sequence[KVStore],
        query_heads: int,
        *,
        scale: float,
        softcap: float | None,
        placement: Placement = CPU,
    ) -> None:
        """Raises ArgumentError as `decode_step`."""
        first, B = stores[0], len(stores)
        shape = torch.empty(B, query_heads, first.head_dim, dtype=first.dtype, device="cpu")
        _check_stores(stores, shape, B, scale)
        self.scale, self.softcap = scale, softcap
        self._stores, self._views, self._dtype = stores, [store.view for store in stores], first.dtype
        self._query_shape = (B, query_heads, 1, first.head_dim)
        self.new_shape = (B, first.kv_heads, 1, first.head_dim)
        self._step = placement.repeated(stores, query_heads, scale, _checked_softcap(softcap))

    def takes(self, query: Tensor, keys: Tensor, values: Tensor) -> bool:
        """Whether they are what `step` expects, and the placement has such a step. If not, take `attend_layer`."""
        return (
            self._step is not None
            and query.shape == self._query_shape
            and keys.shape == self.new_shape
            and values.shape == self.new_shape
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

    def step(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, list[MagicPigError | None] | None]:
        """Appends one token to each store and attends over them: query (B, H, 1, D), keys and values (B, G, 1, D).

        All as `takes` asks for. Returns (B, 1, H, D), and the errors of the sequences as `decode_step`, None if there
        are none.
        """
        make_ready(self._stores)
        assert self._step is not None
        output, faults = self._step(self._views, query, keys, values)
        return output, errors_of(faults)


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
    placement: Placement = CPU,
) -> tuple[AttentionState, StepInfo]:
    """The same attention without a new token, with the sample of every head. Shapes as in `decode_step`.

    Over the index as it stands: `KVStore.settle` brings it up to the length. Raises NotFiniteError.
    """
    _check_stores(stores, query, len(stores), scale, placement)
    for store in stores:
        store.tidy()
    rule = _rule(scale, softcap, sink_logits, query.shape[1])
    stepped = placement.step(LayerStep(query, None, None, stores, rule, capture=True))
    _raise_any(stepped.errors)
    return stepped.state, step_info(stepped.samples, stepped.predicted_error, stores[0].kv_heads)


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


def _raise_any(errors: Sequence[MagicPigError | None]) -> None:
    """Raises the first error, naming the sequences that have one."""
    found = [b for b, error in enumerate(errors) if error is not None]
    if not found:
        return
    first = errors[found[0]]
    assert first is not None
    if len(errors) == 1:
        raise first
    raise type(first)(f"{first}, in sequence {', '.join(map(str, found))} of {len(errors)}")


def _check_stores(
    stores: Sequence[KVStore], query: Tensor, tokens: int, scale: float, placement: Placement = CPU
) -> None:
    if len(stores) == 0:
        raise ArgumentError("stores is empty; one store per sequence is needed")
    first = stores[0]
    G, D = first.kv_heads, first.head_dim
    if len(stores) > 1:
        if any((store.kv_heads, store.head_dim) != (G, D) for store in stores):
            raise ArgumentError("stores differ in kv_heads or head_dim; one step takes stores of one layer")
        if any(store.kernels is not first.kernels for store in stores):
            raise ArgumentError("stores differ in kernels; one step is one computation")
        if len({id(store) for store in stores}) < len(stores):
            raise ArgumentError("stores has the same store twice; fork it")
    shape = query.shape
    if len(shape) != 3 or shape[0] != tokens or shape[2] != D:
        raise ArgumentError(f"query has shape {tuple(shape)}; expected ({tokens}, H, {D})")
    H = shape[1]
    if H < 1 or H % G or H // G > MAX_GROUP:
        raise ArgumentError(f"query has {H} heads; expected a multiple of kv_heads={G}, at most {MAX_GROUP} times it")
    if not query.is_cpu and (placement.accelerator is None or query.device != placement.accelerator.torch_device):
        raise ArgumentError(f"query is on {query.device}; decoding reads stores in host memory and needs it on the cpu")
    check_dtype(query.dtype)
    if not math.isfinite(scale):
        raise ArgumentError(f"scale={scale} must be finite")


def _check_new(query: Tensor, keys: Tensor, values: Tensor, store: KVStore) -> None:
    expected = (len(query), store.kv_heads, store.head_dim)
    for name, x in (("keys", keys), ("values", values)):
        if x.shape != expected:
            raise ArgumentError(f"{name} has shape {tuple(x.shape)}; expected {expected}")
        if x.dtype != query.dtype or x.device != query.device:
            raise ArgumentError(
                f"{name} is {x.dtype} on {x.device}; expected {query.dtype} on {query.device} as the query"
            )


def _rule(scale: float, softcap: float | None, sink_logits: Tensor | None, heads: int) -> Rule:
    return Rule(scale, _checked_softcap(softcap), _checked_sinks(sink_logits, heads))


def _checked_softcap(softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    if not 0 < softcap < math.inf:
        raise ArgumentError(f"softcap={softcap} must be positive and finite")
    return softcap


def _checked_sinks(sink_logits: Tensor | None, heads: int) -> Tensor | None:
    if sink_logits is None:
        return None
    if sink_logits.shape != (heads,):
        raise ArgumentError(f"sink_logits has shape {tuple(sink_logits.shape)}; expected ({heads},)")
    return sink_logits.detach().to("cpu", torch.float32).contiguous()
