"""What can be seen to be wrong with a model directory before anything of it is loaded. Needs no model library.

transformers meets many of these faults late, in other words, or not at all: it builds what `config.json` asks for
before it looks whether there are weights for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from magicpig import strict_json
from magicpig.errors import ArgumentError
from magicpig.wording import counted, shown

MOST_PARTS = 10_000
COUNTED = (  # what a model is built of, one by one
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "n_head",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)
_TOKENIZER = ("tokenizer", "vocab", "spiece")


class ModelError(ArgumentError):
    """A model directory that cannot be used, or a prompt the model cannot take. One line, naming the cause."""

    code = "invalid_model"


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path of a model means: itself, or the one in a directory that is no model directory.

    None where it means something else. Raises ModelError if there are several.
    """
    try:
        if path.suffix.lower() == ".gguf" and not path.is_dir():
            return path
        if not path.is_dir() or (path / "config.json").exists():
            return None
        found = sorted(each for each in path.iterdir() if each.suffix.lower() == ".gguf")
    except (OSError, RuntimeError):
        return None  # said where the directory is looked into
    if len(found) > 1:
        raise ModelError(f"{path}: has {len(found)} GGUF files, such as {found[0].name}; name the one to use")
    return found[0] if found else None


def checksum(paths: Iterable[Path]) -> str:
    """SHA-256 of the content of files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def check_directory(directory: Path) -> None:
    """Raise ModelError unless there are a readable configuration of sane size, weights and a tokenizer."""
    try:
        if not directory.is_dir():
            directory.stat()  # says why, if it is not there or not to be seen
            raise ModelError(f"{directory}: not a directory")
        names = sorted(path.name for path in directory.iterdir())
    except FileNotFoundError:
        link = f"a link to {directory.readlink()}, where nothing is" if directory.is_symlink() else "no such directory"
        raise ModelError(f"{directory}: {link}") from None
    except (OSError, RuntimeError) as error:
        raise ModelError(f"cannot read {directory}: {_reason(error)}") from None
    if "config.json" not in names:
        raise ModelError(f"{directory}: not a model directory, it has no config.json")
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        raise ModelError(f"{directory}: has no weights in safetensors format")
    tokenizer = [name for name in names if name.startswith(_TOKENIZER)]
    if not tokenizer:
        raise ModelError(f"{directory}: has no tokenizer")
    for name in ("config.json", *weights, *tokenizer):
        _check_readable(directory / name)
    _check_counts(directory, read_settings(directory / "config.json"), weights)
    read_settings(directory / "generation_config.json")


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model directory; empty if there is no such file. Raises ModelError."""
    try:
        settings = strict_json.parse(path.read_bytes(), lenient=True)  # transformers takes Infinity, too
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ModelError(f"cannot read {path}: {_reason(error)}") from None
    except strict_json.JsonError as error:
        raise ModelError(f"{path}: {error}") from None
    if not isinstance(settings, dict):
        raise ModelError(f"{path}: not a JSON object")
    return settings


def brings_code(directory: Path) -> bool:
    """Whether the files name classes in Python files beside them."""
    return any("auto_map" in read_settings(directory / name) for name in ("config.json", "tokenizer_config.json"))


def _check_readable(path: Path) -> None:
    try:
        if not path.is_dir():
            with path.open("rb") as file:
                file.read(1)
    except FileNotFoundError:
        raise ModelError(f"{path}: a link to {path.readlink()}, where nothing is") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {_reason(error)}") from None


def _check_counts(directory: Path, settings: dict[str, Any], weights: Sequence[str]) -> None:
    """Refuse numbers of parts that no model has, or that the weights cannot have: they would take for ever to build."""
    tensors = _tensors(directory, weights)
    for name, value in _entries(settings):
        if name not in COUNTED or not isinstance(value, int):
            continue
        if not 0 <= value <= MOST_PARTS:
            raise ModelError(
                f"{directory / 'config.json'}: {name}={shown(value)} is out of range; allowed: 0 to {MOST_PARTS}"
            )
        if "layer" in name and tensors is not None and value > tensors:
            raise ModelError(
                f"{directory / 'config.json'}: {name}={value}, but the weights are only {counted(tensors, 'tensor')}"
            )


def _tensors(directory: Path, weights: Sequence[str]) -> int | None:
    """How many tensors there are; None if a file is damaged, which is said when it is read."""
    try:
        return sum(_count(directory / name) for name in weights)
    except (SafetensorError, OSError):
        return None


def _count(path: Path) -> int:
    with safe_open(path, "np") as file:
        names: list[str] = file.keys()
    return len(names)


def _entries(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of an object and of those inside it."""
    objects = [settings]
    while objects:
        for name, value in objects.pop().items():
            yield name, value
            if isinstance(value, dict):
                objects.append(value)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
