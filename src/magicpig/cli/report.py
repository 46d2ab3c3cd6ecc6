"""What several commands show: progress while a prompt is read, and what a cache held and read."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from pathlib import Path

    from magicpig.evaluation.matrix import Matrix
    from magicpig.evaluation.results import Results
    from magicpig.generation import Model
    from magicpig.integrations.transformers import CacheReport

TOTALS = (
    "tokens",
    "sampled_share_mean",
    "sampled_share_max",
    "predicted_error_mean",
    "predicted_error_p95",
    "predicted_error_max",
    "predicted_error_unknown",
    "kv_bytes",
    "index_bytes",
    "full_step_bytes",
    "read_step_bytes",
)


def cache_as_dict(report: CacheReport) -> dict[str, Any]:
    """The totals of the cache, and the same layer by layer."""
    return {name: getattr(report, name) for name in TOTALS} | asdict(report)


class _TokensPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s")


def prefill_progress(console: Console) -> Progress:
    """Tokens read, tokens per second and the time left; nothing at all where nobody watches."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        _TokensPerSecond(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def work_progress(console: Console) -> Progress:
    """A bar for one task whose description says what is going on; nothing at all where nobody watches."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def run_evaluation(model: Model, matrix: Matrix, path: Path, console: Console, **how: Any) -> Results:
    """`evaluation.run.evaluate` with ``how`` it is done, under a progress bar; says how to go on when interrupted."""
    from magicpig.evaluation.run import evaluate

    with work_progress(console) as progress:
        bar = progress.add_task("Preparing", total=None)
        try:
            return evaluate(
                model,
                matrix,
                path,
                **how,
                on_start=lambda done, total: progress.reset(bar, completed=done, total=total),
                on_step=lambda step, work: progress.update(bar, description=escape(step), advance=work),
            )
        except KeyboardInterrupt:
            console.print(f"What is finished is in {escape(str(path))}; the same command goes on from there.")
            raise
