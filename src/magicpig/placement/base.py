"""What a placement is, and what it exchanges with attention/step.py, which has checked all and made stores ready."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from magicpig.errors import MagicPigError, NotFiniteError
from magicpig.kernels.attend.reference import merge, with_sink_logits
from magicpig.kernels.base import FAULTS, Kernels, as_rows
from magicpig.placement.device import Device
from magicpig.store import KVStore
from magicpig.types import AttentionState, Sample


class Rule(NamedTuple):
    """What becomes of logits. softcap: 0 for none; sink_logits: (H,) float32 or None."""

    scale: float
    softcap: float
    sink_logits: Tensor | None

    def finish(self, state: AttentionState) -> AttentionState:
        """After all rows: the sinks join in. Of a state (..., H, D), (..., H)."""
        if self.sink_logits is None:
            return state
        return with_sink_logits(state, self.sink_logits.expand_as(state.lse))


class LayerStep(NamedTuple):
    """One new token of each of B sequences: query (B, H, D); keys, values (B, G, D), or None where nothing is new.

    capture: whether the samples are wanted.
    """

    query: Tensor
    keys: Tensor | None
    values: Tensor | None
    stores: Sequence[KVStore]
    rule: Rule
    capture: bool = False

    def of(self, rows: list[int]) -> LayerStep:
        """That of some of the sequences."""
        keys, values = (None if x is None else x[rows] for x in (self.keys, self.values))
        return LayerStep(self.query[rows], keys, values, [self.stores[b] for b in rows], self.rule, self.capture)

    def to(self, device: torch.device) -> LayerStep:
        """The same with its tensors there."""
        query, keys, values = (None if x is None else x.to(device) for x in (self.query, self.keys, self.values))
        assert query is not None
        return self._replace(query=query, keys=keys, values=values)


class Stepped(NamedTuple):
    """The state, output (B, H, D) in the query's dtype and lse (B, H) float32, both where the query is; where they are
    wanted the samples of all heads of all sequences and predicted errors (B, H) float32; the errors of sequences, which
    then have NaN for a state.
    """

    state: AttentionState
    samples: list[list[Sample]]
    predicted_error: Tensor
    errors: list[MagicPigError | None]


RepeatedStep = Callable[[list[Any], Tensor, Tensor, Tensor], tuple[Tensor, list[int]]]
"""The same sequences again: views, query (B, H, 1, D), keys and values (B, G, 1, D) to (B, 1, H, D) and faults."""


class Placement(Protocol):
    """Where the parts of a step run. The stores are in host memory wherever that is.

    accelerator: the device whose tensors steps take and give, prompts included; None where that is the host.
    """

    @property
    def accelerator(self) -> Device | None: ...

    def step(self, step: LayerStep) -> Stepped:
        """Appends the new tokens, and attends."""
        ...

    def repeated(self, stores: Sequence[KVStore], heads: int, scale: float, softcap: float) -> RepeatedStep | None:
        """A faster way to step stores that stay together, where there is one."""
        ...

    def settle(self, store: KVStore) -> None:
        """`KVStore.settle`, which may go on in a thread until `rest`."""
        ...

    def rest(self) -> None:
        """Waits until nothing goes on any more. To be called before anybody else touches the stores of a prompt."""
        ...

    def flush(self) -> None:
        """Brings up to date what stores count of their steps."""
        ...


class OnHost:
    """Of placements that do all at once, where the stores are."""

    accelerator: Device | None = None

    def settle(self, store: KVStore) -> None:
        store.settle()

    def rest(self) -> None: ...
    def flush(self) -> None: ...


def by_kind(
    step: LayerStep, kinds: Sequence[bool], plain: Callable[[LayerStep], Stepped], other: Callable[[LayerStep], Stepped]
) -> Stepped:
    """Steps the sequences whose kind is true in the other way. Neither depends on who else is in the step."""
    if not any(kinds):
        return plain(step)
    if all(kinds):
        return other(step)
    B, H, _ = step.query.shape
    lse = torch.empty(B, H, dtype=torch.float32, device=step.query.device)
    state, predicted = AttentionState(torch.empty_like(step.query), lse), torch.empty_like(lse, device="cpu")
    samples: list[list[Sample]] = [[] for _ in step.stores] if step.capture else []
    errors: list[MagicPigError | None] = [None] * B
    for way, kind in ((plain, False), (other, True)):
        rows = [b for b, own in enumerate(kinds) if own is kind]
        part = way(step.of(rows))
        state.output[rows], state.lse[rows] = part.state.output, part.state.lse
        predicted[rows] = part.predicted_error
        for i, b in enumerate(rows):
            errors[b] = part.errors[i]
            if step.capture:
                samples[b] = part.samples[i]
    return Stepped(state, samples, predicted, errors)


def errors_of(faults: Sequence[int]) -> list[MagicPigError | None] | None:
    """What the kernels' faults of all sequences mean; None if there are none."""
    if not faults:
        return None
    text = "has entries that are not finite, or too large for the store"
    return [NotFiniteError(f"{FAULTS[fault]} {text}") if fault else None for fault in faults]


def append(step: LayerStep, b: int) -> MagicPigError | None:
    """Stores the new token of sequence b, if its numbers and those of the query are finite; else what is wrong."""
    if not bool(step.query[b].isfinite().all()):
        return (errors_of([1]) or [None])[0]
    if step.keys is None or step.values is None:
        return None
    try:
        step.stores[b].append(step.keys[b][:, None], step.values[b][:, None])
    except NotFiniteError as error:
        return error
    return None


def chooses_in_python(store: KVStore) -> bool:
    """Whether the next step's rows are chosen by a sampler that serves comparisons."""
    return store.sampler.chooses and store.settled


def exact_pieces(step: LayerStep, b: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (G, n, D) float32 of sequence b that are never drawn, piece by piece, the new ones included.

    Of the store before the new token is appended: a stride that it fills may be rounded then, for the steps after it.
    """
    store = step.stores[b]
    ends = [(0, store.policy.sinks), (store.indexed_to, store.length)] if store.body else [(0, store.length)]
    pieces = [piece for begin, end in ends for piece in store.blocks(begin, end, torch.float32)]
    if step.keys is not None and step.values is not None:
        new = (x[b][:, None].to(store.dtype).float() for x in (step.keys, step.values))
        pieces.append((next(new), next(new)))
    return pieces


def attend_exact(device: Kernels, step: LayerStep, b: int) -> AttentionState:
    """Attention of sequence b over the rows that are never drawn: (H, D) and (H,), float32; see `exact_pieces`."""
    store, query, pieces = step.stores[b], step.query[b].float(), exact_pieces(step, b)
    states, group = [], len(query) // store.kv_heads
    for g in range(store.kv_heads):
        for keys, values in pieces:
            rows = as_rows(keys[g], values[g])
            own = query[g * group : (g + 1) * group]
            states.append(device.attend_rows(own, rows, scale=step.rule.scale, softcap=step.rule.softcap))
    if not states:
        return AttentionState(
            torch.zeros_like(query), torch.full((len(query),), -math.inf, dtype=torch.float32, device="cpu")
        )
    heads = [merge(states[i : i + len(pieces)]) for i in range(0, len(states), len(pieces))]
    return AttentionState(torch.cat([s.output for s in heads]), torch.cat([s.lse for s in heads]))
