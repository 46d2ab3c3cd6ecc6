"""Linear layers that compute each row of a short pass to the bit as they compute it alone.

How a matrix product rounds may depend on how many rows it has: libraries choose another order of sums, or share them
among threads in another way. What a layer does is found out by trying, once for each shape: where some number of rows
is computed as each of them alone, shorter passes are filled up to it; else rows go one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MOST_ROWS = 9
"""Passes of more rows are left as they are."""


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
    """The parts of a network whose products `rowwise` knows nothing of: as experts, or quantised layers."""
    others = (each for each in network.modules() if not isinstance(each, nn.Embedding) and not _is_plain(each))
    return sorted({type(each).__name__ for each in others if any(x.ndim > 1 for x in each.parameters(recurse=False))})


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and "forward" not in module.__dict__  # where others put theirs


def _forward(module: Any, x: Tensor) -> Tensor:
    rows = x.shape[1] if x.ndim == 3 and x.shape[0] == 1 else 0
    if not 1 < rows <= MOST_ROWS:
        return functional.linear(x, module.weight, module.bias)
    weight = module.weight
    key = (*weight.shape, weight.dtype, weight.device, module.bias is not None, torch.get_num_threads())
    width = next((n for n in _faithful(key) if n >= rows), None)
    if width is None:
        return torch.cat([functional.linear(x[:, t : t + 1].clone(), weight, module.bias) for t in range(rows)], 1)
    padded = x.contiguous() if width == rows else functional.pad(x, (0, 0, 0, width - rows))
    return functional.linear(padded, weight, module.bias)[:, :rows]


@lru_cache(maxsize=256)
def _faithful(key: Any) -> tuple[int, ...]:
    """The numbers of rows, ascending, with which a layer of this shape computes each row as it computes it alone."""
    outputs, inputs, dtype, device, has_bias, _ = key
    random = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float32, device="cpu").to(device, dtype)

    weight, bias = numbers(outputs, inputs), numbers(outputs) if has_bias else None
    x = numbers(1, MOST_ROWS, inputs)
    alone = torch.cat([functional.linear(x[:, t : t + 1].clone(), weight, bias) for t in range(MOST_ROWS)], 1)
    return tuple(
        n
        for n in range(2, MOST_ROWS + 1)
        if torch.equal(functional.linear(x[:, :n].clone(), weight, bias), alone[:, :n])
    )
