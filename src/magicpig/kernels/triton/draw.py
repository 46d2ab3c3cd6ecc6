"""The twin of `draw`: systematic sampling by integer weights. All of it is integer arithmetic up to log u.

The keys that are certain are among those of the largest weights; the walk is cut into stretches that are summed first
and walked along beside each other; what was taken comes in any order and is sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from magicpig.errors import ArgumentError
from magicpig.kernels.sketch import reference

STRETCH = 1024  # keys of a walk that one program goes along


class Drawn(NamedTuple):
    """ids: (U, S) int32, ascending, and behind the last one the number of keys; log_u: (U, S) float32, zeros behind it;
    counts: (U,) int32; steps: (U,) int64.
    """

    ids: Tensor
    log_u: Tensor
    counts: Tensor
    steps: Tensor


def draw(
    weights: Tensor,
    budget: int,
    *,
    seed: int,
    layer: int,
    heads: Sequence[int],
    position: int,
    sinks: int = 0,
    phase: int = 1,
) -> Drawn:
    """The samples of U key/value heads by the weights (U, n) int32 of their keys; the first `sinks` weigh nothing.

    As a decode step draws them in phase 1 or 2.

    heads: for each of them its number among those of the model. Raises ArgumentError for a budget below 1.
    """
    U, n = weights.shape
    if budget < 1:
        raise ArgumentError(f"budget={budget} must be at least 1")
    device, weights = weights.device, weights.contiguous()
    all_fit = budget >= n - sinks
    # A step is a whole number, rounded down: at worst by half, and then twice as many are taken.
    room = n - sinks if all_fit else min(n - sinks, 2 * budget + 1)
    luck = torch.tensor(
        [reference.luck(seed, layer, head, position, reference.draw_number(phase, budget)) for head in heads],
        dtype=torch.int64,
        device=device,
    )
    steps = torch.ones(U, dtype=torch.int64, device=device)
    if not all_fit:
        totals = weights.sum(-1, dtype=torch.int64)
        most = weights.topk(budget, -1).values.contiguous()
        _settle_step[(U,)](most, totals, steps, budget, min(STRETCH, triton.next_power_of_2(budget)))
    order = _order(n, str(device))
    stretches = triton.cdiv(n, STRETCH)
    sums = torch.empty(U, stretches, dtype=torch.int64, device=device)
    _sum_stretches[(U, stretches)](weights, order, steps, sums, n, stretches, STRETCH)
    before = sums.cumsum(-1) - sums
    ids = torch.full((U, room), n, dtype=torch.int32, device=device)
    counts = torch.zeros(U, dtype=torch.int32, device=device)
    _walk[(U, stretches)](weights, order, steps, before, luck, ids, counts, n, stretches, room, STRETCH)
    ids = ids.sort(-1).values
    log_u = torch.empty(U, room, dtype=torch.float32, device=device)
    _log_u[(U, triton.cdiv(room, STRETCH))](weights, ids, steps, log_u, n, room, STRETCH)
    return Drawn(ids, log_u, counts, steps)


def weigh_rows(query: Tensor, rows: Tensor, log_u: Tensor, *, scale: float, softcap: float = 0.0) -> Tensor:
    """Weights (S,) int32 of a kv head's rows (S, 2 * Dp), drawn with log_u (S,), for the queries (R, D) of its group.

    In a few operations of torch: as `weigh_logits` in kernels/sketch/reference.py, but for rounding.
    """
    logits = scale * (query.float() @ rows[:, : query.shape[1]].float().T)
    logits = softcap * torch.tanh(logits / softcap) if softcap > 0 else logits
    return reference.weigh_logits(logits, log_u).to(torch.int32)


@lru_cache(maxsize=64)
def _order(n: int, device: str) -> Tensor:
    return reference.walk_order(n).to(device, torch.int32)


@triton.jit
def _settle_step(most, totals, steps, budget, BLOCK: tl.constexpr):
    """See `step_for` in kernels/sketch/reference.py; most: (U, budget), the largest weights, descending."""
    unit = tl.program_id(0)
    rest = tl.load(totals + unit)
    left = budget.to(tl.int64)
    open = budget > 1
    for first in range(0, budget, BLOCK):
        i = tl.arange(0, BLOCK)
        weight = tl.load(most + unit * budget + first + i, mask=first + i < budget, other=0).to(tl.int64)
        before = tl.cumsum(weight, 0) - weight
        # The first that is not certain ends the search.
        stop = (weight * (left - i) < rest - before) | (left - i <= 1)
        at = tl.min(tl.where(stop, i, BLOCK), 0)
        taken = tl.where(open, at, 0)
        rest -= tl.sum(tl.where(i < taken, weight, 0), 0)
        left -= taken
        open = open & (at == BLOCK)
    tl.store(steps + unit, tl.maximum(rest // left, 1))


@triton.jit
def _sum_stretches(weights, order, steps, sums, n, stretches, STRETCH: tl.constexpr):
    unit, stretch = tl.program_id(0), tl.program_id(1)
    at = stretch * STRETCH + tl.arange(0, STRETCH)
    key = tl.load(order + at, mask=at < n, other=0)
    weight = tl.load(weights + unit.to(tl.int64) * n + key, mask=at < n, other=0).to(tl.int64)
    total = tl.sum(tl.minimum(weight, tl.load(steps + unit)), 0)
    tl.store(sums + unit * stretches + stretch, total)


@triton.jit
def _walk(weights, order, steps, before, luck, ids, counts, n, stretches, room, STRETCH: tl.constexpr):
    """See `pick` in kernels/sketch/reference.py: what a step ends in is taken."""
    unit, stretch = tl.program_id(0), tl.program_id(1)
    step = tl.load(steps + unit)
    start = (tl.load(luck + unit) * step) >> 32
    at = stretch * STRETCH + tl.arange(0, STRETCH)
    key = tl.load(order + at, mask=at < n, other=0)
    weight = tl.load(weights + unit.to(tl.int64) * n + key, mask=at < n, other=0).to(tl.int64)
    weight = tl.minimum(weight, step)
    way = tl.cumsum(weight, 0) + tl.load(before + unit * stretches + stretch) + start
    taken = way // step > (way - weight) // step
    place = tl.cumsum(taken.to(tl.int32), 0)
    first = tl.atomic_add(counts + unit, tl.sum(taken.to(tl.int32), 0))
    slot = first + place - 1
    tl.store(ids + unit.to(tl.int64) * room + slot, key, mask=taken & (slot < room))


@triton.jit
def _log_u(weights, ids, steps, log_u, n, room, STRETCH: tl.constexpr):
    unit = tl.program_id(0)
    i = tl.program_id(1) * STRETCH + tl.arange(0, STRETCH)
    key = tl.load(ids + unit.to(tl.int64) * room + i, mask=i < room, other=n)
    weight = tl.load(weights + unit.to(tl.int64) * n + key, mask=key < n, other=0).to(tl.int64)
    step = tl.load(steps + unit)
    share = tl.where((key < n) & (weight < step), weight.to(tl.float64) / step.to(tl.float64), 1.0)
    tl.store(log_u + unit.to(tl.int64) * room + i, tl.log(share.to(tl.float32)), mask=i < room)
