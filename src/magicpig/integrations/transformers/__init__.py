"""transformers models with sampled attention: `attach(model)`, then `model.generate` as ever."""

from magicpig.integrations.transformers.attach import attach, detach
from magicpig.integrations.transformers.attention import NAME
from magicpig.integrations.transformers.cache import MagicPigCache
from magicpig.integrations.transformers.errors import (
    CacheMismatchError,
    CacheStateError,
    GradientError,
    UnsupportedModelError,
)
from magicpig.report import CacheReport, LayerReport

__all__ = [
    "NAME",
    "CacheMismatchError",
    "CacheReport",
    "CacheStateError",
    "GradientError",
    "LayerReport",
    "MagicPigCache",
    "UnsupportedModelError",
    "attach",
    "detach",
]
