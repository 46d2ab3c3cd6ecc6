"""Whether a ratio to exact attention means something: a slow baseline flatters whoever is compared with it."""

from __future__ import annotations

from collections.abc import Iterable

# Of a plain read of the bytes. Nothing that reads them all can be faster; a kernel that is much slower is no baseline.
LEAST_SHARE = 0.7


def flattery(baselines: Iterable[tuple[float, float]]) -> str:
    """A sentence for who reads the ratios; empty if there is nothing to say.

    baselines: (read_ms, exact_ms), the time of a plain read of keys and values, and of exact attention over them.
    """
    shares = [read / exact for read, exact in baselines]
    if not shares or min(shares) >= LEAST_SHARE:
        return ""
    return (
        f"Exact attention runs at {min(shares):.2f} of the speed of a plain read here, so ratios to it flatter: "
        f"an exact kernel at {LEAST_SHARE} or more would be an honest baseline."
    )
