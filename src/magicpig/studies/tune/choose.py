"""From what was measured to a `Config`: in every layer the fastest setting that is good enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from magicpig.config import BY_LAYER, EXACT, Config
from magicpig.errors import ArgumentError
from magicpig.studies.tune.measure import Measured

FASTER = 0.95  # of the time of full attention: what saves less than that is not worth an error


@dataclass(frozen=True)
class Goal:
    """Relative L2 error of a layer's output, over query heads and steps: at most this mean and 95th percentile."""

    mean: float
    p95: float

    def __post_init__(self) -> None:
        if not 0 < self.mean <= self.p95 < 1:
            raise ArgumentError(
                f"mean={self.mean} and p95={self.p95} must be between 0 and 1, and the mean not above p95"
            )

    def is_met(self, errors: Tensor) -> bool:
        """Whether errors (T, H) are small enough."""
        return float(errors.mean()) <= self.mean and p95(errors) <= self.p95

    def is_safe(self, errors: Tensor) -> bool:
        """The same with room for luck: a standard error of the mean, of steps, as heads may share their sample."""
        steps = errors.double().mean(1)
        luck = steps.std(correction=0) / len(steps) ** 0.5
        return float(steps.mean() + luck) <= self.mean and p95(errors) <= self.p95


@dataclass(frozen=True)
class LayerChoice:
    """full_ms: of a step of full attention. measured: all that was tried, full attention first. chosen: one of them."""

    layer: int
    full_ms: float
    measured: Sequence[Measured]
    chosen: Measured

    @property
    def is_dense(self) -> bool:
        """Whether full attention was chosen."""
        return not self.chosen.config.samples

    def ms(self, measured: Measured) -> float:
        """Milliseconds of a step."""
        return self.full_ms * measured.cost


@dataclass(frozen=True)
class Tuning:
    """What was found: the choice in each layer that attends to everything."""

    goal: Goal
    layers: Sequence[LayerChoice]

    @property
    def full_ms(self) -> float:
        return sum(each.full_ms for each in self.layers)

    @property
    def tuned_ms(self) -> float:
        return sum(each.ms(each.chosen) for each in self.layers)

    @property
    def uniform(self) -> tuple[Config, float]:
        """The fastest single setting, with layers where it is not good enough read in full, and its milliseconds."""
        totals = []
        for tried in zip(*(each.measured for each in self.layers), strict=True):
            best = [self._or_full(each, one) for each, one in zip(self.layers, tried, strict=True)]
            totals.append((sum(map(LayerChoice.ms, self.layers, best)), tried[0].config))
        ms, config = min(totals, key=lambda total: total[0])
        return config, ms

    def _or_full(self, layer: LayerChoice, measured: Measured) -> Measured:
        return good_enough([layer.measured[0], measured], self.goal)[0]

    @property
    def held_out(self) -> Tensor:
        """All errors of the chosen settings that they were not chosen by."""
        return torch.cat([each.chosen.held_out.flatten() for each in self.layers])

    @property
    def config(self) -> Config:
        """The settings found, as `attach` takes them."""
        dense = tuple(each.layer for each in self.layers if each.is_dense)
        if len(dense) == len(self.layers):
            return EXACT
        own = {each.layer: settings_of(each.chosen.config) for each in self.layers if not each.is_dense}
        return Config(dense_layers=dense, layers=own)


def good_enough(measured: Sequence[Measured], goal: Goal) -> list[Measured]:
    """The settings that are faster than full attention and meet the goal, the fastest first; then full attention.

    measured: full attention first.
    """
    full = measured[0]
    good = [one for one in measured[1:] if goal.is_safe(one.chosen_by) and one.cost < FASTER]
    return [*sorted(good, key=lambda one: one.cost), full]


def p95(errors: Tensor) -> float:
    """The 95th percentile."""
    return float(errors.double().flatten().quantile(0.95))


def settings_of(config: Config) -> dict[str, Any]:
    """What `Config.layers` has to say of a layer that is to be read in this way."""
    own, named = {}, ("sampler", *config.named_by, *(("bits",) if config.sketches else ()))
    for name in BY_LAYER:
        value = getattr(config, name)
        if name in named or value != Config.model_fields[name].default:
            own[name] = int(value) if name == "budget" and value.is_integer() else value
    return own
