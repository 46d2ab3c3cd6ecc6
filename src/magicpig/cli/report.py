"""What several commands show: progress while a prompt is read, and what a cache held and read."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from magicpig.integrations.transformers import CacheReport

TOTALS = (
    "tokens",
    "sampled_share_mean",
    "sampled_share_max",
    "predicted_error_mean",
    "predicted_error_p95",
    "predicted_error_max",
    "predicted_error_unknown",
    "epsilon",
    "all_read",
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
