"""What an engine is told beside its model and how answers attend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magicpig.config import Config
from magicpig.engine.scheduler import Limits
from magicpig.errors import ArgumentError
from magicpig.integrations.transformers.shapes import key_dtype, sizes_of, token_limit
from magicpig.machine import free_memory
from magicpig.placement import Placement
from magicpig.placement.choice import place_of
from magicpig.placement.device import Device
from magicpig.where import check_where

SAFE_SHARE = 0.8  # of the memory that is free when the engine starts
UNLIMITED = 131072  # tokens, for models that name no limit


@dataclass(frozen=True)
class EngineOptions:
    """memory: bytes for keys, values and indexes of all requests; None for a safe share of what is free.

    cache_share: of this memory, what prompts that were read may keep while nobody needs it; 0 keeps none.
    cache_dir: a folder for them as well, so that they outlive the process; cache_limit: bytes of its files, None for
    half of what is free there.
    max_length: the most tokens of prompt and answer; None for the model's own limit.
    timeout, queue_timeout: seconds, for requests that name none. The others are those of `scheduler.Limits`.
    device, placement: as in `magicpig.where.Where`.
    """

    memory: int | None = None
    cache_share: float = 0.5
    cache_dir: Path | None = None
    cache_limit: int | None = None
    max_length: int | None = None
    token_budget: int = 512
    running: int = 32
    waiting: int = 256
    headroom: int = 1024
    aging: float = 60.0
    timeout: float | None = None
    queue_timeout: float | None = None
    device: str | Device = "cpu"
    placement: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.cache_share <= 1:
            raise ArgumentError(f"cache_share={self.cache_share} must be at least 0 and at most 1")
        for name in ("cache_limit", "max_length", "timeout", "queue_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ArgumentError(f"{name}={value} must be positive")

        check_where(self.device if isinstance(self.device, str) else "cuda", self.placement)

    def longest(self, network: Any) -> int:
        """The most tokens of prompt and answer."""
        return self.max_length or token_limit(network.config) or UNLIMITED

    def place(self, network: Any, config: Config) -> Placement:
        """Where the parts of a step run. Raises ArgumentError as `place_of`."""
        return place_of(
            self.device,
            self.placement,
            config,
            lambda: sizes_of(network.config, config),
            context=self.longest(network),
            batch=self.running,
            dtype=key_dtype(network),
        )

    def limits(self, processes: int = 1) -> Limits:
        """Of one of so many processes that share this machine."""
        memory = int(SAFE_SHARE * free_memory() / processes) if self.memory is None else self.memory
        return Limits(memory, self.token_budget, self.running, self.waiting, self.headroom, self.aging)
