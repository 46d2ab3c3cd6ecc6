"""Codes and selection on a device; only the rows that were chosen come from host memory, to be attended there.

What the device holds of the past is its index, a small part of it. Here the device is whichever kernels are given, and
it reads the index where it lies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from magicpig.errors import MagicPigError
from magicpig.kernels.algorithm import no_sample
from magicpig.kernels.attend.reference import merge, predicted_error
from magicpig.kernels.base import Kernels
from magicpig.kernels.sketch.reference import is_enough
from magicpig.placement.base import (
    LayerStep,
    Rule,
    Stepped,
    append,
    attend_exact,
)
from magicpig.placement.two_places import TwoPlaces
from magicpig.samplers import Context, Found, sampler_of
from magicpig.store import KVStore
from magicpig.types import AttentionState, Sample


class GpuIndex(TwoPlaces):
    """device: who selects and attends. Samplers for comparison run as on `Cpu`."""

    def __init__(self, device: Kernels) -> None:
        self.device = device

    def each(self, step: LayerStep) -> Stepped:
        B, H, _ = step.query.shape
        output = torch.full_like(step.query, math.nan)
        lse, predicted = torch.full((2, B, H), math.nan, dtype=torch.float32, device="cpu")
        samples: list[list[Sample]] = []
        errors: list[MagicPigError | None] = [None] * B
        for b, store in enumerate(step.stores):
            exact = attend_exact(self.device, step, b)
            errors[b] = append(step, b)
            if errors[b] is not None:
                samples.append([])
                continue
            state, drawn, predicted[b], tried = self._sequence(step, b, exact)
            output[b], lse[b] = state.output.to(output.dtype), state.lse
            samples.append(drawn)
            store.count_step([len(sample.ids) for sample in drawn], predicted[b], tried)
        return Stepped(AttentionState(output, lse), samples if step.capture else [], predicted, errors)

    def _sequence(
        self, step: LayerStep, b: int, exact: AttentionState
    ) -> tuple[AttentionState, list[Sample], Tensor, list[int]]:
        """Its state, samples, predicted errors, and how many rows each head read in vain."""
        store, query = step.stores[b], step.query[b].float()
        if not store.body:
            return step.rule.finish(exact), [no_sample(torch.float32)] * len(query), torch.zeros_like(exact.lse), []
        group = len(query) // store.kv_heads
        states, samples, errors, tried = [], [], [], [0] * len(query)
        for g in range(store.kv_heads):
            at = slice(g * group, (g + 1) * group)
            sinks = None if step.rule.sink_logits is None else step.rule.sink_logits[at]
            rule = Rule(step.rule.scale, step.rule.softcap, sinks)
            own = AttentionState(exact.output[at], exact.lse[at])
            rows = None
            while True:
                found = self._select(store, query[at], g, step, rows)
                whole = rule.finish(merge([own, _stacked(found)]))
                error = _predicted(whole, query[at], found, step.rule)
                epsilon = store.draw.epsilon
                larger = found[0].larger
                if not epsilon or larger is None or is_enough(float(error.max()), epsilon, first=rows is None):
                    break
                rows = larger(error)
                for h in range(at.start, at.stop):
                    tried[h] += len(found[0].sample.ids)
            states.append(whole)
            samples += [each.sample for each in found]
            errors.append(error)
        state = AttentionState(torch.cat([s.output for s in states]), torch.cat([s.lse for s in states]))
        return state, samples, torch.cat(errors), tried

    def _select(self, store: KVStore, query: Tensor, head: int, step: LayerStep, rows: int | None) -> list[Found]:
        """What each of the query heads (R, D) of a kv head found, and its attention over it."""
        place = store.policy.sinks, store.indexed_to, store.length, store.layer, store.first_head
        context = Context(*place, step.rule.scale, step.rule.softcap or None)
        sampler = sampler_of(store.spec, store.head_dim, self.device)
        return sampler.found(query, head, store.index, store.draw, context, lambda ids: store.fetch(head, ids), rows)


def _stacked(found: Sequence[Found]) -> AttentionState:
    states = [each.state for each in found]
    return AttentionState(torch.stack([s.output for s in states]), torch.stack([s.lse for s in states]))


def _predicted(whole: AttentionState, query: Tensor, found: list[Found], rule: Rule) -> Tensor:
    """The predicted errors (R,) float32."""
    errors = []
    for r, each in enumerate(found):
        own = AttentionState(whole.output[r : r + 1], whole.lse[r : r + 1])
        rows = each.keys, each.values, each.sample.log_u
        errors.append(predicted_error(own, query[r : r + 1], *rows, scale=rule.scale, softcap=rule.softcap or None))
    return torch.cat(errors).float()
