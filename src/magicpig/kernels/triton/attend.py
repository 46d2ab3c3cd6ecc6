"""The twin of kernels/attend: rows that were chosen are attended to with their weights, and states merged.

Beside each state come the sums over the sample from which the error of whatever it is merged into follows: see
`SampledHalf` in kernels/base.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from magicpig.errors import ArgumentError
from magicpig.kernels.base import padded
from magicpig.types import AttentionState

ROWS = 32  # attended to at once
SPLIT = 256  # rows of a program: more programs than heads keep a device busy


def attend(
    query: Tensor,
    rows: Tensor,
    counts: Tensor,
    log_u: Tensor | None = None,
    ids: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
) -> tuple[AttentionState, Tensor]:
    """Attention of U groups over rows, each weighted by 1 / u; and the spread (U, R, D + 2) of their samples.

    query: (U, R, D) float32; rows: (U, N, 2 * Dp), key and value side by side, in a float dtype; counts: (U,) int32,
    how many are attended to: the first, or those at ids (U, S) int32. log_u: (U, S) float32; None if all are certain.
    Returns output (U, R, D) and lse (U, R), float32; zeros and -inf of no rows.
    """
    U, R, D = query.shape
    if rows.shape[0] != U or rows.shape[2] != 2 * padded(D):
        raise ArgumentError(f"rows has shape {tuple(rows.shape)}; expected ({U}, N, {2 * padded(D)})")
    N = rows.shape[1]
    S = N if ids is None else ids.shape[1]
    splits = max(1, triton.cdiv(S, SPLIT))
    output = torch.empty(splits, U, R, D, dtype=torch.float32, device=query.device)
    lse = torch.empty(splits, U, R, dtype=torch.float32, device=query.device)
    spread = torch.empty(splits, U, R, D + 2, dtype=torch.float32, device=query.device)
    one = query.new_zeros(1) if log_u is None or ids is None else query
    _attend[(U, splits)](
        query.float().contiguous(), rows.contiguous(), counts.to(torch.int32), one if log_u is None else log_u,
        one if ids is None else ids.contiguous(), output, lse, spread, U, R, D, N, S, padded(D), scale, softcap,
        log_u is not None, ids is not None, softcap > 0, max(16, triton.next_power_of_2(R)),
        max(16, triton.next_power_of_2(D)), ROWS, SPLIT,
    )  # fmt: skip
    if splits == 1:
        return AttentionState(output[0], lse[0]), spread[0]
    state = merge(output, lse)
    share = (lse - state.lse.clamp(min=torch.finfo(lse.dtype).min)).exp()
    return state, (spread * share.square()[..., None]).sum(0)


def merge(outputs: Tensor, lses: Tensor) -> AttentionState:
    """Attention over the union of disjoint sets of rows, from states (P, ..., D) and (P, ...) float32 over each."""
    P, D = outputs.shape[0], outputs.shape[-1]
    output, lse = torch.empty_like(outputs[0]), torch.empty_like(lses[0])
    n = lse.numel()
    if n:
        _merge[(n,)](
            outputs.contiguous(), lses.contiguous(), output, lse, P, n, D, triton.next_power_of_2(P),
            triton.next_power_of_2(D),
        )  # fmt: skip
    return AttentionState(output, lse)


@triton.jit
def _attend(query, rows, counts, log_u, ids, output, lse, spread, U, R, D, N, S, dim, scale, softcap,
            WEIGHTED: tl.constexpr, CHOSEN: tl.constexpr, CAPPED: tl.constexpr, HEADS: tl.constexpr,
            BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    unit, split = tl.program_id(0), tl.program_id(1)
    head, d, lane = tl.arange(0, HEADS), tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    own = (head[:, None] < R) & (d[None, :] < D)
    q = tl.load(query + (unit * R + head)[:, None] * D + d[None, :], mask=own, other=0.0)
    count = tl.minimum(tl.load(counts + unit), S)
    most = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, BLOCK_D), tl.float32)
    doubt, doubt_square = tl.zeros((HEADS,), tl.float32), tl.zeros((HEADS,), tl.float32)
    doubt_values = tl.zeros((HEADS, BLOCK_D), tl.float32)
    for first in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, count), ROWS):
        i = first + lane
        here = i < count
        at = i
        if CHOSEN:
            at = tl.load(ids + unit.to(tl.int64) * S + i, mask=here, other=0)
        row = rows + (unit.to(tl.int64) * N + at) * 2 * dim
        inside = here[:, None] & (d[None, :] < D)
        key = tl.load(row[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
        value = tl.load(row[:, None] + dim + d[None, :], mask=inside, other=0.0).to(tl.float32)
        logit = scale * tl.dot(q, tl.trans(key), input_precision="ieee")
        if CAPPED:
            logit = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (logit / softcap)) + 1.0))
        probable = tl.zeros((ROWS,), tl.float32)
        if WEIGHTED:
            probable = tl.load(log_u + unit.to(tl.int64) * S + i, mask=here, other=0.0)
        logit = tl.where(here[None, :], logit - probable[None, :], float("-inf"))
        higher = tl.maximum(most, tl.max(logit, 1))
        fall = tl.exp(most - higher)
        weight = tl.exp(logit - higher[:, None])
        most = higher
        total = total * fall + tl.sum(weight, 1)
        acc = acc * fall[:, None] + tl.dot(weight, value, input_precision="ieee")
        if WEIGHTED:
            # 1 - u without cancellation is not needed: what is nearly certain hardly counts.
            open = tl.where(probable < 0, 1.0 - tl.exp(probable), 0.0)
            uncertain = weight * weight * open[None, :]
            squares = tl.sum(value * value, 1)
            doubt = doubt * fall * fall + tl.sum(uncertain, 1)
            doubt_square = doubt_square * fall * fall + tl.sum(uncertain * squares[None, :], 1)
            fallen = doubt_values * (fall * fall)[:, None]
            doubt_values = fallen + tl.dot(uncertain, value, input_precision="ieee")
    some = tl.where(total > 0, total, 1.0)
    to = (split * U + unit) * R + head
    tl.store(output + to[:, None] * D + d[None, :], acc / some[:, None], mask=own)
    tl.store(lse + to, tl.where(total > 0, most + tl.log(some), float("-inf")), mask=head < R)
    at = spread + to * (D + 2)
    square = some * some
    tl.store(at[:, None] + d[None, :], doubt_values / square[:, None], mask=own)
    tl.store(at + D, doubt_square / square, mask=head < R)
    tl.store(at + D + 1, doubt / square, mask=head < R)


@triton.jit
def _merge(outputs, lses, output, lse, P, n, D, PARTS: tl.constexpr, BLOCK_D: tl.constexpr):
    i = tl.program_id(0)
    part, d = tl.arange(0, PARTS), tl.arange(0, BLOCK_D)
    each = tl.load(lses + part * n + i, mask=part < P, other=float("-inf"))
    most = tl.max(each, 0)
    finite = tl.where(most > float("-inf"), most, 0.0)  # of empty parts alone the union is empty
    weight = tl.exp(each - finite)
    total = tl.sum(weight, 0)
    some = tl.where(total > 0, total, 1.0)
    at = outputs + (part.to(tl.int64)[:, None] * n + i) * D + d[None, :]
    parts = tl.load(at, mask=(part[:, None] < P) & (d[None, :] < D), other=0.0)
    parts = tl.where((weight > 0)[:, None], parts, 0.0)
    tl.store(output + i.to(tl.int64) * D + d, tl.sum(parts * (weight / some)[:, None], 0), mask=d < D)
    tl.store(lse + i, tl.where(total > 0, finite + tl.log(some), float("-inf")))
