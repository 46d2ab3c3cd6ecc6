"""The settings of one layer, split by how long they hold.

`IndexSpec` fixes what is stored and how it is found again: another one means another index, built from the rows.
`DrawPolicy` says how a step draws from it: each request may have its own, and change it at any step.
`Policy` says which tokens are attended exactly. How a forward pass is cut into chunks is no setting, since it does not
matter. `Config` is what users write; these are made from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from magicpig.config import EXACT, INDEX_SETTINGS, Config


@dataclass(frozen=True)
class IndexSpec:
    """What the rows and the index of a store depend on, beside the tokens.

    sampler: its name, that of `EXACT` where nothing is sampled. kv_dtype: "model" or "int8". stride: positions that are
    indexed at a time. The others are None where the sampler has no such setting.
    """

    sampler: str
    kv_dtype: str
    stride: int
    centre: bool
    bits: int | None = None
    K: int | None = None
    L: int | None = None
    seed: int | None = None

    @classmethod
    def of(cls, config: Config, *, sampled: bool = True) -> IndexSpec:
        """The spec of one layer (`Config.of_layer`). sampled: False for a layer that stays exact."""
        sampler = config.sampler if sampled else EXACT.sampler
        known = INDEX_SETTINGS.get(sampler, ())
        values = config.model_dump(include=set(known))
        centre = config.centre if "centre" in known or config.kv_dtype == "int8" else True
        return cls(sampler, config.kv_dtype, config.block, **{**values, "centre": centre})

    @property
    def rows(self) -> tuple[object, ...]:
        """What the stored rows depend on: stores that agree in it can share them."""
        return (self.kv_dtype, self.stride, self.centre) if self.kv_dtype == "int8" else (self.kv_dtype,)


@dataclass(frozen=True)
class DrawPolicy:
    """How a step draws rows from an index: `Config`'s settings of the same names."""

    budget: float
    candidates: float  # 0: by the noise of the sketch
    epsilon: float | None
    min_hits: int
    seed: int

    @classmethod
    def of(cls, config: Config) -> DrawPolicy:
        return cls(config.budget, config.drawn_candidates, config.epsilon, config.min_hits, config.seed)

    def budget_for(self, body: int) -> int:
        """How many of `body` rows the budget allows a head: at least one, and at most all."""
        return _count(self.budget, body)

    def candidates_for(self, body: int, rows: int) -> int | None:
        """How many of `body` keys a sketch draws first, to draw `rows` of them: as the budget is to its candidates.

        None where none are given.
        """
        if not self.candidates:
            return None
        return -(-rows * _count(self.candidates, body) // self.budget_for(body))


def _count(number: float, body: int) -> int:
    wanted = number if number >= 1 else number * body
    return max(1, min(body, round(min(wanted, body))))


@dataclass(frozen=True)
class Policy:
    """Which tokens are attended exactly: `Config`'s settings of these names, and whether the layer samples at all."""

    sinks: int
    recent: int
    exact_below: int
    sampled: bool

    @classmethod
    def of(cls, config: Config, *, sampled: bool = True) -> Policy:
        return cls(config.sinks, config.recent, config.exact_below, sampled)

    def index_end(self, tokens: int, stride: int) -> int:
        """Where the sampled positions end for a query that follows `tokens` others; 0 if all of them are exact.

        The largest whole number of strides that leaves `recent` tokens: a function of the length alone.
        """
        end = max(0, tokens - self.recent) // stride * stride
        return end if self.sampled and tokens >= self.exact_below and end > self.sinks else 0

    def next_due(self, end: int, stride: int) -> int | None:
        """The number of tokens from which on `index_end` is larger than `end`; None if it never is."""
        if not self.sampled:
            return None
        following = max(end // stride, self.sinks // stride) * stride + stride
        return max(self.exact_below, following + self.recent)
