"""What the commands' options have in common."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from magicpig.cli.errors import InputError

T = TypeVar("T")


class Dtype(str, Enum):
    """Floating point types; auto is what a model's weights are stored in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def checked(make: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    """Call a constructor or check whose ValueErrors are about what the user typed."""
    try:
        return make(*arguments, **settings)
    except ValueError as error:
        raise InputError(str(error)) from None


def or_pocket(model: Path | None) -> Path:
    """The model directory, by default that of the package. Raises InputError."""
    from magicpig import pocket

    try:
        return pocket.path() if model is None else model
    except FileNotFoundError as error:
        raise InputError(f"{error}, or pass --model") from None


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """What --dense-layers says, as `Config` wants it. Raises InputError."""
    if text is None:
        return None
    try:
        return () if text == "none" else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--dense-layers {text!r} is neither whole numbers with commas nor none") from None
