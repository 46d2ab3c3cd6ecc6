"""Which rows of the body a query head reads. One file for each way of choosing them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from magicpig.kernels.base import Kernels, load_kernels
from magicpig.samplers.base import Body, Context, Costs, Found, Index, Rows, Sampler
from magicpig.samplers.comparison import RULES, Choosing, Full, Quest, Window
from magicpig.samplers.lsh import Lsh
from magicpig.samplers.sketch import Sketch
from magicpig.settings import IndexSpec

__all__ = ["CHOOSING", "SAMPLERS", "Body", "Context", "Costs", "Found", "Index", "Rows", "Sampler", "sampler_of"]


def _choosing(name: str) -> Callable[[IndexSpec, int, Kernels], Sampler]:
    return lambda spec, head_dim, kernels: Choosing(spec, head_dim, kernels, *RULES[name])


SAMPLERS: dict[str, Callable[[IndexSpec, int, Kernels], Sampler]] = {
    "lsh": Lsh,
    "sketch": Sketch,
    "full": Full,
    "window": Window,
    "quest": Quest,
    **{name: _choosing(name) for name in RULES},
}
"""By their names in `Config`."""


CHOOSING = (*RULES, "quest")
"""Those that choose rows in Python."""


def sampler_of(spec: IndexSpec, head_dim: int, kernels: Kernels | None = None) -> Sampler:
    """The sampler of a spec, shared by every layer, head and request that has it. kernels: those of `load_kernels`."""
    return shared_sampler(spec, head_dim, (load_kernels() if kernels is None else kernels).NAME)


@lru_cache(maxsize=256)
def shared_sampler(spec: IndexSpec, head_dim: int, kernels: str) -> Sampler:
    """The same by the name of the kernels."""
    return SAMPLERS[spec.sampler](spec, head_dim, load_kernels(kernels))
