"""Made-up keys, values and queries that look to an attention kernel like those of a trained model.

What trained attention heads have in common (MagicPIG, arXiv 2410.16179, section 3) and random normal vectors have not:
keys lie in a narrow cone and queries in another, opposite one; the first token is a sink that holds about half of
the softmax mass; the rest is a long tail, with a few needles that point where a query looks. Nearby tokens resemble
each other, and so do the query heads of one group and the queries of consecutive steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from magicpig.errors import ArgumentError
from magicpig.studies.capture import AttentionSet

KEY_MEAN = 19.0  # length of the mean key; with KEY_SPREAD, keys have a cosine of about 0.86 to it
KEY_SPREAD = 11.0  # length of what is left of a key without its mean
KEY_LENGTH_SIGMA = 0.15  # lognormal sigma of that length
QUERY_LENGTH = 14.0
QUERY_TO_KEYS = -0.78  # cosine of a query to the mean key
SPECTRUM_POWER = -0.6  # the i-th direction of a cone carries (i + 1) ** power of its energy
RUN = 64  # consecutive tokens that share half of their energy
NEEDLES = 48  # per query head
SHARED_BY_GROUP = 0.5  # energy that the query directions of one group have in common
SHARED_BY_STEPS = 0.8  # energy that the queries of one head have in common from step to step
CHUNK = 128 * RUN  # tokens made at once, so that the working memory does not depend on the context


def synthetic_context(
    tokens: int,
    *,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    steps: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AttentionSet:
    """Make a context of ``tokens`` tokens and ``steps`` more, on the CPU; the same for the same arguments.

    The last ``steps`` of the N + T rows are the tokens that the steps append; all of ``dtype``.
    Raises ValueError if ``kv_heads`` does not divide ``heads`` or the context is shorter than 2 tokens
    or has no steps.
    """
    if heads % kv_heads:
        raise ArgumentError(f"heads={heads} is not a multiple of kv_heads={kv_heads}")
    if tokens < 2:
        raise ArgumentError(f"tokens={tokens}: a context has at least 2 tokens, the sink and another")
    if steps < 1:
        raise ArgumentError(f"steps={steps} must be at least 1")
    keys = torch.empty(kv_heads, tokens + steps, head_dim, dtype=dtype, device="cpu")
    values = torch.empty_like(keys)
    queries = torch.empty(steps, heads, head_dim, dtype=torch.float32, device="cpu")
    group = heads // kv_heads
    for g in range(kv_heads):
        # Each head has its own generator: head g is the same however many heads there are.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + g)
        _fill_group(keys[g], values[g], queries[:, g * group : (g + 1) * group], tokens, generator)
    return AttentionSet(keys, values, queries.to(dtype), scale=head_dim**-0.5)


def _fill_group(keys: Tensor, values: Tensor, queries: Tensor, tokens: int, generator: torch.Generator) -> None:
    """Fill one key/value head: keys and values (N + T, D), queries (T, R, D)."""
    total, head_dim = keys.shape
    steps, group, _ = queries.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    def without_mean(vectors: Tensor) -> Tensor:
        return vectors - (vectors @ mean).unsqueeze(-1) * mean

    mean = _unit(normal(head_dim))
    spectrum = torch.arange(1.0, head_dim + 1, dtype=torch.float32, device="cpu") ** SPECTRUM_POWER
    basis = (spectrum / spectrum.sum()).sqrt().unsqueeze(1) * torch.linalg.qr(normal(head_dim, head_dim))[0]

    common = _mix(normal(1, head_dim), normal(group, head_dim), SHARED_BY_GROUP) @ basis
    wanted = _unit(without_mean(common))
    varied = _mix(common, normal(steps, group, head_dim) @ basis, SHARED_BY_STEPS)
    sideways = math.sqrt(1 - QUERY_TO_KEYS**2)
    queries.copy_(QUERY_LENGTH * (sideways * _unit(without_mean(varied)) + QUERY_TO_KEYS * mean))

    needle_at = torch.randint(1, tokens, (group, NEEDLES), generator=generator, dtype=torch.int64, device="cpu")
    needle_cos = 0.35 + 0.6 * torch.rand(group, NEEDLES, generator=generator, dtype=torch.float32, device="cpu") ** 4
    needles = [_last_of_each(*needle) for needle in zip(needle_at, needle_cos, strict=True)]
    lse = torch.full((), -math.inf, dtype=torch.float32, device="cpu")
    for start in range(0, total, CHUNK):
        count = min(CHUNK, total - start)
        runs = normal(math.ceil(count / RUN), head_dim).repeat_interleave(RUN, 0)
        spread = KEY_SPREAD * without_mean(_mix(runs[:count], normal(count, head_dim), 0.5) @ basis)
        spread *= torch.exp(KEY_LENGTH_SIGMA * normal(count, 1))
        for head, (places, cosines) in enumerate(needles):
            inside = (places >= start) & (places < start + count)
            at = places[inside] - start
            spread[at] = _turn_to(spread[at], wanted[head], cosines[inside])
        chunk = (KEY_MEAN + 0.5 * normal(count, 1)) * mean + spread
        logits = chunk @ queries[0, 0] / math.sqrt(head_dim)
        lse = torch.logaddexp(lse, logits[1 if start == 0 else 0 :].logsumexp(0))
        keys[start : start + count] = chunk
        values[start : start + count] = normal(count, head_dim)
    # As large a logit as all others together: half of the mass of the first query
    keys[0] = lse * math.sqrt(head_dim) / (QUERY_LENGTH * QUERY_TO_KEYS) * mean


def _last_of_each(places: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor]:
    """Of needles in one place the last: an assignment to repeated indices is a race between threads."""
    last = dict(zip(places.tolist(), cosines.tolist(), strict=True))
    at = torch.tensor(list(last), dtype=torch.int64, device="cpu")
    return at, torch.tensor(list(last.values()), dtype=torch.float32, device="cpu")


def _mix(shared: Tensor, own: Tensor, energy: float) -> Tensor:
    return math.sqrt(energy) * shared + math.sqrt(1 - energy) * own


def _unit(vectors: Tensor) -> Tensor:
    lengths: Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / lengths


def _turn_to(vectors: Tensor, direction: Tensor, cosine: Tensor) -> Tensor:
    """The same lengths, but with this cosine to ``direction`` (a unit vector)."""
    lengths: Tensor = vectors.norm(dim=-1, keepdim=True)
    across = _unit(vectors - (vectors @ direction).unsqueeze(-1) * direction)
    along = cosine.unsqueeze(-1)
    return lengths * (along * direction + (1 - along**2).sqrt() * across)
