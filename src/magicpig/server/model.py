"""The model of a server, from what the command was told to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magicpig import generation
from magicpig.config import Config
from magicpig.engine.engine import Engine
from magicpig.engine.observer import Observer
from magicpig.engine.options import EngineOptions
from magicpig.placement.device import Device


@dataclass(frozen=True)
class ModelOptions:
    """directory: of a transformers model. chat_template: Jinja, in place of its own. opening: see `open_model`."""

    directory: Path
    dtype: str = "auto"
    chat_template: str | None = None
    opening: Mapping[str, Any] = field(default_factory=dict)


def open_network(options: ModelOptions, ranks: int = 1, device: str | Device = "cpu") -> tuple[Any, Any]:
    """The network and its tokenizer. ranks, device: as in `generation.load`, and so are the errors."""
    generation.silence_transformers()
    opened = generation.open_model(options.directory, **options.opening)
    if options.chat_template is not None:
        opened.tokenizer.chat_template = options.chat_template
    return generation.load(opened, dtype=options.dtype, ranks=ranks, device=device), opened.tokenizer


def open_engine(model: ModelOptions, config: Config, options: EngineOptions, observer: Observer) -> Engine:
    """An engine of one process."""
    return Engine(*open_network(model, device=options.device), config, options, observer=observer)
