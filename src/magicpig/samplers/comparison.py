"""Samplers that hashing and sketches are compared with, and the two ends of the scale: "full" and "window".

Each is a function of the logits of the query heads of one group, or of what stands for them, and gives the natural log
of the probability with which every row was to be read: log_u (R, n), +inf for a row that is not read. All but `quest`
look at every key to decide that, so they show what a choice of rows is worth, not what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy
import torch
from torch import Tensor

from magicpig.kernels.algorithm import attend_full, no_sample
from magicpig.kernels.arena import Arena, Memory
from magicpig.kernels.attend.reference import attend
from magicpig.kernels.base import Kernels, View
from magicpig.kernels.pages import PAGE_ROWS, page_ranges, upper_bounds
from magicpig.kernels.sketch.reference import walk_order
from magicpig.samplers.base import Body, Context, Costs, Index, Rows, Sampler
from magicpig.settings import DrawPolicy, IndexSpec
from magicpig.types import AttentionState, Sample


class Full(Sampler):
    """Reads every row."""

    def leaves_out(self, policy: DrawPolicy, body: int) -> bool:
        return False

    def reference(
        self, query: Tensor, keys: Tensor, values: Tensor, policy: DrawPolicy, context: Context
    ) -> tuple[AttentionState, list[Sample]]:
        state = attend_full(query, keys, values, scale=context.scale, softcap=context.softcap)
        return state, [no_sample()] * len(query)


class Window(Sampler):
    """Reads the sinks and the recent window, and nothing between them."""

    def leaves_out(self, policy: DrawPolicy, body: int) -> bool:
        return True

    def reference(
        self, query: Tensor, keys: Tensor, values: Tensor, policy: DrawPolicy, context: Context
    ) -> tuple[AttentionState, list[Sample]]:
        samples = [no_sample()] * len(query)
        return _attend(query, keys, values, samples, context), samples


class Choosing(Sampler):
    """Rows chosen by looking at the logits of all keys.

    rule: log_u of logits (R, n), a budget in rows and a generator. bytes_per_key: for each query head, while it draws.
    """

    chooses = True

    def __init__(self, spec: IndexSpec, head_dim: int, kernels: Kernels, rule: Rule, bytes_per_key: int) -> None:
        super().__init__(spec, head_dim, kernels)
        self._rule = rule
        self._bytes_per_key = bytes_per_key

    def transient(self, costs: Costs, keys: int) -> int:
        return costs.query_heads * keys * self._bytes_per_key

    def draw(
        self, query: Tensor, body: Body, policy: DrawPolicy, *, scale: float, softcap: float | None
    ) -> list[Sample]:
        n = sum(piece.shape[1] for piece in body.keys)
        budget = policy.budget_for(n - body.sinks)
        if budget == n - body.sinks:
            log_u = query.new_zeros(len(query), n - body.sinks)
        else:
            log_u = self._log_u(query, body, budget, policy, scale, softcap)
        return [Sample(body.sinks + (ids := (head < torch.inf).nonzero()[:, 0]), head[ids]) for head in log_u]

    def _log_u(
        self, query: Tensor, body: Body, budget: int, policy: DrawPolicy, scale: float, softcap: float | None
    ) -> Tensor:
        """(H, n - sinks), head by head of the kv heads: what one draws does not depend on the others."""
        logits = _logits(query, body.keys, scale, softcap)[:, body.sinks :].unflatten(0, (len(body.keys[0]), -1))
        generators = (
            generator_at(policy.seed, body.layer, body.first_head + g, body.position) for g in range(len(logits))
        )
        return torch.cat(
            [self._rule(own, budget, generator) for own, generator in zip(logits, generators, strict=True)]
        )

    def reference(
        self, query: Tensor, keys: Tensor, values: Tensor, policy: DrawPolicy, context: Context
    ) -> tuple[AttentionState, list[Sample]]:
        working = torch.promote_types(query.dtype, torch.float32)
        body = Body([keys[:, : context.end]], context.sinks, keys.shape[1], context.layer, context.first_head)
        samples = self.draw(query.to(working), body, policy, scale=context.scale, softcap=context.softcap)
        return _attend(query, keys, values, samples, context), samples


class Quest(Choosing):
    """The pages of 16 keys with the largest upper bounds (arXiv 2406.10774), whole. Pages begin at position 0."""

    def __init__(self, spec: IndexSpec, head_dim: int, kernels: Kernels) -> None:
        super().__init__(spec, head_dim, kernels, topk, 8)

    def empty(self) -> PageIndex:
        return PageIndex()

    def restored(self, tensors: Mapping[str, Tensor], end: int, arena: Arena) -> PageIndex:
        return PageIndex(arena.hold(tensors["pages"]), end)

    def nbytes(self, costs: Costs, keys: int) -> int:
        return costs.kv_heads * -(-keys // PAGE_ROWS) * 2 * costs.head_dim * costs.itemsize

    def transient(self, costs: Costs, keys: int) -> int:
        side_by_side = costs.kv_heads * keys * costs.head_dim * costs.itemsize
        return max(super().transient(costs, keys), side_by_side)

    def _log_u(
        self, query: Tensor, body: Body, budget: int, policy: DrawPolicy, scale: float, softcap: float | None
    ) -> Tensor:
        if isinstance(body.index, PageIndex) and body.index.memory is not None:
            ranges = body.index.memory.tensor
        else:
            ranges = page_ranges(torch.cat(list(body.keys), 1))
        n = sum(piece.shape[1] for piece in body.keys)
        return quest(upper_bounds(query, ranges), budget, n)[:, body.sinks :]


class PageIndex(Index):
    """The ranges (2, G, P, D) of the coordinates of each page."""

    def __init__(self, memory: Memory | None = None, end: int = 0) -> None:
        self.memory = memory
        self.end = end

    def moved(self, rows: Rows, end: int) -> PageIndex:
        same = min(end, self.end) // PAGE_ROWS
        parts = [] if self.memory is None else [self.memory.tensor[:, :, :same]]
        if (begin := same * PAGE_ROWS) < end:
            keys = torch.cat([rows.layout.keys(piece) for piece, _ in rows.pieces(begin, end)], 1)
            parts.append(page_ranges(keys))
        return PageIndex(rows.arena.hold(torch.cat(parts, 2)), end)

    def connect(self, kernels: Kernels, view: View) -> None:
        return

    def memories(self) -> Iterable[Memory]:
        return () if self.memory is None else (self.memory,)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.memory is None else {"pages": self.memory.tensor}


def generator_at(seed: int, layer: int, head: int, position: int) -> torch.Generator:
    """The randomness of one kv head in one step: its draws depend on these four numbers alone."""
    mixed = numpy.random.SeedSequence((seed, layer, head, position)).generate_state(1, numpy.uint64)
    return torch.Generator(device="cpu").manual_seed(int(mixed[0]))


def topk(logits: Tensor, budget: int, generator: torch.Generator | None = None) -> Tensor:
    """The rows of the largest logits, counted as they are: what is left out is missing, so the result is biased."""
    log_u = torch.full_like(logits, torch.inf)
    return log_u.scatter_(1, logits.topk(budget, sorted=False).indices, 0.0)


def quest(bounds: Tensor, budget: int, n: int) -> Tensor:
    """The pages of the largest upper bounds (H, P), whole: up to 15 of the n rows more than asked for. Biased, too."""
    return topk(bounds, -(-budget // PAGE_ROWS)).repeat_interleave(PAGE_ROWS, 1)[:, :n]


def oracle(logits: Tensor, budget: int, generator: torch.Generator) -> Tensor:
    """The best that known probabilities can do: u proportional to softmax itself, rows drawn without replacement."""
    # Weights that underflow keep some probability, as there may be fewer others than the budget.
    weights = logits.double().softmax(1).clamp(min=torch.finfo(torch.float64).tiny)
    u = inclusion(weights, budget)
    return torch.where(systematic(u, generator), u.log(), torch.inf).to(logits.dtype)


def oracle_replacement(logits: Tensor, budget: int, generator: torch.Generator) -> Tensor:
    """Rows drawn one by one from softmax itself, as in the paper's figure (arXiv 2410.16179), so some repeatedly.

    A row drawn c times counts c / (budget * p), p its softmax: as if it had been drawn once with that inverse of u.
    """
    log_p = logits.double().log_softmax(1)
    cumulative = log_p.exp().cumsum(1)
    uniform = torch.rand(len(logits), budget, dtype=torch.float64, generator=generator, device="cpu")
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
    times = torch.zeros_like(log_p).scatter_add_(1, drawn, torch.ones_like(uniform))
    log_u = log_p + math.log(budget) - times.clamp(min=1.0).log()
    return torch.where(times > 0, log_u, torch.inf).to(logits.dtype)


def uniform_tail(logits: Tensor, budget: int, generator: torch.Generator) -> Tensor:
    """Half of the rows are the largest, the others any of the rest (after vAttention, arXiv 2510.05688)."""
    top = budget // 2
    log_u = topk(logits, top)
    order = torch.rand(logits.shape, generator=generator, dtype=torch.float32, device="cpu")
    tail = order.masked_fill_(log_u == 0, -1.0).topk(budget - top, sorted=False).indices
    return log_u.scatter_(1, tail, math.log((budget - top) / (logits.shape[1] - top)))


Rule = Callable[[Tensor, int, torch.Generator], Tensor]

RULES: dict[str, tuple[Rule, int]] = {
    "topk": (topk, 16),
    "uniform-tail": (uniform_tail, 20),
    "oracle": (oracle, 64),
    "oracle-replacement": (oracle_replacement, 64),
}
"""By their names in `Config`: those that look at logits, and bytes for each query head and key, measured."""


def inclusion(weights: Tensor, budget: int) -> Tensor:
    """Probabilities u = min(1, c * weights) (H, n), with the c of each line that makes them sum to `rows`."""
    top, ids = weights.topk(budget)
    # With the k largest rows certain, the others share the rows that are left: c[k] = (budget - k) / their weight.
    rest = weights.scatter(1, ids, 0.0).sum(1, keepdim=True) + top.flip(1).cumsum(1).flip(1)
    c = torch.arange(budget, 0, -1, dtype=rest.dtype, device=rest.device) / rest
    certain = (c * top > 1).sum(1, keepdim=True)
    return (c.gather(1, certain) * weights).clamp(max=1.0)


def systematic(u: Tensor, generator: torch.Generator) -> Tensor:
    """Draws each row with its probability u (H, n): rows at which the sum of u, from a random start, passes an integer.

    In every line as many as u sums to, rounded up or down (Madow 1949). It is summed in the order in which sketches
    are walked along, since texts repeat themselves.
    """
    start, order = torch.rand(len(u), 1, dtype=u.dtype, generator=generator, device="cpu"), walk_order(u.shape[1])
    passed = (u.masked_fill(u >= 1, 0.0)[:, order].cumsum(1) + start).floor()
    taken = passed.diff(dim=1, prepend=torch.zeros_like(start)) > 0
    return (u >= 1) | torch.zeros_like(taken).index_copy_(1, order, taken)


def _logits(query: Tensor, body: Sequence[Tensor], scale: float, softcap: float | None) -> Tensor:
    """(H, n), in the query's dtype."""
    groups = query.view(len(body[0]), -1, query.shape[1])
    logits = torch.cat([groups @ keys.to(query.dtype).mT for keys in body], 2).flatten(0, 1) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _attend(query: Tensor, keys: Tensor, values: Tensor, samples: Sequence[Sample], context: Context) -> AttentionState:
    """Attention of the heads (H, D) over the exact rows and each over its sample."""
    position = torch.arange(keys.shape[1], dtype=torch.int64, device="cpu")
    exact = position[(position < context.sinks) | (position >= context.end)]
    states, group = [], len(query) // len(keys)
    for h, sample in enumerate(samples):
        rows = torch.cat([exact, sample.ids])
        log_u = torch.cat([torch.zeros(len(exact), dtype=torch.float32, device="cpu"), sample.log_u])
        k, v = keys[h // group, rows], values[h // group, rows]
        states.append(attend(query[h : h + 1], k, v, scale=context.scale, log_u=log_u, softcap=context.softcap))
    return AttentionState(torch.cat([s.output for s in states]), torch.cat([s.lse for s in states]))
