"""Blocks of tokens that see each other, against attention by a whole mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from magicpig.attention.prefill import causal_attention
from magicpig.integrations.transformers.attention import _attend_tensors
from magicpig.integrations.transformers.blocks import find_blocks, see_blocks

CPU = torch.device("cpu")
# 1 is text, 0 padding; blocks at both ends, next to each other, of one token, and of all.
GROUPS = [
    [1, 1, 2, 2, 2, 1, 1, 3, 3, 4, 4, 4, 4, 1, 5, 1, 6, 6],
    [7, 7, 7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 8, 8, 8],
    [2] * 18,
    [0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 3, 3],
]


def seen_by(groups: Tensor, window: int | None) -> Tensor:
    """(T, T): whether a query, by row, sees a key."""
    at = torch.arange(len(groups))
    seen = (at <= at[:, None]) | ((groups == groups[:, None]) & (groups > 1))
    if window is not None:
        seen &= at > at[:, None] - window
    return seen & (groups > 0)


def by_mask(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None) -> Tensor:
    R = q.shape[0] // k.shape[0]
    logits = scale * q @ k.repeat_interleave(R, 0).mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    return weights @ v.repeat_interleave(R, 0)


def random(heads: int, T: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, T, 24, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("row", range(len(GROUPS)))
def test_attention_with_blocks_is_that_of_the_whole_mask(row: int, window: int | None, softcap: float | None) -> None:
    groups, scale = torch.tensor(GROUPS[row]), 0.3
    q, k, v = random(6, 18, 0), random(2, 18, 1), random(2, 18, 2)
    q.requires_grad_(True)
    expected = by_mask(q, k, v, seen_by(groups, window), scale, softcap)
    rule: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sink_logits": None}
    found = _attend_tensors(q[None], k[None], v[None], groups[None], rule)[0].transpose(0, 1)
    real = groups > 0
    torch.testing.assert_close(found[:, real], expected[:, real])
    assert not found[:, ~real].any()
    gradients = [torch.autograd.grad(x[:, real].square().sum(), q)[0] for x in (expected, found)]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_sinks_count_once() -> None:
    groups = torch.tensor(GROUPS[0])
    q, k, v = random(6, 18, 0), random(2, 18, 1), random(2, 18, 2)
    sinks = torch.linspace(-1, 1, 6, dtype=torch.float64)
    state = causal_attention(q, k, v, scale=0.3, sink_logits=sinks)
    found = see_blocks(state, q, k, v, groups, {"scale": 0.3, "softcap": None}).output
    logits = (0.3 * q @ k.repeat_interleave(3, 0).mT).masked_fill(~seen_by(groups, None), -torch.inf)
    weights = torch.cat([logits, sinks[:, None, None].expand(6, 18, 1)], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(found, weights @ v.repeat_interleave(3, 0))


def mask_function(seen: Tensor) -> Any:
    return lambda row, head, query, key: seen[row, query, key]


@pytest.mark.parametrize("window", [None, 5])
def test_blocks_are_found_in_a_mask(window: int | None) -> None:
    groups = torch.tensor(GROUPS[:3])
    seen = torch.stack([seen_by(row, window) for row in groups])
    found = find_blocks(mask_function(seen), 3, range(18), range(18), 5, CPU)
    assert found is not None
    for ours, given in zip(found, groups, strict=True):
        same = given == given[:, None]
        same &= (given > 1) | torch.eye(18, dtype=torch.bool)
        joined = (ours == ours[:, None]) & ((ours > 1) | torch.eye(18, dtype=torch.bool))
        assert torch.equal(joined, same)  # as blocks, whatever their numbers
    # New tokens behind old ones
    later = find_blocks(mask_function(seen), 3, range(7, 18), range(2, 18), 5, CPU)
    assert later is not None
    assert torch.equal(later > 1, found[:, 7:] > 1)


def test_other_masks_are_not_taken_for_blocks() -> None:
    at = torch.arange(18)
    causal = at <= at[:, None]
    packed = causal & ((at < 9) == (at[:, None] < 9))
    seen_ahead = causal.clone()
    seen_ahead[3, 5] = True
    half_a_block = seen_by(torch.tensor(GROUPS[0]), None)
    half_a_block[10, 12] = False
    for seen in (packed, seen_ahead, half_a_block, torch.ones(18, 18, dtype=torch.bool).triu()):
        assert find_blocks(mask_function(seen[None]), 1, range(18), range(18), None, CPU) is None
    assert find_blocks(mask_function(causal[None]), 1, range(18), range(18), None, CPU).tolist() == [[1] * 18]
