"""`magicpig bench`: numbers that others can repeat."""

from __future__ import annotations

import os
import sys

import typer

from magicpig.cli.bench_attention import attention
from magicpig.cli.bench_certificates import certificates
from magicpig.cli.bench_decode import decode
from magicpig.cli.bench_frontier import frontier

PINNED = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}

measure = typer.Typer(help="Measure, in a way that can be repeated and compared.", no_args_is_help=True)
measure.command()(attention)
measure.command()(certificates)
measure.command()(decode)
measure.command()(frontier)


def pin_threads() -> None:
    """Bind each thread to a core: with two roaming threads, medians were four times worse than with one.

    OpenMP reads these variables when torch is imported, so it must not have been yet. What the user has set stays.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in PINNED):
        os.environ.update(PINNED)
