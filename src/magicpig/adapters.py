"""PEFT adapters in a directory, merged into the weights of a model that was opened from one."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from magicpig.model_dir import ModelError, read_settings
from magicpig.wording import printable, shown


def check(directory: Path) -> None:
    """Raise ModelError unless this is the directory of an adapter and the package that reads it is there."""
    if not (directory / "adapter_config.json").is_file():
        raise ModelError(f"{directory}: not the directory of an adapter, it has no adapter_config.json")
    if not any(directory.glob("adapter_model.*")):
        raise ModelError(f"{directory}: an adapter without weights, it has no adapter_model.safetensors")
    read_settings(directory / "adapter_config.json")
    if find_spec("peft") is None:
        raise ModelError(f"{directory}: an adapter takes the package peft, which is not installed: pip install peft")


def merged(network: Any, directory: Path) -> Any:
    """The network with the adapter in its weights, so that it is as fast as without.

    Raises ModelError for adapters that do not change weights, such as prefix tuning, or that are of another model.
    """
    from peft import PeftModel

    kind = read_settings(directory / "adapter_config.json").get("peft_type")
    try:
        with warnings.catch_warnings():
            # Of an adapter of another model, PEFT leaves what it misses at random and only warns.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's own, about transformers
            adapted: Any = PeftModel.from_pretrained(network, str(directory))
    except MemoryError:
        raise
    except Exception as error:
        raise ModelError(f"{directory}: cannot read the adapter: {printable(str(error), 200)}") from error
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise ModelError(f"{directory}: adapters of kind {shown(kind)} change no weights: nothing to merge")
    return adapted.merge_and_unload()
