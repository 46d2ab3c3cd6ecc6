"""How far the work of a study is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from magicpig.generation import Model
    from magicpig.studies.evaluation.results import Results


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


def run_evaluation(
    evaluate: Callable[..., Results], model: Model, what: Any, path: Path, console: Console, **how: Any
) -> Results:
    """`evaluation.run.evaluate`, or another that is called like it, under a progress bar.

    what, how: is evaluated, and it is done. Says how to go on when interrupted.
    """
    with work_progress(console) as progress:
        bar = progress.add_task("Preparing", total=None)
        try:
            return evaluate(
                model,
                what,
                path,
                **how,
                on_start=lambda done, total: progress.reset(bar, completed=done, total=total),
                on_step=lambda step, work: progress.update(bar, description=escape(step), advance=work),
            )
        except KeyboardInterrupt:
            console.print(f"What is finished is in {escape(str(path))}; the same command goes on from there.")
            raise
