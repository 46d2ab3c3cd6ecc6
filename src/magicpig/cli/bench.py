"""`magicpig bench`: numbers that others can repeat."""

from __future__ import annotations

import os
import sys

import typer

from magicpig.cli.bench_attention import attention
from magicpig.cli.bench_certificates import certificates
from magicpig.cli.bench_decode import decode
from magicpig.cli.bench_frontier import frontier
from magicpig.cli.bench_serving import serving
from magicpig.cli.commands import Command, CommandGroup
from magicpig.cli.options import MOST_THREADS
from magicpig.machine import cpu_quota, default_threads

PINNED = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}

measure = typer.Typer(cls=CommandGroup, help="Measure, in a way that can be repeated and compared.")
for command in (attention, certificates, decode, frontier, serving):
    measure.command(cls=Command)(command)


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
