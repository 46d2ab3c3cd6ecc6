"""Where the attention of a head goes, and where its keys and queries lie: the numbers of figure 2.

After MagicPIG (arXiv 2410.16179), section 3: many heads spread their attention over a long tail of keys, the first
token is a sink, and keys lie in a narrow cone that the queries point away from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from magicpig.studies.capture import AttentionSet

TAIL_SHARE, TAIL_MASS = 0.2, 0.9
# Half a decade in five steps, from one key in a thousand to all of them; one of them is TAIL_SHARE.
SHARES = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.015,
    0.02,
    0.03,
    0.05,
    0.07,
    0.1,
    0.15,
    TAIL_SHARE,
    0.3,
    0.4,
    0.5,
    0.7,
    0.85,
    1.0,
)


def long_tailed(mass: list[float]) -> bool:
    """Whether the top 20 % of the keys hold less than 90 % of the attention; mass is at `SHARES`, the sink included."""
    return mass[SHARES.index(TAIL_SHARE)] < TAIL_MASS


def attention_mass(attention: AttentionSet) -> list[dict[str, Any]]:
    """For every query head the share of its attention that the top `SHARES` of the keys hold, mean over the steps.

    mass: of all keys. mass_without_sink: of the keys after the first, and of the attention that these get.
    sink: the attention that the first key gets.
    """
    H, T = attention.heads, attention.steps
    whole, rest = torch.zeros(2, H, len(SHARES), dtype=torch.float32, device="cpu")
    sink = torch.zeros(H, dtype=torch.float32, device="cpu")
    for step in range(T):
        weights = attention.weights(step)
        whole += _held_by_top(weights) / T
        sink += weights[:, 0] / T
        others = weights[:, 1:]
        rest += _held_by_top(others / others.sum(-1, keepdim=True)) / T
    return [
        {
            "head": head,
            "mass": _rounded(whole[head]),
            "mass_without_sink": _rounded(rest[head]),
            "sink": round(float(sink[head]), 6),
            "long_tailed": long_tailed(whole[head].tolist()),
        }
        for head in range(H)
    ]


def geometry(attention: AttentionSet) -> list[dict[str, Any]]:
    """For every key/value head, cosines in which the cones show; means over tokens, or steps and query heads.

    sink_to_keys: the first key to every other. mean_to_keys: the mean key to every key. mean_to_queries: the mean key
    to the queries of the head. sink_key: the first key itself, to compare with that of other texts.
    """
    rows = []
    queries = attention.queries.unflatten(1, (attention.kv_heads, -1)).double()  # (T, G, R, D)
    for head, keys in enumerate(attention.keys.double()):
        sink, others, mean = keys[0], keys[1:], keys[1:].mean(0)
        rows.append(
            {
                "kv_head": head,
                "sink_to_keys": _mean_cosine(sink, others),
                "mean_to_keys": _mean_cosine(mean, others),
                "mean_to_queries": _mean_cosine(mean, queries[:, head].flatten(0, 1)),
                "sink_key": _rounded(sink),
            }
        )
    return rows


def sink_moves(sinks: list[list[float]]) -> float:
    """The mean cosine between the first keys (D,) of one head in every two of at least two texts."""
    unit = torch.nn.functional.normalize(torch.tensor(sinks, dtype=torch.float64, device="cpu"), dim=-1)
    cosines = unit @ unit.T
    above = torch.triu_indices(len(sinks), len(sinks), 1, dtype=torch.int64, device="cpu")
    return float(cosines[above[0], above[1]].mean())


def _held_by_top(weights: Tensor) -> Tensor:
    """(H, n) weights that sum to 1 to (H, shares): what the largest of them sum to, at least one key each."""
    n = weights.shape[1]
    counts = torch.tensor([max(1, round(share * n)) for share in SHARES], dtype=torch.int64, device="cpu")
    return weights.sort(-1, descending=True).values.cumsum(-1)[:, counts - 1].float()


def _mean_cosine(vector: Tensor, others: Tensor) -> float:
    return round(float(torch.cosine_similarity(vector[None], others, dim=-1).mean()), 6)


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), 6) for value in values]
