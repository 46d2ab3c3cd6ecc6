"""Importance-weighted attention in plain PyTorch; exact attention is the case where every row is certain.

Knows rows and how probable each was; does not know why they were chosen. Computes in float64 for float64
queries and in float32 otherwise, for any subset of the rows that one key/value head holds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from magicpig.types import AttentionState


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    log_u: Tensor | None = None,
    offset: Tensor | None = None,
    softcap: float | None = None,
) -> AttentionState:
    """Attention of the R query heads that share one key/value head, every row weighted by 1 / u.

    ``softmax(cap(scale * q.k + offset) - log u) @ values`` with ``cap(s) = softcap * tanh(s / softcap)``.

    query   (R, D)
    keys    (n, D), or (R, n, D) where each head brings its own rows; likewise
    values  (n, Dv) or (R, n, Dv)
    log_u   (n,) or (R, n), natural log of the inclusion probabilities; None means that all rows are certain
    offset  (R,), added to the logits of every row: ``scale * q.mean`` if the rows are stored minus their mean

    Returns output (R, Dv) and lse (R,). Of no rows at all, output is 0 and lse is -inf.
    """
    logits = row_logits(query, keys, scale=scale, offset=offset, softcap=softcap)
    if log_u is not None:
        logits = logits - log_u.to(logits)

    weights = logits.softmax(-1)
    output = (weights.unsqueeze(-2) @ values.to(weights)).squeeze(-2)
    return AttentionState(output=output, lse=logits.logsumexp(-1))


def merge(states: Sequence[AttentionState]) -> AttentionState:
    """Attention over the disjoint union of the rows behind ``states``, from outputs and log-sum-exps alone.

    Outputs (..., Dv) and lse (...) must agree in shape. Empty parts (lse = -inf) drop out; a union of empty
    parts is empty: output 0 and lse -inf.
    """
    lses = torch.stack([state.lse for state in states])
    outputs = torch.stack([state.output for state in states])
    lse = lses.logsumexp(0)
    # -inf - -inf is NaN; with a finite reference an all-empty union gets weights exp(-inf) = 0.
    weights = torch.exp(lses - lse.clamp(min=torch.finfo(lse.dtype).min))
    return AttentionState(output=(weights.unsqueeze(-1) * outputs).sum(0), lse=lse)


def predicted_error(
    state: AttentionState,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    log_u: Tensor,
    *,
    scale: float,
    offset: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """What the sample itself says about the relative L2 error of the output: (R,), one standard error.

    ``sqrt(sum of (1 - u) x**2 |v - output|**2) / |output|`` over the sampled rows, with x the weight of a row in
    ``state``, which is all of the attention, the certain rows included. That is the usual estimate of the variance of
    a ratio of Horvitz-Thompson sums (Särndal, Swensson and Wretman 1992, 5.6) for rows drawn independently; a
    systematic sample is a little better than it says. Arguments otherwise as for `attend`.
    NaN of no rows at all, which say nothing, and not finite where squares of values are not.
    """
    if keys.shape[-2] == 0:
        return torch.full_like(state.lse, torch.nan)
    logits = row_logits(query, keys, scale=scale, offset=offset, softcap=softcap)
    log_u = log_u.to(logits)
    weights = (logits - log_u - state.lse.to(logits).unsqueeze(-1)).exp()
    away = (values.to(logits) - state.output.to(logits).unsqueeze(-2)).square().sum(-1)
    # Certain rows add nothing, not even where their squares are infinite.
    variance = torch.where(log_u < 0, -torch.expm1(log_u) * weights.square() * away, 0.0).sum(-1)
    # A sample without uncertain rows errs by nothing, whatever it is relative to.
    return torch.where(variance == 0, 0.0, variance.sqrt() / state.output.to(logits).norm(dim=-1))


def row_logits(
    query: Tensor, keys: Tensor, *, scale: float, offset: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """The logits (R, n) of rows, with arguments as for `attend`."""
    working = torch.promote_types(query.dtype, torch.float32)
    query, keys = query.to(working), keys.to(working)
    logits = scale * (query.unsqueeze(-2) @ keys.mT).squeeze(-2)
    if offset is not None:
        logits = logits + offset.to(working).unsqueeze(-1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits


def with_sink_logits(state: AttentionState, sink_logits: Tensor) -> AttentionState:
    """Let one learned logit per head, shaped like ``state.lse``, join the softmax with value 0 (gpt-oss).

    Apply this to the merged state, once: each application is one more member of the denominator.
    """
    sink = AttentionState(output=torch.zeros_like(state.output), lse=sink_logits.to(state.lse))
    return merge([state, sink])
