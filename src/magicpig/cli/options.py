"""What the commands' options have in common."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from magicpig.cli.errors import InputError
from magicpig.model_dir import ModelError, check_directory, gguf_file
from magicpig.where import Where
from magicpig.wording import printable, shown

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


class Mode(str, Enum):
    """How an answer is written: `magicpig.generation.MODES`."""

    sampled = "sampled"
    lossless = "lossless"


class Dtype(str, Enum):
    """Floating point types; auto is what a model's weights are stored in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Weights(str, Enum):
    """What the weights of linear layers are kept in; auto is as they are stored."""

    auto = "auto"
    bf16 = "bf16"
    int8 = "int8"


ModelOrPocket = Annotated[
    Path | None,
    typer.Option(
        help="Directory of a transformers model (config.json, safetensors weights, tokenizer), or a GGUF file. "
        "[default: the pocket model]"
    ),
]
Adapter = Annotated[
    Path | None, typer.Option(help="Directory of a PEFT adapter, such as a LoRA, to merge into the weights.")
]
RopeScaling = Annotated[
    str | None,
    typer.Option(
        help="Read longer texts than the model was made for: linear, dynamic or yarn and a factor, as yarn:4.",
        metavar="KIND:FACTOR",
    ),
]
KeptWeights = Annotated[
    Weights, typer.Option(help="What linear layers keep their weights in; int8 is half as much to read for each token.")
]
System = Annotated[str | None, typer.Option(help="What the model is told before all else.")]
MOST_TOKENS = 2**40
MOST_THREADS = 1024
MOST_STEPS = 65_536
MOST_SAMPLES = 1_000_000
MOST_REPEATS = 1_000_000
MOST_SEED = 2**63 - 1

Seed = Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of the tasks.")]
ModelDtype = Annotated[Dtype, typer.Option(help="What the model computes in; auto is what its weights are stored in.")]
PrefillChunk = Annotated[int, typer.Option(min=64, max=MOST_TOKENS, help="Read this many tokens at a time.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that lies in the model directory.")
]


def checked(make: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    """Call a constructor or check whose ValueErrors are about what the user typed."""
    try:
        return make(*arguments, **settings)
    except ValueError as error:
        raise InputError(str(error)) from None


def check_device(where: Where) -> None:
    """Raises InputError where CUDA is asked for and absent. Imports torch only where it is asked for."""
    if where.device != "cpu":
        from magicpig.placement.device import check_cuda

        checked(check_cuda, where.device, "device")


def or_pocket(model: Path | None, notes: Console | None = None) -> Path:
    """The model directory, by default that of the package, which ``notes`` are told; of a GGUF file, what it becomes.

    Raises InputError without that one, ModelError for what cannot be one; before torch is imported, but for GGUF files
    that are converted, of which stderr is told.
    """
    from magicpig.studies import pocket

    try:
        chosen = pocket.path() if model is None else model
    except ModelError as error:
        raise InputError(f"{error}, or pass --model") from None
    if (file := gguf_file(chosen)) is not None:
        from magicpig.gguf import converted

        chosen = converted(file, say)
    check_directory(chosen)
    if model is None and notes is not None:
        notes.print("Using the pocket model, which comes with this package; --model takes another.")
    return chosen


def say(line: str) -> None:
    """One line on stderr, whatever is in it."""
    print(printable(line), file=sys.stderr, flush=True)


def whole_numbers(text: str, option: str, otherwise: str = "") -> tuple[int, ...]:
    """Whole numbers separated by commas. Raises InputError, which says what else is allowed."""
    parts = [part.strip() for part in text.split(",")]
    # Python would take 1_000, Arabic digits and thousands of them.
    if not all(part.removeprefix("-").isdigit() and part.isascii() and len(part) < 10 for part in parts):
        no = "neither" if otherwise else "not"
        raise InputError(f"{option} {shown(text)} is {no} whole numbers with commas{otherwise}")
    return tuple(int(part) for part in parts)
