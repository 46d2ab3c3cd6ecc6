"""How many threads torch and OpenMP take, and where they run. Said in the environment before torch is imported."""

from __future__ import annotations

import os
import sys

from magicpig.cli.options import MOST_THREADS
from magicpig.machine import cpu_quota, default_threads

PINNED = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}


def pin_threads() -> None:
    """Bind each thread to a core: with two roaming threads, medians were four times worse than with one.

    OpenMP reads these variables when torch is imported, so it must not have been yet. What the user has set stays.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in PINNED):
        os.environ.update(PINNED)


def follow_cpu_quota() -> None:
    """In a container that may use less than its processors, no more threads than that: others would only be stopped.

    As above, before torch is imported, and what the user has set stays.
    """
    if cpu_quota() is not None and "torch" not in sys.modules:
        for name in ("OMP_NUM_THREADS", "MAGICPIG_THREADS"):
            os.environ.setdefault(name, str(min(default_threads(), MOST_THREADS)))
