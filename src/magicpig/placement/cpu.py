"""Everything in host memory, by the kernels of the stores: one fused step.

Where a sampler for comparison chooses rows of the body in Python, the fused step attends over the exact rows alone, and
the chosen ones are added here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from magicpig.kernels.attend.reference import merge
from magicpig.placement.base import (
    LayerStep,
    OnHost,
    RepeatedStep,
    Rule,
    Stepped,
    by_kind,
    chooses_in_python,
    errors_of,
)
from magicpig.samplers import Body
from magicpig.store import KVStore
from magicpig.types import AttentionState, Sample


class Cpu(OnHost):
    """The placement of today's machines without an accelerator."""

    def step(self, step: LayerStep) -> Stepped:
        return by_kind(step, [chooses_in_python(store) for store in step.stores], _fused, _chosen)

    def repeated(self, stores: Sequence[KVStore], heads: int, scale: float, softcap: float) -> RepeatedStep | None:
        if any(store.sampler.chooses for store in stores):
            return None
        first = stores[0]
        return first.kernels.repeated_step(len(stores), heads, first.head_dim, scale, softcap)


CPU = Cpu()
"""The placement of who does not ask for another."""


def _fused(step: LayerStep) -> Stepped:
    B, H, _ = step.query.shape
    result = step.stores[0].kernels.decode_step(
        [store.view for store in step.stores],
        step.query.contiguous(),
        None if step.keys is None else step.keys.contiguous(),
        None if step.values is None else step.values.contiguous(),
        scale=step.rule.scale,
        softcap=step.rule.softcap,
        sink_logits=step.rule.sink_logits,
        capture=step.capture,
    )
    samples = [[Sample(*result.samples[b * H + h]) for h in range(H)] for b in range(B)] if step.capture else []
    errors = errors_of(result.faults) or [None] * B
    return Stepped(AttentionState(result.output, result.lse), samples, result.predicted_error, errors)


def _chosen(step: LayerStep) -> Stepped:
    query = step.query.float()  # there is something to merge before anything is rounded
    keys, values = (None if x is None else x.float() for x in (step.keys, step.values))
    rule = Rule(step.rule.scale, step.rule.softcap, None)
    exact = _fused(LayerStep(query, keys, values, step.stores, rule, step.capture))
    state, samples, predicted = exact.state, exact.samples, exact.predicted_error
    for b, store in enumerate(step.stores):
        if exact.errors[b] is not None:
            continue
        chosen, drawn = _attend_chosen(query[b], store, rule)
        merged = merge([AttentionState(state.output[b], state.lse[b]), chosen])
        state.output[b], state.lse[b] = merged.output, merged.lse
        predicted[b] = math.nan
        if step.capture:
            samples[b] = drawn
    state = step.rule.finish(state)
    output = state.output.to(step.query.dtype)
    return Stepped(AttentionState(output, state.lse), samples, predicted, exact.errors)


def _attend_chosen(query: Tensor, store: KVStore, rule: Rule) -> tuple[AttentionState, list[Sample]]:
    """Attention of the heads (H, D) of one sequence over rows that its sampler chooses, and which these are."""
    keys = [keys for keys, _ in store.blocks(0, store.indexed_to)]
    body = Body(keys, store.policy.sinks, store.length, store.layer, store.first_head, store.index)
    samples = store.sampler.draw(query, body, store.draw, scale=rule.scale, softcap=rule.softcap or None)
    store.count_drawn([len(sample.ids) for sample in samples])
    group = len(query) // store.kv_heads
    states = [
        store.kernels.attend(
            q, store.rows(h // group), sample.ids, sample.log_u, scale=rule.scale, softcap=rule.softcap
        )
        for h, (q, sample) in enumerate(zip(query, samples, strict=True))
    ]
    state = AttentionState(torch.stack([s.output for s in states]), torch.stack([s.lse for s in states]))
    return state, samples
