"""One packed forward pass: the pieces of many requests side by side, as one sequence (1, T), through the model's code.

All parts of a model but attention treat each token by itself; attention finds in the step that is under way which token
is whose. So there is no padding, no mask and no cache object of transformers. The trick is that of transformers' own
continuous batching and of vLLM's transformers backend.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from magicpig.attention import step as attention
from magicpig.attention.prefill import causal_attention
from magicpig.config import Config
from magicpig.engine.scheduler import Phase
from magicpig.errors import MagicPigError, NotFiniteError
from magicpig.integrations.transformers import NAME as ATTACHED
from magicpig.integrations.transformers import MagicPigCache, UnsupportedModelError, attach, detach
from magicpig.integrations.transformers.attach import check_on
from magicpig.integrations.transformers.shapes import layer_shapes
from magicpig.placement import CPU, Placement
from magicpig.placement.schedule import Turns
from magicpig.store import KVStore

# Not among transformers' mask functions: then it makes no mask at all.
NAME = "magicpig_packed"


class Window:
    """The newest keys and values of a layer with sliding attention: those that the next token sees, and some more.

    size: tokens that a token sees, itself included. Memory for twice as many, so that rows seldom move.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._keys = self._values = torch.empty(0, dtype=torch.float32, device="cpu")
        self._end = 0

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Takes T more tokens (G, T, D). Returns the keys and values of these and of those before that they see."""
        T = keys.shape[1]
        kept = min(self._end, self.size - 1)
        if self._keys.ndim == 1 or self._end + T > self._keys.shape[1]:
            self._move(keys, values, kept, T)
        self._keys[:, self._end : self._end + T] = keys
        self._values[:, self._end : self._end + T] = values
        self._end += T
        seen = slice(self._end - T - kept, self._end)
        return self._keys[:, seen], self._values[:, seen]

    def tensors(self) -> dict[str, Tensor]:
        """The keys and values (G, n, D) of the newest n tokens, at most `size` of them."""
        newest = slice(max(0, self._end - self.size), self._end)
        return {"keys": self._keys[:, newest], "values": self._values[:, newest]}

    @classmethod
    def of(cls, size: int, keys: Tensor, values: Tensor) -> Window:
        """A window with these newest tokens (G, n, D), which belong to it from now on."""
        window = cls(size)
        window._keys, window._values, window._end = keys, values, keys.shape[1]
        return window

    def fork(self) -> Window:
        """A window with the same tokens that goes its own way."""
        other = Window(self.size)
        other._keys, other._values, other._end = self._keys.clone(), self._values.clone(), self._end
        return other

    def _move(self, keys: Tensor, values: Tensor, kept: int, more: int) -> None:
        G, _, D = keys.shape
        room = max(2 * self.size, kept + more) if kept + more >= self.size else 2 * (kept + more)
        new = keys.new_empty(G, room, D), values.new_empty(G, room, D)
        if kept:
            new[0][:, :kept] = self._keys[:, self._end - kept : self._end]
            new[1][:, :kept] = self._values[:, self._end - kept : self._end]
        self._keys, self._values = new
        self._end = kept


@dataclass
class SequenceState:
    """What a model keeps of one sequence of tokens: by layer a store or a window, made when the first tokens come."""

    config: Config
    layers: list[KVStore | Window | None]

    @property
    def stores(self) -> list[KVStore]:
        return [layer for layer in self.layers if isinstance(layer, KVStore)]

    @property
    def length(self) -> int:
        """Tokens stored. Of models whose layers all have windows, unknown: 0."""
        return self.stores[0].length if self.stores else 0

    @property
    def has_windows(self) -> bool:
        """Whether some layers know the newest tokens only, so that the state cannot be cropped."""
        return any(isinstance(layer, Window) for layer in self.layers)

    def fork(self, config: Config | None = None, length: int | None = None) -> SequenceState:
        """A state that holds the same tokens and goes its own way; stores share memory until one of them writes.

        config: how the other attends, if nothing is indexed yet; length: how many tokens it keeps, if not all. Windows
        must keep all.
        """
        layers = [None if layer is None else _fork(layer, i, config, length) for i, layer in enumerate(self.layers)]
        return SequenceState(self.config if config is None else config, layers)


def _fork(layer: KVStore | Window, index: int, config: Config | None, length: int | None) -> KVStore | Window:
    if isinstance(layer, Window):
        return layer.fork()
    own = () if config is None else (config.of_layer(index),)
    other = layer.fork(*own, sampled=config is None or not config.is_dense(index))
    if length is not None:
        other.crop(length)
    return other


@dataclass(frozen=True)
class Work:
    """A piece of one sequence for the next step: `tokens` from position `begin` on. logits: of how many of the last."""

    state: SequenceState
    tokens: Sequence[int]
    begin: int
    phase: Phase
    logits: int


@dataclass(frozen=True)
class Outcome:
    """logits: (n, vocabulary) in float32 on the CPU, of the n positions asked for; or the error of this piece alone.

    likeliest: the token with the largest logit of the last one, if any was asked for.
    """

    logits: Tensor
    error: MagicPigError | None = None
    likeliest: int | None = None


class Runner:
    """A network that computes pieces. It belongs to the runner until `close`, which puts back what was changed.

    max_length: the most tokens of a sequence. place: where the parts of a step run; with an accelerator, pieces that
    answer go through the model as two micro-batches, so that the host attends for one while the other is computed.
    Raises UnsupportedModelError for models that cannot be packed.
    """

    def __init__(self, network: Any, config: Config, *, max_length: int, place: Placement = CPU) -> None:
        check_on(network, place)
        if (reason := _why_not(network, max_length)) is not None:
            raise UnsupportedModelError(network.config.model_type, f"requests cannot share a step: {reason}")
        self.network, self.place = network, place
        self.here = torch.device("cpu") if place.accelerator is None else place.accelerator.torch_device
        self._attached = network.config._attn_implementation != ATTACHED
        if self._attached:
            attach(network, config)  # knows which models work
        network.set_attn_implementation(NAME)
        self.shapes = layer_shapes(network.config, config)
        # Of the sequences that answered in the last step: most often the next step is of the same.
        self._group: list[SequenceState] = []
        self._decoders: dict[int, attention.LayerDecoder] = {}
        self._keeps_logits = network._supports_logits_to_keep()

    @property
    def vocabulary(self) -> int:
        return int(self.network.config.get_text_config(decoder=True).vocab_size)

    def new_state(self, config: Config) -> SequenceState:
        """An empty sequence. Raises ValueError for settings that do not fit the model's layers."""
        MagicPigCache(self.network.config, config)
        return SequenceState(config, [None] * len(self.shapes))

    def run(self, work: Sequence[Work]) -> list[Outcome]:
        """Computes all pieces in one forward pass, or two. States whose piece failed are of no use any more."""
        if self.place.accelerator is None:
            return self._run(work)
        try:
            parts = _micro_batches(work)
            calls = [partial(self._run, part) for part in parts]
            outcomes = Turns().run(calls) if len(calls) > 1 else [calls[0]()]
            self.place.flush()
        finally:
            self.place.rest()
        return [outcome for part in outcomes for outcome in part]

    @torch.inference_mode()
    def _run(self, work: Sequence[Work]) -> list[Outcome]:
        ids = [token for piece in work for token in piece.tokens]
        positions = [piece.begin + t for piece in work for t in range(len(piece.tokens))]
        kept: list[int] = []
        first = 0
        for piece in work:
            first += len(piece.tokens)
            kept.extend(range(first - piece.logits, first))
        step = _Step(self, work)
        device = self.network.device
        token = _STEP.set(step)
        try:
            # Without anybody asking for logits, one row is the least that all models can compute.
            rows = torch.tensor(kept or [first - 1], dtype=torch.int64, device=device)
            output = self.network(
                input_ids=torch.tensor([ids], dtype=torch.int64, device=device),
                position_ids=torch.tensor([positions], dtype=torch.int64, device=device),
                use_cache=False,
                **({"logits_to_keep": rows} if self._keeps_logits else {}),
            )
        finally:
            _STEP.reset(token)
        self.agree(step.failed, len(work))
        logits = output.logits[0] if self._keeps_logits else output.logits[0, rows]
        return step.outcomes(logits.to("cpu", torch.float32))

    def decoder(self, index: int, work: Sequence[Work], heads: int, **rule: Any) -> attention.LayerDecoder:
        """For a step in which every piece is the next token of an answer."""
        if len(work) != len(self._group) or any(
            piece.state is not state for piece, state in zip(work, self._group, strict=True)
        ):
            self.forget()
            self._group = [piece.state for piece in work]
        found = self._decoders.get(index)
        if found is None or found.scale != rule["scale"] or found.softcap != rule["softcap"]:
            stores: list[Any] = [state.layers[index] for state in self._group]
            found = self._decoders[index] = attention.LayerDecoder(stores, heads, **rule)
        return found

    def first_head(self, index: int, kv_heads: int) -> int:
        """Where the first of the kv heads that this process has of a layer stands in the model."""
        return 0

    def agree(self, failed: dict[int, MagicPigError], pieces: int) -> None:
        """Adds pieces of this step that failed elsewhere."""

    def will_index(self, state: SequenceState) -> None:
        """To be told, between two steps, that the index of a state is built beside them."""

    def idle(self) -> None:
        """To be called now and then while there is no step to run."""

    def forget(self) -> None:
        """Lets go of the sequences of the last step; to be called when one of them ends."""
        self._group, self._decoders = [], {}

    def close(self) -> None:
        """Puts the network's own attention back."""
        self.forget()
        if self.network.config._attn_implementation != NAME:
            return  # it was closed before
        self.network.set_attn_implementation(ATTACHED)
        if self._attached:
            detach(self.network)


def _micro_batches(work: Sequence[Work]) -> list[Sequence[Work]]:
    """Two halves where at least two pieces answer."""
    if sum(piece.phase is Phase.DECODE for piece in work) < 2:
        return [work]
    return [work[: len(work) // 2], work[len(work) // 2 :]]


def _why_not(network: Any, max_length: int) -> str | None:
    """Why the pieces of several requests cannot go through the model side by side, if they cannot."""
    text = network.config.get_text_config(decoder=True)
    if text is not network.config:
        return "it is not a text model alone"
    if "position_ids" not in inspect.signature(network.forward).parameters:
        return "it does not take positions of tokens"
    rope = getattr(text, "rope_parameters", None) or {}
    for own in [own for own in rope.values() if isinstance(own, dict)] or [rope]:
        if own.get("rope_type") not in ("dynamic", "longrope"):
            continue
        original = int(own.get("original_max_position_embeddings") or text.max_position_embeddings)
        if max_length > original:
            return (
                f"beyond {original} tokens its rotary embeddings depend on the longest of them; "
                f"max_length={original} makes it work"
            )
    return None


class _Step:
    """The step that is under way, as attention sees it."""

    def __init__(self, runner: Runner, work: Sequence[Work]) -> None:
        self.runner, self.work = runner, work
        self.failed: dict[int, MagicPigError] = {}
        self.decodes = all(piece.phase is Phase.DECODE and len(piece.tokens) == 1 for piece in work)
        self.begins = [0]
        for piece in work:
            self.begins.append(self.begins[-1] + len(piece.tokens))

    def attend(
        self,
        index: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """query (H, T, D), keys and values (G, T, D) of one layer. Returns (T, H, D)."""
        window = self.runner.shapes[index].window
        if window is not None:
            rule = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits, "window": window}
            return self._slide(index, window, query, keys, values, rule)
        if self.decodes and sink_logits is None and not self.failed and self.runner.place.accelerator is None:
            output = self._decode(index, query, keys, values, scale=scale, softcap=softcap)
            if output is not None:
                return output
        q, k, v = (x.transpose(0, 1).to(self.runner.here) for x in (query, keys, values))
        sinks = None if sink_logits is None else sink_logits.to("cpu", torch.float32)
        # What failed in an earlier layer is not stored in this one.
        alive = [i for i in range(len(self.work)) if i not in self.failed]
        rows: list[int] | slice = slice(None)
        if len(alive) < len(self.work):
            rows = [t for i in alive for t in range(self.begins[i], self.begins[i + 1])]
            q, k, v = (x[rows] for x in (q, k, v))
        segments, begin = [], 0
        for i in alive:
            count = len(self.work[i].tokens)
            store = self._store(i, index, k)
            segments.append(attention.Segment(store, begin, count, attention.Phase(self.work[i].phase.value)))
            begin += count
        output = query.new_zeros(query.shape[1], query.shape[0], query.shape[2])
        if segments:
            result = attention.attend_layer(
                segments, q, k, v, scale=scale, softcap=softcap, sink_logits=sinks, placement=self.runner.place
            )
            output[rows] = result.output.to(query.device)
            for i, error in zip(alive, result.errors, strict=True):
                if error is not None:
                    self.failed[i] = error
                    output[self.begins[i] : self.begins[i + 1]] = 0  # some models cannot route what is no number
        return output

    def _decode(self, index: int, query: Tensor, keys: Tensor, values: Tensor, **rule: Any) -> Tensor | None:
        """As `attend` where every sequence has one token and answers; None if that must go the long way."""
        decoder = self.runner.decoder(index, self.work, query.shape[0], **rule)
        q, k, v = (x.transpose(0, 1)[:, :, None] for x in (query, keys, values))
        if not decoder.takes(q, k, v):
            return None
        output, errors = decoder.step(q, k, v)
        output = output[:, 0]
        for i, error in enumerate(errors or ()):
            if error is not None:
                self.failed[i] = error
                output[i] = 0
        return output

    def outcomes(self, logits: Tensor) -> list[Outcome]:
        outcomes, end = [], 0
        # The first of the largest, as torch's argmax finds it, which takes fifteen times as long.
        found = logits.numpy().argmax(-1)
        tokens, largest = found.tolist(), logits.numpy()[numpy.arange(len(found)), found].tolist()
        for i, piece in enumerate(self.work):
            begin, end = end, end + piece.logits
            error = self.failed.get(i)
            # The largest is finite only if none is NaN or infinite; minus infinity is a model's way to say never.
            if error is None and not all(map(math.isfinite, largest[begin:end])):
                error = NotFiniteError("the model computes logits that are not finite")
            outcomes.append(Outcome(logits[begin:end], error, tokens[end - 1] if piece.logits else None))
        return outcomes

    def _slide(
        self, index: int, window: int, query: Tensor, keys: Tensor, values: Tensor, rule: dict[str, Any]
    ) -> Tensor:
        output = query.new_zeros(query.shape[1], query.shape[0], query.shape[2])
        for i, piece in enumerate(self.work):
            layer = piece.state.layers[index]
            if layer is None:
                layer = piece.state.layers[index] = Window(window)
            assert isinstance(layer, Window)
            at = slice(self.begins[i], self.begins[i + 1])
            seen = layer.append(keys[:, at], values[:, at])
            output[at] = causal_attention(query[:, at], *seen, **rule).output.transpose(0, 1)
        return output

    def _store(self, i: int, index: int, keys: Tensor) -> KVStore:
        state = self.work[i].state
        layer = state.layers[index]
        if layer is None:
            _, G, D = keys.shape
            config = state.config.of_layer(index)
            layer = state.layers[index] = KVStore(
                G,
                D,
                keys.dtype,
                config,
                sampled=not config.is_dense(index),
                layer=index,
                first_head=self.runner.first_head(index, G),
            )
        assert isinstance(layer, KVStore)
        return layer


_STEP: ContextVar[_Step] = ContextVar("step")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form of transformers' `AttentionInterface`, over what the step under way says.

    query: (1, H, T, D); key, value: (1, G, T, D). s_aux: (H,) sink logits. Returns ((1, T, H, D), None).
    """
    if key.shape[-1] != value.shape[-1] or query.shape[0] != 1 or attention_mask is not None:
        raise UnsupportedModelError(None, f"{type(module).__name__} does not attend to packed sequences")
    index = module.layer_idx
    assert isinstance(index, int)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _STEP.get().attend(index, query[0], key[0], value[0], scale=scale, softcap=softcap, sink_logits=s_aux)
    return output[None], None


AttentionInterface.register(NAME, packed_attention)
