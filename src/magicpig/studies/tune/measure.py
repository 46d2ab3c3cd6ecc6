"""What a setting makes of the attention of one layer: its error, what it predicts of it, and its time.

The steps are the last tokens of a text, decoded again one by one on a store of the model's own dtype. Settings are
chosen by the first half of them; the second half says what came of the choice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from magicpig.attention.step import attend_stores
from magicpig.config import EXACT, Config
from magicpig.store import KVStore
from magicpig.studies.bench.layer import Layer
from magicpig.studies.capture import AttentionSet

BITS = (2, 3, 4)
BUDGETS = (128, 256, 512, 1024)
LOOSER = (1.0, 1.25, 1.5, 2.0)  # times the goal: a sample grows for its worst head, and the mean is what counts
TABLES = ((8, 75), (9, 120), (10, 150), (10, 300))  # K and L; settings of the paper, and one of twice the memory
CALIBRATED = 1.5  # an error is foreseen if it is at most this many times what was predicted
RUN_OFF = 4  # times as long as the first trial
LARGEST_BUDGET = 0.5  # of the body; who reads more than half of the rows might as well read all


@dataclass(frozen=True, eq=False)
class Measured:
    """A setting in one layer, T steps of H query heads.

    errors: (T, H) relative L2 error of the output against exact attention in float64. predicted: (T, H) what the
    samples said of it; None where nothing was sampled. share: rows that a head read, of those it might have left out.
    cost: time of a step over that of full attention, on cold caches, indexing of new tokens included.
    index_bytes: of the whole layer.
    """

    config: Config
    errors: Tensor
    predicted: Tensor | None
    share: float
    cost: float
    index_bytes: int

    @property
    def chosen_by(self) -> Tensor:
        """The errors (T / 2, H) that the choice may look at."""
        return self.errors[: len(self.errors) // 2]

    @property
    def held_out(self) -> Tensor:
        """The errors that it may not."""
        return self.errors[len(self.errors) // 2 :]

    @property
    def foreseen(self) -> float | None:
        """Of the heads and steps that predicted an error, the share whose error is at most `CALIBRATED` times that.

        None if none did: a sketch that may grow reads everything if it has to.
        """
        if self.predicted is None or not (drawn := self.predicted > 0).any():
            return None
        return float((self.errors <= CALIBRATED * self.predicted)[drawn].double().mean())


def candidates(epsilon: float, body: int) -> list[Config]:
    """The settings worth a try where errors up to ``epsilon`` are allowed and ``body`` rows may be left out."""
    budgets = [budget for budget in BUDGETS if budget <= LARGEST_BUDGET * body]
    fixed: list[dict[str, Any]] = [{"budget": budget} for budget in budgets]
    growing: list[dict[str, Any]] = [
        {"budget": min(BUDGETS[0], body), "epsilon": round(looser * epsilon, 4)} for looser in LOOSER
    ]
    drawn = [{"sampler": "sketch", "bits": bits, **each} for bits in BITS for each in (*fixed, *growing)]
    hashed = [{"sampler": "lsh", "K": K, "L": L} for K, L in TABLES]
    return [Config(**each, exact_below=0) for each in (*drawn, *hashed)]


class Trials:
    """The trials of one layer.

    Every setting is timed by turns with full attention, so that what drifts on a machine drifts for both, and few
    indexes are in memory at a time.
    """

    def __init__(self, attention: AttentionSet, *, repeats: int = 1) -> None:
        self.attention, self.repeats = attention, repeats
        self._layer = Layer([attention])
        (self._full,) = self._layer.stores(EXACT)
        self._times: list[float] = []

    @property
    def full_ms(self) -> float:
        """Milliseconds of a step of full attention, over all trials so far."""
        return _typical(self._times)

    def full(self) -> Measured:
        """Full attention, with the kernel that reads every row."""
        errors, _ = self._decode(self._full)
        return Measured(EXACT, errors, None, share=1.0, cost=1.0, index_bytes=0)

    def sampled(self, config: Config) -> Measured:
        """One setting that samples."""
        store = self._indexed(config)
        errors, predicted = self._decode(store)
        share = store.stats.mean_share
        (cost,) = self._costs([store], self.repeats)
        return Measured(config, errors, predicted, share, cost, store.nbytes().index)

    def again(self, finalists: Sequence[Measured]) -> list[Measured]:
        """The same with times that were taken by turns and longer: who is the fastest of many was lucky, too."""
        stores = [self._indexed(each.config) for each in finalists]
        costs = self._costs(stores, RUN_OFF * self.repeats)
        return [replace(each, cost=cost) for each, cost in zip(finalists, costs, strict=True)]

    def _indexed(self, config: Config) -> KVStore:
        store = self._full.fork(config, sampled=True)
        store.settle()
        return store

    def _decode(self, store: KVStore) -> tuple[Tensor, Tensor]:
        """Errors and predicted errors (T, H) of all steps."""
        layer, attention, predicted = self._layer, self.attention, []

        def decode(step: int) -> Tensor:
            output = layer.step([store], step)
            # The same sample once more, which then says what it predicts.
            _, info = attend_stores(
                layer.queries[step],
                [store],
                scale=attention.scale,
                softcap=attention.softcap,
                sink_logits=attention.sink_logits,
            )
            predicted.append(info.predicted_error[0])
            return output

        errors = layer.errors(decode)[:, 0]
        layer.forget([store])
        return errors, torch.stack(predicted).double()

    def _costs(self, stores: Sequence[KVStore], repeats: int) -> list[float]:
        layer, everyone = self._layer, [self._full, *stores]
        calls: dict[str, Callable[[int], object]] = {
            str(i): partial(layer.step, [store]) for i, store in enumerate(everyone)
        }
        times: list[list[float]] = [[] for _ in everyone]
        for measured in layer.timed(calls, repeats):
            for own, new in zip(times, measured.values(), strict=True):
                own += [timing.ms for timing in new]
            layer.forget(everyone)
        self._times += times[0]
        full, *steps = map(_typical, times)
        return [(step + layer.indexing_ms([store])) / full for step, store in zip(steps, stores, strict=True)]


def _typical(times: Sequence[float]) -> float:
    """The lower quartile: other programs only ever add to a time, and on a busy machine to many of them."""
    return statistics.quantiles(times, n=4)[0]
