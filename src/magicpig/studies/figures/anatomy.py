"""Where the attention of a head goes, and where its keys and queries lie: the numbers of figure 2.

After MagicPIG (arXiv 2410.16179), section 3: many heads spread their attention over a long tail of keys, one token,
mostly the first, is a sink, and keys lie in a narrow cone that the queries point away from.
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

    mass: of all keys. sink: the attention of the key that gets most of it; sink_at: which one that is. Often it is the
    first, but not in every model and layer. mass_without_sink: of the others, and of the attention that these get.
    """
    H, T = attention.heads, attention.steps
    heaviest = sinks(attention)
    whole, rest = torch.zeros(2, H, len(SHARES), dtype=torch.float32, device="cpu")
    sink = torch.zeros(H, dtype=torch.float32, device="cpu")
    for step in range(T):
        weights = attention.weights(step)
        whole += _held_by_top(weights) / T
        sink += weights.gather(1, heaviest[:, None])[:, 0] / T
        kept = torch.ones_like(weights, dtype=torch.bool).scatter(1, heaviest[:, None], False)
        others = weights[kept].view(H, -1)
        rest += _held_by_top(others / others.sum(-1, keepdim=True)) / T
    return [
        {
            "head": head,
            "mass": _rounded(whole[head]),
            "mass_without_sink": _rounded(rest[head]),
            "sink": round(float(sink[head]), 6),
            "sink_at": int(heaviest[head]),
            "long_tailed": long_tailed(whole[head].tolist()),
        }
        for head in range(H)
    ]


def sinks(attention: AttentionSet) -> Tensor:
    """(H,) for every query head the key that gets most of its attention, of those that all steps see."""
    return _attention_of_keys(attention).argmax(-1)


def geometry(attention: AttentionSet) -> list[dict[str, Any]]:
    """For every key/value head, cosines in which the cones show; means over tokens, or steps and query heads.

    The sink is the key that gets most of the attention of the head's queries. sink_to_keys: it to every other key.
    mean_to_keys: the mean of the others to each of them. mean_to_queries: that mean to the queries of the head.
    sink_key: the sink itself, to compare with that of other texts; sink_at: its place.
    """
    rows = []
    queries = attention.queries.unflatten(1, (attention.kv_heads, -1)).double()  # (T, G, R, D)
    heaviest = _attention_of_keys(attention).unflatten(0, (attention.kv_heads, -1)).sum(1).argmax(-1)
    for head, keys in enumerate(attention.keys.double()):
        at = int(heaviest[head])
        sink, others = keys[at], torch.cat([keys[:at], keys[at + 1 :]])
        mean = others.mean(0)
        rows.append(
            {
                "kv_head": head,
                "sink_to_keys": _mean_cosine(sink, others),
                "mean_to_keys": _mean_cosine(mean, others),
                "mean_to_queries": _mean_cosine(mean, queries[:, head].flatten(0, 1)),
                "sink_key": _rounded(sink),
                "sink_at": at,
            }
        )
    return rows


def sink_moves(sinks: list[list[float]]) -> float:
    """The mean cosine between the sinks (D,) of one head in every two of at least two texts."""
    unit = torch.nn.functional.normalize(torch.tensor(sinks, dtype=torch.float64, device="cpu"), dim=-1)
    cosines = unit @ unit.T
    above = torch.triu_indices(len(sinks), len(sinks), 1, dtype=torch.int64, device="cpu")
    return float(cosines[above[0], above[1]].mean())


def _attention_of_keys(attention: AttentionSet) -> Tensor:
    """(H, n) float64: what each key that all steps see gets, summed over them."""
    n = attention.seen_by(0)
    return torch.stack([attention.weights(step)[:, :n] for step in range(attention.steps)]).sum(0)


def _held_by_top(weights: Tensor) -> Tensor:
    """(H, n) weights that sum to 1 to (H, shares): what the largest of them sum to, at least one key each."""
    n = weights.shape[1]
    counts = torch.tensor([max(1, round(share * n)) for share in SHARES], dtype=torch.int64, device="cpu")
    return weights.sort(-1, descending=True).values.cumsum(-1)[:, counts - 1].float()


def _mean_cosine(vector: Tensor, others: Tensor) -> float:
    return round(float(torch.cosine_similarity(vector[None], others, dim=-1).mean()), 6)


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), 6) for value in values]
