"""Quest's index (arXiv 2406.10774): the range of each coordinate over a page of 16 keys, and what a query can get.

Plain PyTorch, as it serves comparisons only.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAGE_ROWS = 16  # as in the paper; the last page may have fewer


def page_ranges(keys: Tensor) -> Tensor:
    """Smallest and largest coordinates (2, G, P, D) of each page of the keys (G, n, D), P = ceil(n / PAGE_ROWS)."""
    whole = keys.shape[1] // PAGE_ROWS * PAGE_ROWS
    pages = keys[:, :whole].unflatten(1, (-1, PAGE_ROWS))
    ranges = torch.stack([pages.amin(2), pages.amax(2)])
    rest = keys[:, whole:]
    if rest.shape[1] == 0:
        return ranges
    return torch.cat([ranges, torch.stack([rest.amin(1, keepdim=True), rest.amax(1, keepdim=True)])], 2)


def upper_bounds(query: Tensor, ranges: Tensor) -> Tensor:
    """For each query (H, D) and page (2, G, P, D) a number (H, P) that no q.k of the page exceeds, in q's dtype."""
    low, high = ranges.to(query.dtype)
    groups = query.view(len(low), -1, query.shape[1])
    bounds: Tensor = groups.clamp(max=0) @ low.mT + groups.clamp(min=0) @ high.mT
    return bounds.flatten(0, 1)
