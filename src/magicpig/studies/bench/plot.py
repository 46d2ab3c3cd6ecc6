"""The figures of `magicpig bench frontier` and `bench certificates`, from their rows of numbers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from magicpig.config import Config
from magicpig.studies.figures.style import BLACK, LOOKS, legend_below, percent_ticks

Rows = Sequence[dict[str, Any]]


def plot_frontier(rows: Rows) -> Figure:
    """A column per context; in it, error against time per step, against the share of keys read, and against the index.

    Lines are means over heads and steps, bands reach up to the 95th percentile. Layers of one capture are averaged.
    """
    sources = list(dict.fromkeys(row["source"] for row in rows))
    figure = Figure(figsize=(3.6 * len(sources) + 0.4, 8.4), layout="constrained")
    grid = figure.subplots(3, len(sources), sharey=True, squeeze=False)
    for column, source in zip(grid.T, sources, strict=True):
        points = _averaged([row for row in rows if row["source"] == source])
        column[0].set_title(source)
        timed = [point for point in points if point["step_ms"] is not None]
        for axes, chosen, name in zip(
            column, (timed, points, timed), ("step_ms", "sampled_share", "index_bytes_per_key"), strict=True
        ):
            _plot_curves(axes, chosen, name)
            axes.set_yscale("log")
        if timed:
            exact = median(point["exact_ms"] for point in timed)
            column[0].axvline(exact, color=BLACK, linestyle="--", linewidth=1, label="full attention, exact kernel")
        column[0].set_xscale("log")
        _plain_ticks(column[0])
        column[0].set_xlabel("milliseconds per step")
        column[1].set_xscale("log")
        percent_ticks(column[1].xaxis, *column[1].get_xlim())
        column[1].set_xlabel("share of keys read by a head")
        column[2].set_xscale("log")
        _plain_ticks(column[2])
        column[2].set_xlabel("bytes of index per key and kv head")
    for axes in grid[:, 0]:
        axes.set_ylabel("relative error of the output")
        percent_ticks(axes.yaxis, *axes.get_ylim())
    legend_below(figure, list(grid.flat))
    return figure


def plot_heads(rows: Rows, layers: Sequence[int]) -> Figure:
    """Where the error of a capture is: a panel per setting, in it a square for every layer and query head."""
    width, height = max(1.8, 0.22 * len(rows[0]["heads"][0])), max(3.0, 1.2 + 0.16 * len(layers))
    figure = Figure(figsize=(1.8 + width * len(rows), height))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    every = [error for row in rows for head in row["heads"] for error in head if error > 0]
    norm = LogNorm(min(every, default=0.001), max(every, default=1.0))
    for axes, row in zip(grid, rows, strict=True):
        image = axes.imshow(row["heads"], aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
        axes.set_title(f"{row['name']}: {100 * row['error']:.2g} %")
        axes.set_xlabel("query head")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(visible=False)
    marked = range(0, len(layers), max(1, math.ceil(len(layers) / 10)))
    grid[0].set_yticks(list(marked), [str(layers[i]) for i in marked])
    grid[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=list(grid), label="relative error of the output")
    percent_ticks(bar.ax.yaxis, norm.vmin or 0.001, norm.vmax or 1.0)
    return figure


def _plot_curves(axes: Axes, points: Rows, name: str) -> None:
    """A curve for each width of a sketch, in bold that of the default, each K of tables, and each other sampler."""
    for sampler in (sampler for sampler in LOOKS if any(point["sampler"] == sampler for point in points)):
        curves: dict[Any, list[dict[str, Any]]] = {}
        for point in points:
            if point["sampler"] == sampler:
                curves.setdefault(point["bits"] or point["K"], []).append(point)
        for setting, curve in sorted(curves.items(), key=lambda item: str(item[0])):
            aside = curve[0]["bits"] not in (None, Config().bits)
            _plot_curve(axes, sampler, sorted(curve, key=_setting), name, aside=aside)
            if setting is not None and name == "index_bytes_per_key":  # there each curve has its own place
                last = max(curve, key=lambda point: point["error"])
                text = f"K {setting}" if last["bits"] is None else f"{setting} bit"
                axes.annotate(
                    text,
                    (last[name], last["error"]),
                    textcoords="offset points",
                    xytext=(0, 5),
                    ha="center",
                    fontsize=6.5,
                    color=LOOKS[sampler].colour,
                )


def _plot_curve(axes: Axes, sampler: str, curve: Rows, name: str, *, aside: bool) -> None:
    look = LOOKS[sampler]
    across, errors = [point[name] for point in curve], [point["error"] for point in curve]
    axes.plot(
        across,
        errors,
        color=look.colour,
        marker=look.marker,
        linestyle=look.dashes,
        linewidth=0.8 if aside else 1.6,
        markersize=2.5 if aside else 4.5,
        alpha=0.6 if aside else 1.0,
        zorder=2 if aside else 3,
        label=None if aside else look.label,
    )
    if not aside and curve[0]["step_ms"] is not None:
        above = [point["error_p95"] for point in curve]
        axes.fill_between(across, errors, above, color=look.colour, alpha=0.12, linewidth=0)


def _averaged(rows: Rows) -> list[dict[str, Any]]:
    """One row per setting: means over the layers of a source."""
    named: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        named.setdefault(row["name"], []).append(row)
    numbers = ("error", "error_p95", "sampled_share", "step_ms", "exact_ms", "index_bytes_per_key")
    return [
        same[0] | {name: None if same[0][name] is None else mean(row[name] for row in same) for name in numbers}
        for same in named.values()
    ]


def _setting(point: dict[str, Any]) -> Any:
    """What a curve runs along. Not what it costs: times are noisy."""
    return point["L"] if point["budget"] is None else point["budget"]


def _plain_ticks(axes: Axes) -> None:
    low, high = axes.get_xlim()
    steps = (1.0,) if high / low > 200 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(10, steps, numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
