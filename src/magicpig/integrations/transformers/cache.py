"""A transformers cache whose full-attention layers live in `KVStore`s, one per sequence.

`update` cannot store anything yet: which of the new tokens are padding is known only where the attention mask is. So it
hands the new keys and values on as `PendingTokens`, and the attention function (attention.py) calls
`MagicPigLayer.attend` with them. Positions count padding, as everywhere in transformers; stores hold real tokens only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from magicpig.config import Config
from magicpig.decode import LayerDecoder, decode_step
from magicpig.errors import ArgumentError, ArgumentTypeError
from magicpig.integrations.transformers import compat
from magicpig.integrations.transformers.blocks import see_blocks
from magicpig.integrations.transformers.compat import Cache, CacheLayerMixin
from magicpig.integrations.transformers.errors import (
    CacheMismatchError,
    CacheStateError,
    GradientError,
    OpaqueTokensError,
    UnsupportedModelError,
)
from magicpig.prefill import attend_store
from magicpig.store import PREDICTING, KVStore, PredictedErrors

Part = TypeVar("Part", "MagicPigCache", "MagicPigLayer")

SUPPORTED_LAYERS = ("full_attention", "sliding_attention")


class MagicPigCache(Cache):
    """What `model.generate(cache=...)` and `model(cache=...)` take to attend by sampling.

    transformers before 5.24 calls the argument `past_key_values`; `generate` of an attached model takes both names.

    model_config: the model's; config: ours. Layers of sliding attention keep the stock cache of transformers.
    Every sequence of the batch has a store of its own per layer, so its result does not depend on the others.
    Raises UnsupportedModelError for models with layers of any other kind; ValueError for settings of layers that the
    model has not got.
    """

    def __init__(self, model_config: PreTrainedConfig, config: Config | None = None) -> None:
        self.config = Config() if config is None else config
        decoder = model_config.get_text_config(decoder=True)
        types, settings = compat.layer_types(decoder)
        if shared := types.count(compat.SHARED):
            raise UnsupportedModelError(
                decoder.model_type,
                f"its last {shared} layers attend to the keys of earlier ones (num_kv_shared_layers)",
            )
        if unsupported := sorted(set(types) - set(SUPPORTED_LAYERS)):
            raise UnsupportedModelError(decoder.model_type, f"it has layers of type {', '.join(unsupported)}")
        for index in self.config.layers:
            if index >= len(types):
                raise ArgumentError(f"layers.{index}: the model has layers 0 to {len(types) - 1}")
            if types[index] != "full_attention":
                raise ArgumentError(f"layers.{index}: the layer attends to a sliding window, of which all is read")
        layers: list[Any] = [
            MagicPigLayer(self.config.of_layer(index), index)
            if kind == "full_attention"
            else compat.new_layer(kind, kw)
            for index, (kind, kw) in enumerate(zip(types, settings, strict=True))
        ]
        super().__init__(layers=layers)

    # The store is no business of torch.compile, here and in the attention function.
    @compat.opaque
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx >= len(self.layers):
            raise CacheMismatchError(
                f"the cache is of another model: it has {len(self.layers)} layers, the model at least {layer_idx + 1}"
            )
        first: Any = self.layers[0]
        layer: Any = self.layers[layer_idx]
        states = layer.update(key_states, value_states, *args, **kwargs)
        if layer.get_seq_length() != first.get_seq_length():
            raise CacheStateError(
                f"layers 0 and {layer_idx} have not seen the same tokens: a forward pass was interrupted; "
                "use a new MagicPigCache"
            )
        return states

    def fork(self, config: Config | None = None) -> MagicPigCache:
        """A cache that holds the same tokens and goes its own way; the two share memory until one of them writes.

        config: how the new cache attends, if not as this one: one prompt, read once, then serves many settings. A
        ValueError when the keys have been indexed by the old setting already, at the first decode step or by `settle`.
        The report of the new cache counts what it reads itself.
        """
        other = _shallow(self)
        other.config = self.config if config is None else config
        other.layers = [
            # Stock layers replace their tensors and never write into them.
            layer.fork(config and config.of_layer(index)) if isinstance(layer, MagicPigLayer) else copy.copy(layer)
            for index, layer in enumerate(self.layers)
        ]
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> MagicPigCache:
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ArgumentTypeError(
            "a MagicPigCache cannot be pickled; fork() or copy.deepcopy makes a copy in this process, another process "
            "has to read the tokens again"
        )

    def settle(self) -> None:
        """Indexes now what the first decode step would index.

        From then on a forward pass of up to `config.decode_tokens` tokens is sampled, not only one of a single token:
        the way of a server that has read a document before the question comes.
        """
        for layer in self.layers:
            for store in layer.stores if isinstance(layer, MagicPigLayer) else ():
                store.settle()

    @contextmanager
    def filling(self) -> Iterator[None]:
        """For prefill of which only the keys and values are wanted: the outputs and logits of the model mean nothing.

        Nothing depends on the last layer's attention but these, so it only stores its tokens.
        """
        last = self.layers[-1]
        if isinstance(last, MagicPigLayer):
            last.attends = False
        try:
            yield
        finally:
            if isinstance(last, MagicPigLayer):
                last.attends = True

    def report(self) -> CacheReport:
        """What the cache holds, and what decoding has read so far."""
        return CacheReport(tuple(_report(index, layer) for index, layer in enumerate(self.layers)))


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
    """The keys and values of one full-attention layer, for B sequences. config: of this layer (`Config.of_layer`)."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.config = config
        self.index = index
        # Set while an assistant proposes tokens: several new tokens are then decoding, and `crop` will follow. Only the
        # first proposals come together with the prompt and are judged by exact attention, as the prompt is.
        self.record_past = False
        self.attends = True
        self.query_heads = 0
        self._forget()

    def _forget(self) -> None:
        self.stores: list[KVStore] = []
        self.positions = 0
        self.is_initialized = False
        # (B, positions) on the CPU, False for padding; None while there was none.
        self._real: Tensor | None = None
        self._pending: PendingTokens | None = None
        self._undo: dict[int, _Checkpoint] = {}
        self._work = _Work()
        self._decoder: LayerDecoder | None = None  # of these stores

    # --- what models and masks ask ------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, G, _, D = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        sampled = not self.config.is_dense(self.index)
        self.stores = [KVStore(G, D, self.dtype, self.config, sampled=sampled, layer=self.index) for _ in range(B)]
        self._decoder = None
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Returns the new tokens twice, as `PendingTokens`, where other caches return all keys and all values."""
        refuse_gradients(key_states, value_states)
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
        self._check_attended()
        self._pending = PendingTokens(self, key_states, value_states)
        self._undo.clear()
        self.positions += key_states.shape[2]
        return self._pending, self._pending

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
        if T == 1 and mask is None and self._real is None and sink_logits is None:
            decoder = self._decoder
            if decoder is None or self.query_heads != H or decoder.scale != scale or decoder.softcap != softcap:
                decoder = self._decoder = LayerDecoder(self.stores, H, scale=scale, softcap=softcap)
            if decoder.takes(query, pending.keys, pending.values):
                self._pending = None
                self.query_heads = H
                return decoder.step(query, pending.keys, pending.values)
        real = self._new_tokens(mask, T)
        blocks = mask[:, -T:].to("cpu") if mask is not None and bool((mask[:, -T:] > 1).any()) else None
        self._pending = None
        self.query_heads = H
        keys, values = _on_cpu(pending.keys, self.dtype), _on_cpu(pending.values, self.dtype)
        queries = _on_cpu(query, self.dtype)
        sink_logits = None if sink_logits is None else _on_cpu(sink_logits, torch.float32)
        rule: dict[str, Any] = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
        if T == 1 and real is None:
            state = decode_step(queries.squeeze(2), keys.squeeze(2), values.squeeze(2), self.stores, **rule)
            output = state.output.unsqueeze(1)
        else:
            output = torch.zeros(B, T, H, D, dtype=self.dtype, device="cpu")
            for row in range(B):
                chosen = slice(None) if real is None else real[row].nonzero()[:, 0]
                q, k, v = queries[row][:, chosen], keys[row][:, chosen], values[row][:, chosen]
                if q.shape[1] > 0:
                    groups = None if blocks is None else blocks[row, chosen]
                    given: dict[str, Any] = {"decode": T == 1, "groups": groups, "rule": rule}
                    output[row, chosen] = self._attend_row(row, q, k, v, **given).transpose(0, 1)
        return output if queries is query else output.to(query.device, query.dtype)

    def _attend_row(
        self,
        row: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        decode: bool,
        groups: Tensor | None,
        rule: dict[str, Any],
    ) -> Tensor:
        """The new real tokens of one sequence: q (H, n, D), k and v (G, n, D), groups (n,). Returns (H, n, D)."""
        store, n = self.stores[row], q.shape[1]
        if groups is not None and bool((groups > 1).any()):  # exact: the sample of a token does not look ahead
            store.append(k, v)
            return see_blocks(attend_store(q, store, **rule), q, k, v, groups, rule).output
        if n <= self.config.decode_tokens and (store.settled or (self.record_past and store.length >= store.due)):
            decode = True
        if not decode:
            store.append(k, v)
            return attend_store(q, store, **rule).output if self.attends else torch.zeros_like(q)
        if self.record_past and store.length < store.due < store.length + n:
            # Indexing happens on the way. If `crop` then goes back before it, it must not have happened.
            self._undo[row] = _Checkpoint(store.fork(), k, v)
        steps = [decode_step(q[None, :, t], k[None, :, t], v[None, :, t], [store], **rule).output for t in range(n)]
        return torch.cat(steps).transpose(0, 1)

    def _check_attended(self) -> None:
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

    def fork(self, config: Config | None = None) -> MagicPigLayer:
        """As `MagicPigCache.fork`, of one layer."""
        self._check_attended()
        other = _shallow(self)
        if config is not None:
            if any(store.settled for store in self.stores):
                raise ArgumentError(
                    f"layer {self.index} has indexed its keys by the config it has; "
                    "fork with another one right after the prompt was read"
                )
            other.config = config
        sampled = not other.config.is_dense(self.index)
        other.stores = [store.fork(config, sampled=sampled) for store in self.stores]
        other._undo = {row: _Checkpoint(c.store.fork(), c.keys, c.values) for row, c in self._undo.items()}
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
        before, taken = self.stores, set()
        self.stores, self._decoder = [], None
        for row in rows:
            self.stores.append(before[row].fork() if row in taken else before[row])
            taken.add(row)
        for row in set(range(len(before))) - taken:
            self._work.add(before[row])
        if self._real is not None:
            self._real = self._real[rows]
        self._undo.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` positions, padded ones included; a negative number or 0."""
        if tokens_to_remove > 0:
            raise ArgumentError(f"tokens_to_remove={tokens_to_remove} must be negative: minus the tokens to remove")
        positions = max(0, self.positions + tokens_to_remove)
        self._decoder = None
        for row, store in enumerate(self.stores):
            removed = self.positions - positions
            if self._real is not None:
                removed = int(self._real[row, positions:].sum())
            length = store.length - removed
            if removed and row in self._undo:
                self._work.add(store)
                self.stores[row] = self._undo[row].replay(length)
            else:
                store.crop(length)
        self._undo.clear()
        self.positions = positions
        if self._real is not None:
            self._real = self._real[:, :positions]

    def offload(self) -> None: ...
    def prefetch(self) -> None: ...

    def work(self) -> _Work:
        """What all decode steps so far have read, those of sequences that are gone included."""
        total = _Work(self._work.sampled, self._work.body, self._work.largest)
        for store in self.stores:
            total.add(store)
        return total


@dataclass
class _Checkpoint:
    """A store before several tokens were decoded at once, and those tokens (G, n, D)."""

    store: KVStore
    keys: Tensor
    values: Tensor

    def replay(self, length: int) -> KVStore:
        """The store after the first tokens only, as if they had been decoded one by one."""
        for t in range(length - self.store.length):
            if self.store.length >= self.store.due:
                self.store.index_due()
            self.store.append(self.keys[:, t : t + 1], self.values[:, t : t + 1])
        return self.store


@dataclass
class _Work:
    """Over query heads and steps: keys sampled, of how many; the largest share; the predicted errors."""

    sampled: int = 0
    body: int = 0
    largest: float = 0.0
    predicted: PredictedErrors | None = None

    def add(self, store: KVStore) -> None:
        stats = store.stats
        self.sampled += stats.sampled_rows
        self.body += stats.body_rows
        self.largest = max(self.largest, stats.max_share)
        if stats.predicted.count + stats.predicted.unknown and store.config.sampler in PREDICTING:
            self.predicted = stats.predicted if self.predicted is None else self.predicted + stats.predicted


def refuse_gradients(*tensors: Tensor) -> None:
    """Raises GradientError: what goes through a store is cut out of the graph."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise GradientError(
            "attention over a MagicPigCache has no gradients: for a loss, pass use_cache=False, or detach(model) and "
            "train with sdpa; to generate or read, use torch.no_grad()"
        )


def _shallow(x: Part) -> Part:
    other = object.__new__(type(x))
    other.__dict__.update(x.__dict__)
    return other


def _on_cpu(x: Tensor, dtype: torch.dtype) -> Tensor:
    # Most often it is there already; asking costs a tenth of a call.
    if x.is_cpu and x.dtype == dtype and not x.requires_grad:
        return x
    return x.detach().to("cpu", dtype)


# --- report -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerReport:
    """One layer, all sequences of the batch together.

    kind: "sampled", "dense" (full attention that stays exact) or "sliding" (the stock cache of transformers).
    tokens: tokens held. indexed: of these, the ones that are sampled; the others are read by every step.
    sampled_share_mean, sampled_share_max: of the indexed keys, the share that a query head read in a decode step;
    None before the first sampled step.
    predicted_error_mean, _p95, _max: of the relative error that each step and query head predicted of its own output;
    None before that, and for samplers for comparison, which predict nothing.
    predicted_error_unknown: the share of steps and heads that could not say: nothing was drawn, or values are huge;
    the others leave these out.
    kv_bytes: memory of keys and values. index_bytes: memory of the hash tables, or of what else finds keys. What beams
    share is counted for each.
    full_step_bytes: keys and values that one step of full attention over `tokens` reads.
    read_step_bytes: keys and values that one step reads now, at the mean share; query heads that share a key/value
    head are counted as if no two of them drew the same row, unless they share their sample.
    """

    layer: int
    kind: str
    tokens: int
    indexed: int
    sampled_share_mean: float | None
    sampled_share_max: float | None
    predicted_error_mean: float | None
    predicted_error_p95: float | None
    predicted_error_max: float | None
    predicted_error_unknown: float | None
    kv_bytes: int
    index_bytes: int
    full_step_bytes: int
    read_step_bytes: int


@dataclass(frozen=True)
class CacheReport:
    """Layer by layer; the totals, under the same names, are properties."""

    layers: tuple[LayerReport, ...]

    @property
    def tokens(self) -> int:
        """Of the longest layer, all sequences together."""
        return max((layer.tokens for layer in self.layers), default=0)

    @property
    def sampled_share_mean(self) -> float | None:
        """Mean over the layers that sample, None if none has yet."""
        shares = [layer.sampled_share_mean for layer in self.layers if layer.sampled_share_mean is not None]
        return sum(shares) / len(shares) if shares else None

    @property
    def sampled_share_max(self) -> float | None:
        """Largest of any layer, step and head; None if no layer has sampled yet."""
        return max((x.sampled_share_max for x in self.layers if x.sampled_share_max is not None), default=None)

    @property
    def predicted_error_mean(self) -> float | None:
        """Mean over the layers that predict one."""
        errors = [x.predicted_error_mean for x in self.layers if x.predicted_error_mean is not None]
        return sum(errors) / len(errors) if errors else None

    @property
    def predicted_error_p95(self) -> float | None:
        """That of the layer where it is largest."""
        return max((x.predicted_error_p95 for x in self.layers if x.predicted_error_p95 is not None), default=None)

    @property
    def predicted_error_max(self) -> float | None:
        """Largest of any layer, step and head."""
        return max((x.predicted_error_max for x in self.layers if x.predicted_error_max is not None), default=None)

    @property
    def predicted_error_unknown(self) -> float | None:
        """Mean over the layers that predict one."""
        shares = [x.predicted_error_unknown for x in self.layers if x.predicted_error_unknown is not None]
        return sum(shares) / len(shares) if shares else None

    @property
    def kv_bytes(self) -> int:
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def index_bytes(self) -> int:
        return sum(layer.index_bytes for layer in self.layers)

    @property
    def full_step_bytes(self) -> int:
        return sum(layer.full_step_bytes for layer in self.layers)

    @property
    def read_step_bytes(self) -> int:
        return sum(layer.read_step_bytes for layer in self.layers)


def _report(index: int, layer: Any) -> LayerReport:
    if not isinstance(layer, MagicPigLayer):
        held = 0 if layer.keys is None else layer.keys.nbytes + layer.values.nbytes
        tokens = 0 if layer.keys is None or held == 0 else layer.keys.shape[0] * layer.keys.shape[2]
        return LayerReport(index, "sliding", tokens, 0, None, None, None, None, None, None, held, 0, held, held)
    work = layer.work()
    share = work.sampled / work.body if work.body else None
    kind = "dense" if layer.config.is_dense(index) else "sampled"
    tokens = indexed = kv_bytes = index_bytes = full = read = 0
    for store in layer.stores:
        use = store.nbytes()
        kv_bytes, index_bytes = kv_bytes + use.rows, index_bytes + use.index
        row = store.layout.bytes_read
        body = max(0, store.indexed_to - store.config.sinks) if store.settled else 0
        drawing = store.kv_heads if store.config.sampler == "sketch" else layer.query_heads
        drawn = min(store.kv_heads, drawing * (share or 0.0)) * body
        tokens, indexed = tokens + store.length, indexed + body
        full += store.length * store.kv_heads * row
        read += round(((store.length - body) * store.kv_heads + drawn) * row)
    largest = work.largest if work.body else None
    predicted: tuple[float | None, float | None, float | None] = (None, None, None)
    unknown = None
    if (errors := work.predicted) is not None:
        unknown = errors.unknown / (errors.count + errors.unknown)
        if errors.count:
            predicted = errors.mean, errors.quantile(0.95), errors.largest
    return LayerReport(
        index, kind, tokens, indexed, share, largest, *predicted, unknown, kv_bytes, index_bytes, full, read
    )
