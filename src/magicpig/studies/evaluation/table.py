"""Results as tables: accuracy with its confidence interval, and how much was read for it. Pure arithmetic and text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from magicpig.studies.evaluation.results import Results, ResultsError
from magicpig.wording import counted, printable, shown

_TEXTS = ("task", "protocol", "sampler")
_COUNTS = ("length", "kv_bytes", "index_bytes")
_SHARES = ("score", "share_mean", "share_max")
_MOST = 1 << 63
AVERAGE = "average"  # of all tasks of a length
_Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations


@dataclass(frozen=True)
class Cell:
    """One sampler on one task at one length, under one protocol.

    accuracy: mean score, 0 to 1, of `samples` samples; low, high: its 95 % confidence interval.
    share_mean, share_max: of the indexed keys, the share that a query head read in a step; None if all were read.
    index_bytes, kv_bytes: of the index, and of keys and values; the largest of any sample.
    """

    protocol: str
    sampler: str
    task: str
    length: int
    samples: int
    accuracy: float
    low: float
    high: float
    share_mean: float | None
    share_max: float | None
    index_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class Table:
    """Text in rows under a title; `blocks` are groups of rows that belong together."""

    title: str
    head: list[str]
    blocks: list[list[list[str]]]


def wilson(mean: float, samples: int) -> tuple[float, float]:
    """The 95 % confidence interval of a mean of scores between 0 and 1 (Wilson's score interval, 1927).

    Exact in this sense for scores of 0 or 1. A score in between has a smaller variance than mean * (1 - mean), so for
    part credit the interval is, if anything, too wide.
    """
    centre = (mean + _Z**2 / (2 * samples)) / (1 + _Z**2 / samples)
    half = _Z / (1 + _Z**2 / samples) * math.sqrt(mean * (1 - mean) / samples + _Z**2 / (4 * samples**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(results: Results) -> list[Cell]:
    """Every cell that has samples, in the order of the results, and after each length the average of its tasks.

    Raises ResultsError for answers that lack what a table shows, or have values that no run writes.
    """
    grouped: dict[tuple[int, str, str, str], list[dict[str, Any]]] = {}
    for number, line in enumerate(results.lines, 1):
        if (wrong := _wrong_field(line)) is not None:
            raise ResultsError(f"answer {number} of the results is damaged: {wrong}")
        for task in (line["task"], AVERAGE):
            key = line["length"], task, line["protocol"], line["sampler"]
            grouped.setdefault(key, []).append(line)
    order = sorted(grouped, key=lambda key: (key[0], key[1] == AVERAGE))  # stable
    return [_cell(*key, grouped[key]) for key in order]


def _wrong_field(line: dict[str, Any]) -> str | None:
    for name in _TEXTS:
        if not isinstance(line.get(name), str):
            return f"{name}={shown(line.get(name))} must be text"
    for name in _COUNTS:
        value = line.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MOST:
            return f"{name}={shown(value)} must be a whole number from 0"
    for name in _SHARES:
        value = line.get(name)
        if value is None and name != "score" and name in line:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:  # NaN is not
            return f"{name}={shown(value)} must be a number from 0 to 1"
    return None


def tables(cells: Sequence[Cell]) -> list[Table]:
    """One table per protocol: tasks by length in rows, samplers in columns, all in percent."""
    return [_table(name, [cell for cell in cells if cell.protocol == name]) for name in _names(cells, "protocol")]


def markdown(table: Table) -> str:
    """The table as GitHub's Markdown."""
    under = ["---", "---", *["--:"] * (len(table.head) - 2)]
    rows = [table.head, under, *(row for block in table.blocks for row in block)]
    return "\n".join([f"**{table.title}**", "", *("| " + " | ".join(row) + " |" for row in rows)])


def _cell(length: int, task: str, protocol: str, sampler: str, lines: list[dict[str, Any]]) -> Cell:
    accuracy = sum(line["score"] for line in lines) / len(lines)
    means = [line["share_mean"] for line in lines if line["share_mean"] is not None]
    return Cell(
        protocol,
        sampler,
        task,
        length,
        len(lines),
        accuracy,
        *wilson(accuracy, len(lines)),
        share_mean=sum(means) / len(means) if means else None,
        share_max=max((line["share_max"] for line in lines if line["share_max"] is not None), default=None),
        index_bytes=max(line["index_bytes"] for line in lines),
        kv_bytes=max(line["kv_bytes"] for line in lines),
    )


def _table(protocol: str, cells: list[Cell]) -> Table:
    samplers = _names(cells, "sampler")
    blocks = []
    for length in dict.fromkeys(cell.length for cell in cells):
        here = {(cell.task, cell.sampler): cell for cell in cells if cell.length == length}
        rows = {
            task: [_accuracy(here.get((task, name))) for name in samplers] for task in _names(here.values(), "task")
        }
        averages = [here.get((AVERAGE, name)) for name in samplers]  # a run may have been stopped before some
        rows["keys read, mean"] = [(cell and _share(cell.share_mean)) or "" for cell in averages]
        rows["keys read, most"] = [(cell and _share(cell.share_max)) or "" for cell in averages]
        rows["index / keys and values"] = [
            _share(cell.index_bytes / cell.kv_bytes) if cell and cell.kv_bytes else "" for cell in averages
        ]
        blocks.append([[short_length(length), _cut(name), *row] for name, row in rows.items()])
    samples = max(cell.samples for cell in cells if cell.task != AVERAGE)
    title = f"{_cut(protocol)}: accuracy in % (and its 95 % interval), {counted(samples, 'sample')} per task and length"
    return Table(title, ["length", "task", *map(_cut, samplers)], blocks)


def _cut(name: str) -> str:
    return printable(name, 100)


def short_length(length: int) -> str:
    """32768 as 32K."""
    return str(length) if length % 1024 else f"{length // 1024}K"


def _accuracy(cell: Cell | None) -> str:
    return "" if cell is None else f"{cell.accuracy:.1%} ({cell.low:.0%}-{cell.high:.0%})".replace("%", "")


def _share(share: float | None) -> str:
    return "all" if share is None else f"{share:.1%}"


def _names(cells: Iterable[Cell], field: str) -> list[str]:
    return list(dict.fromkeys(getattr(cell, field) for cell in cells))
