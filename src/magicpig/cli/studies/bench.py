"""`magicpig bench`: numbers that others can repeat."""

from __future__ import annotations

import typer

from magicpig.cli.commands import CommandGroup
from magicpig.cli.studies.bench_attention import attention
from magicpig.cli.studies.bench_certificates import certificates
from magicpig.cli.studies.bench_decode import decode
from magicpig.cli.studies.bench_engine import engine
from magicpig.cli.studies.bench_frontier import frontier
from magicpig.cli.studies.bench_placements import placements
from magicpig.cli.studies.bench_prefill import prefill
from magicpig.cli.studies.bench_serving import serving
from magicpig.cli.studies.bench_warm import warm
from magicpig.cli.studies.command import StudyCommand

measure = typer.Typer(cls=CommandGroup, help="Measure, in a way that can be repeated and compared.")
for command in (attention, certificates, decode, engine, frontier, placements, prefill, serving, warm):
    measure.command(cls=StudyCommand)(command)
