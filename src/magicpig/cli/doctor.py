"""`magicpig doctor`: is everything in order, and what would be faster?"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from magicpig.wording import counted

if TYPE_CHECKING:
    from magicpig.doctor import Report


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what this machine offers and what is used of it, and check that the kernels compute the right thing.

    Exit code 1 if they do not.
    """
    from magicpig.doctor import examine

    report = examine()
    if as_json:
        print(json.dumps(asdict(report) | {"healthy": report.healthy}, indent=2))
    else:
        _show(report, Console(highlight=False))
    if not report.healthy:
        raise typer.Exit(1)


def _show(report: Report, console: Console) -> None:
    gib = 2**30
    limit = "" if report.memory_limit is None else f", limited to {report.memory_limit / gib:.1f} GiB by the container"
    cores = "unknown number of cores" if report.physical_cores is None else counted(report.physical_cores, "core")
    quota = "" if report.cpu_quota is None else f", limited to the time of {report.cpu_quota:g} by the container"
    facts = {
        "kernels": f"{report.isa} (this machine can run {', '.join(report.isa_usable)})",
        "processor": f"{report.cpu} ({', '.join(report.cpu_flags) or 'no special instructions'})",
        "cores": f"{counted(report.usable_cpus, 'usable processor')}, {cores}{quota}",
        "threads": f"{report.threads} in the {report.pool} pool, {report.torch_threads} in torch",
        "memory": f"{report.memory_available / gib:.1f} of {report.memory_total / gib:.1f} GiB available{limit}",
        "huge pages": report.huge_pages or "not offered by this system",
        "NUMA nodes": f"{report.numa_nodes}{', large stores take turns on them' if report.numa_nodes > 1 else ''}",
        "GPU": f"{report.gpu} (not needed)" if report.gpu else "none (none is needed)",
        "variables": " ".join(f"{name}={value}" for name, value in report.environment.items()) or "none set",
        "versions": ", ".join(f"{name} {value}" for name, value in report.versions.items()),
    }
    table = _columns()
    for name, value in facts.items():
        table.add_row(f"[bold]{name}", value)
    console.print(table)

    verdict = _columns()
    for line in report.advice:
        verdict.add_row("[bold]advice", line)
    for check in report.checks:
        if not check.passed:
            verdict.add_row(
                "[bold red]FAILED",
                f"{check.isa}, {check.dtype}, {check.what}: "
                f"relative error {check.error:.1e}, allowed {check.tolerance:.0e}",
            )
    if report.healthy:
        verdict.add_row("[bold green]OK", f"{counted(len(report.checks), 'self-check')} against torch in float64")
    console.print()
    console.print(verdict)


def _columns() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(width=10)
    return table
