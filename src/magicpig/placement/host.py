"""The paper's placement (arXiv 2410.16179): hashing and the exact window on a device, the long past in host memory.

The device makes codes, or rotated queries, of the queries and attends over the exact rows; the host looks up or scores,
draws, and attends over what was drawn; the device merges the two. What travels is small: codes down, states up.
Here the device is whichever kernels are given, and the two halves run one after the other.
"""

from __future__ import annotations

import math

import torch

from magicpig.kernels.base import Kernels
from magicpig.placement.base import (
    LayerStep,
    Stepped,
    attend_exact,
    errors_of,
)
from magicpig.placement.two_places import TwoPlaces
from magicpig.samplers import sampler_of
from magicpig.types import AttentionState, Sample


class Host(TwoPlaces):
    """device: who hashes, attends over the exact window and merges. Samplers for comparison run as on `Cpu`."""

    def __init__(self, device: Kernels) -> None:
        self.device = device

    def each(self, step: LayerStep) -> Stepped:
        (B, H, D), stores = step.query.shape, step.stores
        prepared = [
            sampler_of(store.spec, D, self.device).prepare(query) if store.settled else None
            for store, query in zip(stores, step.query.float(), strict=True)
        ]
        exacts = [attend_exact(self.device, step, b) for b in range(B)]
        exact = AttentionState(torch.stack([s.output for s in exacts]), torch.stack([s.lse for s in exacts]))
        half = stores[0].kernels.sampled_half(
            [store.view for store in stores],
            step.query.contiguous(),
            None if step.keys is None else step.keys.contiguous(),
            None if step.values is None else step.values.contiguous(),
            scale=step.rule.scale,
            softcap=step.rule.softcap,
            sink_logits=step.rule.sink_logits,
            prepared=prepared,
            # Where a store has an epsilon its draw waits for the window; else the two do not know of each other.
            exact=exact if any(store.draw.epsilon for store in stores) else None,
            capture=step.capture,
        )
        parts = (AttentionState(s.output.flatten(0, 1), s.lse.flatten()) for s in (exact, half.state))
        merged = self.device.merge(list(parts))
        whole = step.rule.finish(AttentionState(merged.output.view(B, H, D), merged.lse.view(B, H)))
        predicted = half.predicted_error(whole)
        errors = errors_of(half.faults) or [None] * B
        for b, store in enumerate(stores):
            if errors[b] is not None:
                whole.output[b], whole.lse[b], predicted[b] = math.nan, math.nan, math.nan
            elif store.body:
                predicted[b, half.state.lse[b] == -math.inf] = math.nan  # nothing was drawn, so nothing is known
                store.kernels.count_predicted(store.view, predicted[b])
        samples = [[Sample(*half.samples[b * H + h]) for h in range(H)] for b in range(B)] if step.capture else []
        return Stepped(AttentionState(whole.output.to(step.query.dtype), whole.lse), samples, predicted, errors)
