"""Which rows of the body each query head reads: the samplers that hashing is compared with.

Each is a function of the logits of all query heads, or of what stands for them, and gives the natural log of the
probability with which every row was to be read: log_u (H, n), +inf for a row that is not read. All but `quest` look at
every key to decide that, so they show what a choice of rows is worth, not what it costs. Knows tensors alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy
import torch
from torch import Tensor

from magicpig.config import Config
from magicpig.kernels.pages import PAGE_ROWS, page_ranges, upper_bounds
from magicpig.kernels.sketch.reference import walk_order
from magicpig.types import Sample


def draw(
    config: Config,
    query: Tensor,
    body: Sequence[Tensor],
    *,
    position: int,
    scale: float,
    softcap: float | None = None,
    pages: Tensor | None = None,
) -> list[Sample]:
    """The rows that each of the query heads reads of the body, by `config.sampler` and within `config.budget`.

    query: (H, D), float32 or float64; body: keys (G, n_i, D), piece by piece. position: how many tokens there are so
    far; with `config.seed` it says what is drawn. pages: `page_ranges` of the body, otherwise made where needed.
    Returns a sample for each head, whose ids count from the body's first row. A budget of the whole body reads it.
    """
    n = sum(piece.shape[1] for piece in body)
    rows = config.rows(n)
    if rows == n:
        log_u = query.new_zeros(len(query), n)
    elif config.sampler == "quest":
        ranges = page_ranges(torch.cat(list(body), 1)) if pages is None else pages
        log_u = quest(upper_bounds(query, ranges), rows, n)
    else:
        logits = _logits(query, body, scale, softcap)
        log_u = DRAWN[config.sampler](logits, rows, generator_at(config.seed, position))
    return [Sample(ids := (head < torch.inf).nonzero()[:, 0], head[ids]) for head in log_u]


def generator_at(seed: int, position: int) -> torch.Generator:
    """The randomness of one step: its draws depend on these two numbers alone, and on both of them."""
    mixed = numpy.random.SeedSequence((seed, position)).generate_state(1, numpy.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))


def topk(logits: Tensor, rows: int, generator: torch.Generator | None = None) -> Tensor:
    """The rows of the largest logits, counted as they are: what is left out is missing, so the result is biased."""
    log_u = torch.full_like(logits, torch.inf)
    return log_u.scatter_(1, logits.topk(rows, sorted=False).indices, 0.0)


def quest(bounds: Tensor, rows: int, n: int) -> Tensor:
    """The pages of the largest upper bounds (H, P), whole: up to 15 of the n rows more than asked for. Biased, too."""
    return topk(bounds, -(-rows // PAGE_ROWS)).repeat_interleave(PAGE_ROWS, 1)[:, :n]


def oracle(logits: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """The best that known probabilities can do: u proportional to softmax itself, rows drawn without replacement."""
    # Weights that underflow keep some probability, as there may be fewer others than rows.
    weights = logits.double().softmax(1).clamp(min=torch.finfo(torch.float64).tiny)
    u = inclusion(weights, rows)
    return torch.where(systematic(u, generator), u.log(), torch.inf).to(logits.dtype)


def oracle_replacement(logits: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Rows drawn one by one from softmax itself, as in the paper's figure (arXiv 2410.16179), so some repeatedly.

    A row drawn c times counts c / (rows * p), p its softmax: as if it had been drawn once with that inverse of u.
    """
    log_p = logits.double().log_softmax(1)
    cumulative = log_p.exp().cumsum(1)
    uniform = torch.rand(len(logits), rows, dtype=torch.float64, generator=generator, device="cpu")
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
    times = torch.zeros_like(log_p).scatter_add_(1, drawn, torch.ones_like(uniform))
    log_u = log_p + math.log(rows) - times.clamp(min=1.0).log()
    return torch.where(times > 0, log_u, torch.inf).to(logits.dtype)


def uniform_tail(logits: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Half of the rows are the largest, the others any of the rest (after vAttention, arXiv 2510.05688)."""
    top = rows // 2
    log_u = topk(logits, top)
    order = torch.rand(logits.shape, generator=generator, dtype=torch.float32, device="cpu")
    tail = order.masked_fill_(log_u == 0, -1.0).topk(rows - top, sorted=False).indices
    return log_u.scatter_(1, tail, math.log((rows - top) / (logits.shape[1] - top)))


# By their names in `Config`; those that look at logits.
DRAWN: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "topk": topk,
    "oracle": oracle,
    "oracle-replacement": oracle_replacement,
    "uniform-tail": uniform_tail,
}
NAMES = (*DRAWN, "quest")  # all that `draw` knows


def inclusion(weights: Tensor, rows: int) -> Tensor:
    """Probabilities u = min(1, c * weights) (H, n), with the c of each line that makes them sum to `rows`."""
    top, ids = weights.topk(rows)
    # With the k largest rows certain, the others share the rows that are left: c[k] = (rows - k) / their weight.
    rest = weights.scatter(1, ids, 0.0).sum(1, keepdim=True) + top.flip(1).cumsum(1).flip(1)
    c = torch.arange(rows, 0, -1, dtype=rest.dtype, device=rest.device) / rest
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
