"""One full-attention layer of a cache: its keys and values live in `KVStore`s, one per sequence.

`update` cannot store anything yet: which of the new tokens are padding is known only where the attention mask is. So it
hands the new keys and values on as `PendingTokens`, and the attention function (attention.py) calls
`MagicPigLayer.attend` with them. Positions count padding, as everywhere in transformers; stores hold real tokens only.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from magicpig.attention.step import LayerDecoder, Phase, Segment, attend_layer
from magicpig.config import Config
from magicpig.errors import ArgumentError, MagicPigError
from magicpig.integrations.transformers.blocks import see_blocks
from magicpig.integrations.transformers.compat import CacheLayerMixin
from magicpig.integrations.transformers.errors import (
    CacheMismatchError,
    CacheStateError,
    GradientError,
    OpaqueTokensError,
    UnsupportedModelError,
)
from magicpig.kernels.arena import UNLIMITED, Arena, Memory, unique_bytes
from magicpig.placement import CPU, Placement
from magicpig.report import LayerReport, PredictedErrors
from magicpig.store import KVStore
from magicpig.types import AttentionState

Part = TypeVar("Part")


class PendingTokens:
    """Keys and values (B, G, T, D) on their way from `update` to the attention function; stands in for both tensors."""

    __slots__ = ("keys", "layer", "values")

    def __init__(self, layer: MagicPigLayer, keys: Tensor, values: Tensor) -> None:
        self.layer = layer
        self.keys = keys
        self.values = values

    def __getattr__(self, name: str) -> NoReturn:
        raise OpaqueTokensError(None, _CHANGED.format(name))

    @classmethod
    def __torch_function__(cls, function: Any, *_: Any) -> NoReturn:
        raise OpaqueTokensError(None, _CHANGED.format(getattr(function, "__name__", function)))


_CHANGED = (
    "MagicPigCache holds the keys, there is no {} of them: the model must hand them to attn_implementation='magicpig' "
    "unchanged (see magicpig.attach)"
)


class MagicPigLayer(CacheLayerMixin):
    """The keys and values of one full-attention layer, for B sequences. config: of this layer (`Config.of_layer`).

    place: where the parts of a step run.

    phase: what becomes of new tokens, if that is not to follow from their number. errors: of sequences that failed.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, config: Config, index: int, arena: Arena = UNLIMITED, place: Placement = CPU) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.config = config
        self.index = index
        self.arena = arena
        self.place = place
        self._here = torch.device("cpu") if place.accelerator is None else place.accelerator.torch_device
        self.last = False  # of the layers of its kind
        self.phase: Phase | None = None
        # Set while an assistant proposes tokens: several new tokens are then decoding, and `crop` will follow. Only the
        # first proposals come together with the prompt and are judged by exact attention, as the prompt is.
        self.record_past = False
        self.query_heads = 0
        self._forget()

    def _forget(self) -> None:
        self.stores: list[KVStore] = []
        self.positions = 0
        self.is_initialized = False
        # (B, positions) on the CPU, False for padding; None while there was none.
        self._real: Tensor | None = None
        self._pending: PendingTokens | None = None
        self.errors: dict[int, MagicPigError] = {}
        self._work = _Work()
        self._decoder: LayerDecoder | None = None  # of these stores

    # --- what models and masks ask ------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, G, _, D = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        sampled = not self.config.is_dense(self.index)
        place: dict[str, Any] = {"sampled": sampled, "layer": self.index, "arena": self.arena}
        self.stores = [KVStore(G, D, self.dtype, self.config, **place) for _ in range(B)]
        self._decoder = None
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns the new tokens twice, as `PendingTokens`, where other caches return all keys and all values."""
        refuse_gradients(key_states, value_states)
        if self._decoder is None or not (key_states.shape == value_states.shape == self._decoder.new_shape):
            self._check_new(key_states, value_states)
        self.check_attended()
        self._pending = PendingTokens(self, key_states, value_states)
        self.positions += key_states.shape[2]
        return self._pending, self._pending

    def _check_new(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes stores for the first tokens; raises where later ones do not fit them."""
        if key_states.shape != value_states.shape:
            raise UnsupportedModelError(
                None, f"its keys have shape {tuple(key_states.shape)} and its values {tuple(value_states.shape)}"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.check_fits(key_states.shape[1], key_states.shape[3])
        if key_states.shape[0] != len(self.stores):
            raise ArgumentError(
                f"a batch of {key_states.shape[0]} does not fit this cache, which holds {len(self.stores)} sequences; "
                "use a new MagicPigCache"
            )

    def check_fits(self, kv_heads: int, head_dim: int) -> None:
        """Raises CacheMismatchError if the layer holds keys of another shape."""
        if self.stores and (self.stores[0].kv_heads, self.stores[0].head_dim) != (kv_heads, head_dim):
            held = self.stores[0]
            raise CacheMismatchError(
                f"the cache is of another model: its layer {self.index} holds {held.kv_heads} key/value heads of "
                f"{held.head_dim} numbers, not {kv_heads} of {head_dim}"
            )

    def check_pending(self, pending: PendingTokens) -> None:
        """Raises UnsupportedModelError if these are not the tokens that came last."""
        if pending is not self._pending:
            raise UnsupportedModelError(None, "several of its layers attend to the same keys")

    def get_seq_length(self) -> int:
        return self.positions

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.positions + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return len(self.stores)

    # --- attention ----------------------------------------------------------------------------------------------------

    def attend(
        self,
        query: Tensor,
        pending: PendingTokens,
        mask: Tensor | None,
        *,
        scale: float,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Stores the pending tokens and attends over everything stored. A padded token attends to nothing: zeros.

        query: (B, H, T, D); mask: (B, positions) with zeros for padding and blocks as in blocks.py, None if there are
        none.
        Returns (B, T, H, D) on the query's device, in its dtype.
        """
        self.check_pending(pending)
        B, H, T, D = query.shape
        if T == 1 and mask is None and self._real is None and sink_logits is None and not self.errors:
            decoder = self._decoder
            if decoder is None or self.query_heads != H or decoder.scale != scale or decoder.softcap != softcap:
                decoder = self._decoder = LayerDecoder(
                    self.stores, H, scale=scale, softcap=softcap, placement=self.place
                )
            if self.phase in (None, Phase.DECODE) and decoder.takes(query, pending.keys, pending.values):
                self._pending = None
                self.query_heads = H
                output, errors = decoder.step(query, pending.keys, pending.values)
                if errors is not None:
                    self._failed(dict(enumerate(errors)))
                return output
        real = self._new_tokens(mask, T)
        blocks = mask[:, -T:].to("cpu") if mask is not None and bool((mask[:, -T:] > 1).any()) else None
        self._pending = None
        self.query_heads = H
        here = self._here
        keys, values = _on(here, pending.keys, self.dtype), _on(here, pending.values, self.dtype)
        queries = _on(here, query, self.dtype)
        sink_logits = None if sink_logits is None else _on(torch.device("cpu"), sink_logits, torch.float32)
        real = torch.ones(B, T, dtype=torch.bool, device="cpu") if real is None else real.clone()
        output = torch.zeros(B, T, H, D, dtype=self.dtype, device=here)
        for row in self.errors:
            output[row, real[row]] = math.nan
            real[row] = False
        rows, segments, begin = [], [], 0
        for row, count in enumerate(real.sum(1).tolist()):
            if count > 0:
                store = self.stores[row]
                looking_ahead = blocks is not None and bool((blocks[row, real[row]] > 1).any())
                phase = Phase.PREFILL if looking_ahead else self._phase_of(store, count, T)
                rows.append(row)
                segments.append(Segment(store, begin, count, phase))
                begin += count
        if segments:
            rule: dict[str, Any] = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
            q, k, v = (_tokens(x, real) for x in (queries, keys, values))
            result = attend_layer(segments, q, k, v, placement=self.place, **rule)
            if blocks is not None:
                groups = blocks[real].to(here)
                for segment in segments:
                    at = slice(segment.begin, segment.begin + segment.count)
                    if bool((groups[at] > 1).any()):  # exact: the sample of a token does not look ahead
                        seen = AttentionState(result.output[at].transpose(0, 1), result.lse[at].transpose(0, 1))
                        own_q, own_k, own_v = (x[at].transpose(0, 1) for x in (q, k, v))
                        seen = see_blocks(seen, own_q, own_k, own_v, groups[at], rule)
                        result.output[at] = seen.output.transpose(0, 1)
            output[real] = result.output
            self._failed(dict(zip(rows, result.errors, strict=True)))
        if self.last:
            self.place.rest()
        return output if queries is query else output.to(query.device, query.dtype)

    def _phase_of(self, store: KVStore, count: int, T: int) -> Phase:
        # Proposals of an assistant that follow a prompt are decoded; those with it are judged exactly, as it is.
        unsaid = self.phase is None and (T == 1 or (self.record_past and store.length > 0))
        decode = unsaid or self.phase is Phase.DECODE
        # Where nothing would be sampled both are the same attention, and prefill takes all tokens at once.
        if decode and (count == 1 or store.policy.index_end(store.length + count - 1, store.spec.stride) > 0):
            return Phase.DECODE
        if self.phase is Phase.STORE or self.phase is Phase.VERIFY:
            return self.phase
        return Phase.PREFILL

    def _failed(self, errors: dict[int, MagicPigError | None]) -> None:
        """Notes which sequences have failed; raises where none is left."""
        new = {row: error for row, error in errors.items() if error is not None and row not in self.errors}
        if not new:
            return
        self.errors |= new
        if len(self.errors) == len(self.stores):
            raise next(iter(new.values()))
        for row, error in new.items():
            warnings.warn(
                f"sequence {row} of the batch has failed and is NaN from here on: {error} (layer {self.index})",
                stacklevel=2,
            )

    def check_attended(self) -> None:
        """Raises where a forward pass was interrupted."""
        if self._pending is not None:
            raise CacheStateError(
                f"layer {self.index} never attended to the last tokens it was given: a forward pass was interrupted; "
                "use a new MagicPigCache"
            )

    def _new_tokens(self, mask: Tensor | None, T: int) -> Tensor | None:
        """Remembers the padding. Returns which of the T newest positions hold tokens, (B, T), or None if all do."""
        if mask is None and self._real is None:
            return None
        shape = (len(self.stores), self.positions)
        if mask is not None and mask.shape != shape:
            raise ArgumentError(f"attention_mask has shape {tuple(mask.shape)}; expected {shape} with this cache")
        real = torch.ones(shape, dtype=torch.bool, device="cpu") if mask is None else mask.to("cpu", torch.bool)
        past = self.positions - T
        stored = True if self._real is None else self._real
        if not bool((real[:, :past] == stored).all()):
            row, position = (real[:, :past] != stored).nonzero()[0].tolist()
            raise ArgumentError(
                f"attention_mask has changed for a token that is already in the cache (sequence {row}, position "
                f"{position}); pass attention_mask explicitly, as in the calls before and with a 1 for each new token "
                "(without it generate() masks every token that equals pad_token_id)"
            )
        self._real = real
        new = real[:, past:]
        return None if bool(new.all()) else new

    # --- beams, several answers, rollback -----------------------------------------------------------------------------

    def reset(self) -> None:
        self._forget()

    @property
    def real(self) -> Tensor | None:
        """(B, positions), False for padding; None while there was none."""
        return self._real

    def restore(self, stores: list[KVStore], positions: int, query_heads: int, real: Tensor | None) -> None:
        """Makes the layer hold what another one held."""
        self.stores, self.positions, self.query_heads, self._real = stores, positions, query_heads, real
        self.dtype, self.device = stores[0].dtype, torch.device("cpu")
        self._decoder = None
        self.is_initialized = True

    def fork(self, config: Config | None = None) -> MagicPigLayer:
        """As `MagicPigCache.fork`, of one layer."""
        self.check_attended()
        self.place.rest()
        other = shallow(self)
        other.config = self.config if config is None else config
        sampled = not other.config.is_dense(self.index)
        other.stores = [store.fork(config, sampled=sampled) for store in self.stores]
        other.phase = None
        other.errors = dict(self.errors)
        other._work = _Work()
        other._decoder = None
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> MagicPigLayer:
        return self.fork()

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([row for row in range(len(self.stores)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select((indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices).tolist())

    def _select(self, rows: list[int]) -> None:
        if not self.is_initialized:
            return
        self.place.rest()
        before, taken = self.stores, set()
        self.stores, self._decoder = [], None
        for row in rows:
            self.stores.append(before[row].fork() if row in taken else before[row])
            taken.add(row)
        for row in set(range(len(before))) - taken:
            self._work.add(before[row])
        if self._real is not None:
            self._real = self._real[rows]
        self.errors = {new: self.errors[old] for new, old in enumerate(rows) if old in self.errors}

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` positions, padded ones included; a negative number or 0."""
        if tokens_to_remove > 0:
            raise ArgumentError(f"tokens_to_remove={tokens_to_remove} must be negative: minus the tokens to remove")
        positions = max(0, self.positions + tokens_to_remove)
        self.place.rest()
        self._decoder = None
        for row, store in enumerate(self.stores):
            removed = self.positions - positions
            if self._real is not None:
                removed = int(self._real[row, positions:].sum())
            if row not in self.errors:
                store.crop(store.length - removed)
        self.positions = positions
        if self._real is not None:
            self._real = self._real[:, :positions]

    def offload(self) -> None: ...
    def prefetch(self) -> None: ...

    def work(self) -> _Work:
        """What all decode steps so far have read, those of sequences that are gone included."""
        self.place.flush()
        total = _Work(self._work.sampled, self._work.body, self._work.largest)
        for store in self.stores:
            total.add(store)
        return total


@dataclass
class _Work:
    """Over query heads and steps: keys sampled, of how many; the largest share; the predicted errors."""

    sampled: int = 0
    body: int = 0
    largest: float = 0.0
    whole: int = 0
    predicted: PredictedErrors | None = None

    def add(self, store: KVStore) -> None:
        stats = store.stats
        self.sampled += stats.sampled_rows
        self.body += stats.body_rows
        self.whole += stats.whole_bodies
        self.largest = max(self.largest, stats.max_share)
        if stats.predicted.count + stats.predicted.unknown and store.sampler.predicts:
            self.predicted = stats.predicted if self.predicted is None else self.predicted + stats.predicted


def refuse_gradients(*tensors: Tensor) -> None:
    """Raises GradientError: what goes through a store is cut out of the graph."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise GradientError(
            "attention over a MagicPigCache has no gradients: for a loss, pass use_cache=False, or detach(model) and "
            "train with sdpa; to generate or read, use torch.no_grad()"
        )


def shallow(x: Part) -> Part:
    """A copy of the object that shares all it has."""
    other = object.__new__(type(x))
    other.__dict__.update(x.__dict__)
    return other


def _on(device: torch.device, x: Tensor, dtype: torch.dtype) -> Tensor:
    # Most often it is there already; asking costs a tenth of a call.
    if x.device == device and x.dtype == dtype and not x.requires_grad:
        return x
    return x.detach().to(device, dtype)


def _tokens(x: Tensor, real: Tensor) -> Tensor:
    """The real tokens (n, heads, D) of x (B, heads, T, D), sequence by sequence; a view where that is possible."""
    x = x.transpose(1, 2)
    if bool(real.all()):
        return x[0] if len(x) == 1 else x.flatten(0, 1)
    return x[real]


def layer_report(index: int, layer: Any) -> LayerReport:
    """What a layer of a cache holds and what decoding has read of it; of a stock layer, which reads all it holds."""
    if not isinstance(layer, MagicPigLayer):
        held = 0 if layer.keys is None else layer.keys.nbytes + layer.values.nbytes
        tokens = 0 if layer.keys is None or held == 0 else layer.keys.shape[0] * layer.keys.shape[2]
        return LayerReport(index, "sliding", tokens, 0, None, None, None, None, None, None, held, 0, held, held)
    work = layer.work()
    share = work.sampled / work.body if work.body else None
    kind = "dense" if layer.config.is_dense(index) else "sampled"
    tokens = indexed = full = read = 0
    rows: list[Memory] = []
    index_memory: list[Memory] = []
    for store in layer.stores:
        own_rows, own_index = store.memories()
        rows, index_memory = rows + own_rows, index_memory + own_index
        row, body = store.layout.bytes_read, store.body
        drawing = store.kv_heads if store.sampler.shared else layer.query_heads
        drawn = min(store.kv_heads, drawing * (share or 0.0)) * body
        tokens, indexed = tokens + store.length, indexed + body
        full += store.length * store.kv_heads * row
        read += round(((store.length - body) * store.kv_heads + drawn) * row)
    largest = work.largest if work.body else None
    predicted: tuple[float | None, float | None, float | None] = (None, None, None)
    unknown, known = None, 0
    if (errors := work.predicted) is not None:
        known = errors.count + errors.unknown
        unknown = errors.unknown / known
        if errors.count:
            predicted = errors.mean, errors.quantile(0.95), errors.largest
    held = unique_bytes(rows), unique_bytes(index_memory)
    epsilon = layer.config.epsilon if layer.config.sketches and kind == "sampled" else None
    all_read = work.whole / known if epsilon is not None and known else None
    return LayerReport(
        index, kind, tokens, indexed, share, largest, *predicted, unknown, *held, full, read, epsilon, all_read
    )
