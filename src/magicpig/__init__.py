"""Sampled attention for long contexts: keys are drawn by locality-sensitive hashing and weighted without bias.

The method is MagicPIG (arXiv 2410.16179). `attend` works on tensors, `attach` on transformers models, and `LLM`
answers many prompts at once. `open_model` and `load` take model directories and GGUF files.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magicpig.advice import SamplingWarning
    from magicpig.config import Config
    from magicpig.engine.llm import LLM
    from magicpig.engine.request import SamplingParams
    from magicpig.functional import attend
    from magicpig.generation import load, open_model

    # From their modules: one is named as its function, which the checker takes for the function's first definition.
    from magicpig.integrations.transformers.attach import attach, detach
    from magicpig.integrations.transformers.cache import MagicPigCache
    from magicpig.integrations.transformers.errors import UnsupportedModelError
    from magicpig.weights import use_weights

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Config",
    "MagicPigCache",
    "SamplingParams",
    "SamplingWarning",
    "UnsupportedModelError",
    "attach",
    "attend",
    "detach",
    "load",
    "open_model",
    "use_weights",
]

# Imported when first asked for: torch and transformers take seconds, and `magicpig --help` needs neither.
_HOMES = {
    "LLM": "magicpig.engine.llm",
    "Config": "magicpig.config",
    "MagicPigCache": "magicpig.integrations.transformers",
    "SamplingParams": "magicpig.engine.request",
    "SamplingWarning": "magicpig.advice",
    "UnsupportedModelError": "magicpig.integrations.transformers",
    "attach": "magicpig.integrations.transformers",
    "attend": "magicpig.functional",
    "detach": "magicpig.integrations.transformers",
    "load": "magicpig.generation",
    "open_model": "magicpig.generation",
    "use_weights": "magicpig.weights",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
