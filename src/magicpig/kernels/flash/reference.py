"""Exact attention of many queries over many keys, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from magicpig.types import AttentionState


def attend_many(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float, softcap: float = 0.0, causal: bool = False
) -> AttentionState:
    """Attention of query (H, T, D) over keys and values (G, n, D): output (H, T, D), lse (H, T), in the query's dtype.

    causal: query t sees the keys up to t alone. softcap: logits s become softcap * tanh(s / softcap); 0 is none.
    """
    (H, T, D), (G, n, _) = query.shape, keys.shape
    logits = (scale * (query.reshape(G, -1, D) @ keys.mT)).view(H, T, n)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if causal:
        hidden = torch.ones(T, n, dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    output = (logits.softmax(-1).view(G, -1, n) @ values).view(H, T, D)
    return AttentionState(output, logits.logsumexp(-1))
