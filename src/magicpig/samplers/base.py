"""What a sampler is: a way of choosing the rows that a step reads, and the index that it finds them by.

This folder and config.py are the only places that compare names of samplers. One to compare with is a function in
comparison.py and a line in `SAMPLERS`; one that the kernels draw by is a file here and its verbs under `kernels/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from magicpig.kernels.algorithm import no_sample
from magicpig.kernels.arena import Arena, Memory
from magicpig.kernels.base import HashSampler, Kernels, View, load_kernels
from magicpig.kernels.rows.layout import RowLayout
from magicpig.settings import DrawPolicy, IndexSpec
from magicpig.types import AttentionState, Sample


class Rows(Protocol):
    """The rows of a store that are final, as an index is built from them."""

    kv_heads: int
    layout: RowLayout
    arena: Arena

    def pieces(self, begin: int, end: int) -> list[tuple[Tensor, Tensor | None]]:
        """Rows (G, n, width) of [begin, end), block by block, and the centre (G, D) that their keys lack, or None."""
        ...


class Index(ABC):
    """What finds the rows of positions [0, end). Never changed: a longer or shorter one is another object."""

    end: int

    @abstractmethod
    def moved(self, rows: Rows, end: int) -> Index:
        """The index of [0, end) of the same rows. It depends on the rows and on `end`, not on what was there before."""

    @abstractmethod
    def connect(self, kernels: Kernels, view: View) -> None:
        """Tells the kernels of a view where it is."""

    @abstractmethod
    def memories(self) -> Iterable[Memory]:
        """What it holds, shared parts included."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """All that is in it, by name: equal for equal rows and ends, and enough for `Sampler.restored`."""


@dataclass(frozen=True)
class Body:
    """The indexed part of a sequence, for samplers that choose rows in Python.

    keys: pieces (G, n_i, D) of positions [0, end); the first `sinks` of them must not be chosen. position: of the
    query; layer, first_head: as of a store. With the seed these say what is drawn. index: of the store, or None.
    """

    keys: Sequence[Tensor]
    sinks: int
    position: int
    layer: int = 0
    first_head: int = 0
    index: Index | None = None


@dataclass(frozen=True)
class Costs:
    """What the planner asks for: G heads of `head_dim`, H query heads, and the bytes of a number."""

    kv_heads: int
    query_heads: int
    head_dim: int
    itemsize: int


@dataclass(frozen=True)
class Context:
    """What a step computes, beside its tensors and the policy: positions [sinks, end) are sampled, for a query that
    follows `position` tokens. layer, first_head: as of a store. Logits are softcap * tanh(scale * q.k / softcap).
    """

    sinks: int
    end: int
    position: int
    layer: int
    first_head: int
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class Found:
    """What one query head found by an index: its sample; their keys and values (S, D) float32; its attention over them,
    (D,) and (). larger: how many rows to draw where it predicts errors (R,) that are too large, of which the R heads of
    the group are told; None where a larger draw would find no more.
    """

    sample: Sample
    keys: Tensor
    values: Tensor
    state: AttentionState
    larger: Callable[[Tensor], int] | None = None


Fetch = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Brings keys and values (S, D) float32 of positions (S,) from where they lie."""


class Sampler(ABC):
    """One way of choosing rows, for stores of one `IndexSpec`, head dimension and kernels, shared by all.

    chooses: rows are chosen by `draw`, in Python. predicts: steps predict their own error. shared: the query heads of a
    group read one sample.
    """

    chooses: ClassVar[bool] = False
    predicts: ClassVar[bool] = False
    shared: ClassVar[bool] = False

    def __init__(self, spec: IndexSpec, head_dim: int, kernels: Kernels) -> None:
        self.spec = spec
        self.head_dim = head_dim
        self.kernels = kernels

    def check(self, policy: DrawPolicy) -> None:
        """Raises ArgumentError where one cannot draw like that from the index."""
        return

    def apply(self, policy: DrawPolicy, view: View) -> None:
        """Tells the kernels how to draw for a store: by default so that they read no row of the body.

        Where there are no tables, nothing is found in them.
        """
        self.kernels.set_sampler(view, _without_tables(self.kernels.NAME, self.head_dim))
        self.kernels.set_policy(view, law=_law(self.kernels.NAME))

    def empty(self) -> Index:
        """The index of no rows."""
        return NoIndex()

    def restored(self, tensors: Mapping[str, Tensor], end: int, arena: Arena) -> Index:
        """The index whose `Index.tensors` these are."""
        return NoIndex(end)

    def nbytes(self, costs: Costs, keys: int) -> int:
        """Upper bound of the bytes of an index of so many keys."""
        return 0

    def transient(self, costs: Costs, keys: int) -> int:
        """Upper bound of what building it, or drawing from it, needs besides."""
        return 0

    def leaves_out(self, policy: DrawPolicy, body: int) -> bool:
        """Whether a step may read fewer rows than all of `body`."""
        return policy.budget_for(body) < body

    def draw(
        self, query: Tensor, body: Body, policy: DrawPolicy, *, scale: float, softcap: float | None
    ) -> list[Sample]:
        """The rows that each of the query heads (H, D) reads of a body. Only of samplers that choose."""
        raise NotImplementedError

    def prepare(self, query: Tensor) -> Tensor | None:
        """What the kernels' half of a step needs of queries (H, D): see `Kernels.sampled_half`."""
        return None

    def found(
        self,
        query: Tensor,
        head: int,
        index: Index,
        policy: DrawPolicy,
        context: Context,
        fetch: Fetch,
        rows: int | None = None,
    ) -> list[Found]:
        """What the query heads (R, D) float32 of one kv head find by an index, verb by verb, as a step does at once.

        rows: to be drawn, where the policy's budget was not enough.
        """
        nothing = query.new_zeros(0, query.shape[1])
        state = AttentionState(torch.zeros_like(query[0]), query.new_tensor(-torch.inf))
        return [Found(no_sample(torch.float32), nothing, nothing, state)] * len(query)

    @abstractmethod
    def reference(
        self, query: Tensor, keys: Tensor, values: Tensor, policy: DrawPolicy, context: Context
    ) -> tuple[AttentionState, list[Sample]]:
        """What a step computes, in plain PyTorch and from the keys alone: query (H, D), keys and values (G, N, D).

        Returns output (H, D), lse (H,) and the sample of every head.
        """


class NoIndex(Index):
    """Of samplers that look at the rows themselves, or at none."""

    def __init__(self, end: int = 0) -> None:
        self.end = end

    def moved(self, rows: Rows, end: int) -> Index:
        return NoIndex(end)

    def connect(self, kernels: Kernels, view: View) -> None:
        return

    def memories(self) -> Iterable[Memory]:
        return ()

    def tensors(self) -> dict[str, Tensor]:
        return {}


@lru_cache(maxsize=64)
def _without_tables(kernels: str, head_dim: int) -> HashSampler:
    return load_kernels(kernels).make_sampler(head_dim, 1, 1, 0)


@lru_cache(maxsize=4)
def _law(kernels: str) -> Any:
    return load_kernels(kernels).make_law(1, 1, 1)
