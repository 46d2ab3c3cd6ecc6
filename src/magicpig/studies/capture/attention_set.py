"""Keys, values and queries of one layer, wherever they come from, and exact attention over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from magicpig.errors import ArgumentError
from magicpig.kernels.attend.reference import with_sink_logits
from magicpig.types import AttentionState
from magicpig.wording import shown


@dataclass(frozen=True)
class AttentionSet:
    """The context of one request in one layer, and the queries of its last T tokens.

    keys, values: (G, N, D), as the attention function sees them: positions are already rotated in.
    queries: (T, H, D), the query heads of one group next to each other. Query t belongs to token N - T + t and sees the
    keys up to that token's own.
    scale: factor of every product of query and key. softcap: logits s become softcap * tanh(s / softcap).
    sink_logits: (H,) logits that join the denominator with value zero.
    Raises ValueError if the shapes do not fit each other.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    scale: float
    softcap: float | None = None
    sink_logits: Tensor | None = None

    def __post_init__(self) -> None:
        keys, values, queries = self.keys, self.values, self.queries
        if keys.ndim != 3 or values.shape != keys.shape:
            raise ArgumentError(
                f"keys have shape {tuple(keys.shape)} and values {tuple(values.shape)}; expected (G, N, D) twice"
            )
        G, N, D = keys.shape
        for name, part in (("keys", keys), ("queries", queries)):
            if 0 in part.shape:
                raise ArgumentError(f"{name} have shape {tuple(part.shape)}: no axis may be empty")
        if not _is_positive(self.scale):
            raise ArgumentError(f"scale={shown(self.scale)} must be a finite number above 0")
        if self.softcap is not None and not _is_positive(self.softcap):
            raise ArgumentError(f"softcap={shown(self.softcap)} must be a finite number above 0, or None")
        if queries.ndim != 3 or queries.shape[2] != D or queries.shape[1] % G or not 0 < queries.shape[0] <= N:
            raise ArgumentError(
                f"queries have shape {tuple(queries.shape)}; expected (T, H, {D}) with H a multiple of {G} "
                f"and T at most {N}"
            )
        if self.sink_logits is not None and self.sink_logits.shape != queries.shape[1:2]:
            raise ArgumentError(
                f"sink_logits have shape {tuple(self.sink_logits.shape)}; expected ({queries.shape[1]},)"
            )

    @property
    def tokens(self) -> int:
        """N, those of the T steps included."""
        return self.keys.shape[1]

    @property
    def steps(self) -> int:
        return self.queries.shape[0]

    @property
    def heads(self) -> int:
        return self.queries.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[0]

    def seen_by(self, step: int) -> int:
        """The number of keys, from the first, that query ``step`` sees."""
        return self.tokens - self.steps + step + 1

    def only(self, kv_heads: Sequence[int]) -> AttentionSet:
        """The same with these key/value heads and their query heads alone."""
        chosen = list(kv_heads)
        grouped = self.queries.unflatten(1, (self.kv_heads, -1))
        sinks = None if self.sink_logits is None else self.sink_logits.view(self.kv_heads, -1)[chosen].flatten()
        return replace(
            self,
            keys=self.keys[chosen],
            values=self.values[chosen],
            queries=grouped[:, chosen].flatten(1, 2),
            sink_logits=sinks,
        )

    def logits(self, step: int) -> Tensor:
        """(H, n) float64: what query ``step`` gives each of the n keys it sees."""
        n, query = self.seen_by(step), self.queries[step].unflatten(0, (self.kv_heads, -1))
        products = [group.double() @ keys[:n].double().T for group, keys in zip(query, self.keys, strict=True)]
        logits = self.scale * torch.cat(products)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def weights(self, step: int) -> Tensor:
        """(H, n) float64: the share of the attention of query ``step`` that each of the n keys it sees gets.

        Sums to 1 for each head; what sink logits take away is not counted.
        """
        return self.logits(step).softmax(-1)

    def exact(self, step: int) -> AttentionState:
        """Exact attention of query ``step`` in float64: output (H, D), lse (H,)."""
        logits, n = self.logits(step), self.seen_by(step)
        grouped = logits.softmax(-1).unflatten(0, (self.kv_heads, -1))
        outputs = [weights @ values[:n].double() for weights, values in zip(grouped, self.values, strict=True)]
        state = AttentionState(torch.cat(outputs), logits.logsumexp(-1))
        return state if self.sink_logits is None else with_sink_logits(state, self.sink_logits)


def _is_positive(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf
