"""Blocks of tokens that see each other whatever their order, as the pieces of an image do in Gemma 3 and PaliGemma.

A mask of positions (B, N) says so by its values: 0 is padding, 1 a token that sees what is before it, and tokens of
another number also see those behind them of the same number. So no T x N mask of a long prompt is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from magicpig.attention.prefill import causal_attention
from magicpig.kernels.attend.reference import merge
from magicpig.types import AttentionState

ROWS_AT_ONCE = 1 << 24  # entries of a mask that are looked at together

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(sequence, head, query, key) -> whether the query sees the key; transformers' masking_utils."""


def find_blocks(
    visible: MaskFunction, B: int, q: range, kv: range, window: int | None, device: torch.device
) -> Tensor | None:
    """Reads the blocks from a mask function: (B, q) int64, 1 outside of blocks; None if the mask is of another kind.

    q, kv: positions of the queries and the keys, kv ends where q does. window: also accepted is a mask that shows each
    query nothing older than that. Every entry of the mask is looked at once.
    """
    rows = torch.arange(B, dtype=torch.int64, device=device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=device)
    queries, keys = (torch.arange(at.start, at.stop, dtype=torch.int64, device=device) for at in (q, kv))

    def seen(queries: Tensor, keys: Tensor) -> Tensor:
        """(n, 1) and (m,) or (n, 1) positions give (B, n, m or 1)."""
        found = visible(rows, head, queries[None, None], keys[None, None])
        return found.expand(B, 1, *torch.broadcast_shapes(queries.shape, keys.shape))[:, 0]

    # A token is in the block of the one before it if that one sees it.
    joined = torch.zeros(B, len(q), dtype=torch.bool, device=device)
    joined[:, 1:] = seen(queries[:-1, None], queries[1:, None])[:, :, 0]
    starts = (~joined).cumsum(1)
    alone = ~joined & ~torch.nn.functional.pad(joined[:, 1:], (0, 1))
    groups = torch.where(alone, 1, starts + 1)
    older = torch.ones(B, len(kv) - len(q), dtype=torch.int64, device=device)
    of_keys = torch.cat([older, groups], 1)
    plain, narrow = True, window is not None
    step = max(1, ROWS_AT_ONCE // max(1, B * len(kv)))
    for first in range(0, len(q), step):
        at = queries[first : first + step, None]
        own = groups[:, first : first + step, None]
        expected = (keys <= at) | ((own == of_keys[:, None]) & (own > 1))
        found = seen(at, keys)
        plain = plain and torch.equal(found, expected)
        narrow = narrow and window is not None and torch.equal(found, expected & (keys > at - window))
        if not plain and not narrow:
            return None
    return groups


def see_blocks(
    state: AttentionState, query: Tensor, keys: Tensor, values: Tensor, groups: Tensor, rule: dict[str, Any]
) -> AttentionState:
    """Adds to the causal attention of T tokens what they see behind them in their blocks. Differentiable.

    state: of query (H, T, D); keys, values: (G, T, D) of the same tokens; groups: (T,) as in the mask.
    rule: scale and softcap. Returns the state with the same dtypes.
    """
    cuts = [0, *((groups[1:] != groups[:-1]).nonzero()[:, 0] + 1).tolist(), len(groups)]
    outputs, lses = [], []
    for first, last in pairwise(cuts):
        own = AttentionState(state.output[:, first:last], state.lse[:, first:last])
        if int(groups[first]) > 1 and last - first > 1:
            # Backwards, what is behind a token comes before it. The last one has nothing behind it.
            backwards = causal_attention(
                query[:, first : last - 1].flip(1),
                keys[:, first + 1 : last].flip(1),
                values[:, first + 1 : last].flip(1),
                scale=rule["scale"],
                softcap=rule["softcap"],
            )
            behind = AttentionState(backwards.output.flip(1), backwards.lse.flip(1))
            both = merge([AttentionState(own.output[:, :-1], own.lse[:, :-1]), behind])
            own = AttentionState(
                torch.cat([both.output.to(own.output.dtype), own.output[:, -1:]], 1),
                torch.cat([both.lse, own.lse[:, -1:]], 1),
            )
        outputs.append(own.output)
        lses.append(own.lse)
    return AttentionState(torch.cat(outputs, 1), torch.cat(lses, 1))
