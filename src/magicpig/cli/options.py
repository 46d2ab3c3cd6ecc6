"""What the commands' options have in common."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from magicpig.cli.errors import InputError
from magicpig.config import Config
from magicpig.config_file import load_config

T = TypeVar("T")


class Dtype(str, Enum):
    """Floating point types; auto is what a model's weights are stored in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelOrPocket = Annotated[
    Path | None,
    typer.Option(
        help="Directory of a transformers model: config.json, safetensors weights, tokenizer. "
        "[default: the pocket model]"
    ),
]
ModelDtype = Annotated[Dtype, typer.Option(help="What the model computes in; auto is what its weights are stored in.")]
PrefillChunk = Annotated[int, typer.Option(min=64, help="Read this many tokens at a time.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that lies in the model directory.")
]


def checked(make: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    """Call a constructor or check whose ValueErrors are about what the user typed."""
    try:
        return make(*arguments, **settings)
    except ValueError as error:
        raise InputError(str(error)) from None


def config_from(context: typer.Context, file: Path | None, **settings: Any) -> Config:
    """The config of a file, or of options called like its settings. Raises InputError if there are both.

    `seed` alone may be typed beside a file.
    """
    typed = {name: value for name, value in settings.items() if _is_typed(context, name)}
    if file is None:
        return checked(Config, **typed)
    if others := [name for name in typed if name != "seed"]:
        option = f"-{others[0]}" if len(others[0]) == 1 else f"--{others[0].replace('_', '-')}"
        raise InputError(f"{option} and --config: the file has all settings; change it, or leave it out")
    return load_config(file).model_copy(update=typed)


def _is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


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
