"""How far sampled attention is from exact attention, given real queries, keys and values: the numbers of figure 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from magicpig.attention.step import attend_stores
from magicpig.config import Config
from magicpig.store import KVStore
from magicpig.studies.capture import AttentionSet
from magicpig.types import AttentionState


@dataclass(frozen=True)
class Estimate:
    """What one query head made of its keys, mean over the steps.

    error: relative L2 error of the output against exact attention in float64. lse_error: absolute error of the natural
    log of the denominator. share: the rows it read, of those that it might have left out; 1 where nothing is left out.
    """

    head: int
    error: float
    lse_error: float
    share: float


def exact_outputs(attention: AttentionSet) -> list[AttentionState]:
    """Exact attention in float64, one state per step: what every estimate of this set is compared with."""
    return [attention.exact(step) for step in range(attention.steps)]


def estimate(attention: AttentionSet, config: Config, exact: Sequence[AttentionState]) -> list[Estimate]:
    """Attend as ``config`` says, for every step of the set, and compare with ``exact``; one `Estimate` per query head.

    Computed in float32, so that what is seen is the sampling and not the rounding of a model's bfloat16.
    Contexts are sampled however short they are, and in every layer.
    """
    config = config.model_copy(update={"exact_below": 0})
    first = attention.seen_by(0)
    store = KVStore(attention.kv_heads, attention.keys.shape[2], torch.float32, config, sampled=True)
    store.append(attention.keys[:, :first].float(), attention.values[:, :first].float())
    store.settle()
    errors, lse_errors, shares = [], [], []
    for step, truth in enumerate(exact):
        if step > 0:
            new = slice(first + step - 1, first + step)
            store.append(attention.keys[:, new].float(), attention.values[:, new].float())
        state, info = attend_stores(
            attention.queries[step : step + 1].float(),
            [store],
            scale=attention.scale,
            softcap=attention.softcap,
            sink_logits=attention.sink_logits,
        )
        body = store.indexed_to - config.sinks if store.settled else 0
        errors.append((state.output[0].double() - truth.output).norm(dim=-1) / truth.output.norm(dim=-1))
        lse_errors.append((state.lse[0].double() - truth.lse).abs())
        read = [len(ids) / body if body else 1.0 for ids in info.ids[0]]
        shares.append(torch.tensor(read, dtype=torch.float32, device="cpu"))
    means = (torch.stack(each).mean(0).tolist() for each in (errors, lse_errors, shares))
    rounded = ([float(f"{value:.6g}") for value in each] for each in means)
    return [Estimate(head, *each) for head, each in enumerate(zip(*rounded, strict=True))]
