"""Where a number comes from: what somebody else needs to repeat a measurement, besides its settings."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import torch

from magicpig import machine
from magicpig.kernels import library


def provenance() -> dict[str, Any]:
    """Date, machine, threads, software and commit, as JSON can hold them. Memory in bytes."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.cpu_model(),
        "usable_cpus": machine.usable_cpus(),
        "memory_total": machine.total_memory(),
        "isa": library.isa(),
        "threads": library.threads(),
        "torch_threads": torch.get_num_threads(),
        "pool": library.pool(),
        "environment": machine.environment(),
        "versions": machine.versions(),
        "commit": machine.commit(),
    }
