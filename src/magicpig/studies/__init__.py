"""Studies of the method: evaluation, benchmarks, figures, tuning, captures, the pocket model, the demonstration.

Only `cli` imports them. What nothing else needs is installed by an extra: `pip install 'magicpig[studies]'`.
"""

from __future__ import annotations

from importlib.util import find_spec

MODULES = ("httpx", "matplotlib", "wonderwords")
"""What the extra brings."""


def missing_module() -> str | None:
    """The first module of the extra that is not installed; None where all of them are."""
    return next((name for name in MODULES if find_spec(name) is None), None)
