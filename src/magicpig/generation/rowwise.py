"""Linear layers that compute each row of a short pass to the bit as they compute it alone.

How a matrix product rounds may depend on how many rows it has: libraries choose another order of sums, or share them
among threads in another way. The kernels' own products do not; rows that torch multiplies go one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from magicpig.weights import FastLinear, PackedLinear, rows_alike

MOST_ROWS = 8
"""Passes of more rows are left as they are."""

_KINDS = (nn.Linear, FastLinear, PackedLinear)


@contextmanager
def rowwise(network: nn.Module) -> Iterator[None]:
    """Inside, passes (1, T, ...) of up to `MOST_ROWS` tokens through the network's linear layers are computed so."""
    layers = [module for module in network.modules() if _is_plain(module)]
    for module in layers:
        module.__dict__["forward"] = partial(_forward, module)
    try:
        yield
    finally:
        for module in layers:
            del module.__dict__["forward"]


def foreign_products(network: nn.Module) -> list[str]:
    """The parts of a network whose products `rowwise` knows nothing of: as experts, or layers that others quantised."""
    others = (each for each in network.modules() if not isinstance(each, nn.Embedding) and not _is_plain(each))
    return sorted({type(each).__name__ for each in others if any(x.ndim > 1 for x in each.parameters(recurse=False))})


def _is_plain(module: nn.Module) -> bool:
    return type(module) in _KINDS and "forward" not in module.__dict__  # where others put theirs


def _forward(module: Any, x: Tensor) -> Tensor:
    compute = type(module).forward
    if x.ndim != 3 or x.shape[0] != 1 or not 1 < x.shape[1] <= MOST_ROWS:
        computed: Tensor = compute(module, x)
        return computed
    # Copies lie in memory as passes of their own would.
    pieces = [compute(module, piece.clone()) for piece in x.split(rows_alike(module, x), 1)]
    return torch.cat(pieces, 1)
