"""How every figure looks: one palette, one set of markers, one way to write a file.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which people with any kind of colour vision can
tell apart; markers and dashes say the same once more. The same numbers give the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

BLACK, GREY = "#000000", "#8a8a8a"
ORANGE, SKY, GREEN, BLUE = "#E69F00", "#56B4E9", "#009E73", "#0072B2"
VERMILLION, PURPLE = "#D55E00", "#CC79A7"


@dataclass(frozen=True)
class Look:
    """A curve: what the legend calls it, its colour, marker and dashes."""

    label: str
    colour: str
    marker: str
    dashes: str = "-"


LOOKS = {
    "full": Look("full attention", BLACK, "", "--"),
    "topk": Look("exact top-k", VERMILLION, "s"),
    "quest": Look("Quest", PURPLE, "v"),
    "window": Look("window only", GREY, "x", ":"),
    "uniform-tail": Look("top-k + uniform tail", ORANGE, "P", "-."),
    "oracle": Look("oracle sampling", GREEN, "^", "--"),
    "oracle-replacement": Look("oracle, with replacement", SKY, "<", ":"),
    "lsh": Look("LSH sampling (MagicPIG)", BLUE, "o"),
    "sketch": Look("sketch sampling", SKY, "D"),
}

RULES: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "svg.hashsalt": "magicpig",  # else identifiers are random
    "svg.fonttype": "path",
}


@contextmanager
def style() -> Iterator[None]:
    """Figures made inside look as they should."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(RULES)
        yield


def panels(count: int, *, width: float = 3.4, height: float = 3.1, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels side by side, each of this size in inches, with room for a legend below."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = figure.subplots(1, count, sharey=share_y, squeeze=False)[0]
    return figure, list(axes)


@dataclass(frozen=True)
class Point:
    """One setting of a sampler: what it read, what came of it, and a 95 % interval of that."""

    share: float
    value: float
    low: float
    high: float


def curve(axes: Axes, sampler: str, points: list[Point], *, aside: bool = False) -> None:
    """A sampler's curve in the sampler's look, with its band; or, ``aside``, thinner and without."""
    look, ordered = LOOKS[sampler], sorted(points, key=lambda point: point.share)
    shares, values, lows, highs = zip(*[(each.share, each.value, each.low, each.high) for each in ordered], strict=True)
    axes.plot(
        shares,
        values,
        color=look.colour,
        marker=look.marker,
        linestyle=look.dashes,
        linewidth=1.0 if aside else 2.0,
        markersize=4 if aside else 5.5,
        zorder=2 if aside else 3,
        label=look.label,
    )
    if not aside:
        axes.fill_between(shares, lows, highs, color=look.colour, alpha=0.14, linewidth=0)


def share_axis(axes: Axes, label: str, lowest: float, highest: float) -> None:
    """A logarithmic x axis of shares."""
    axes.set_xscale("log")
    axes.set_xlim(lowest, highest)
    percent_ticks(axes.xaxis, lowest, highest)
    axes.set_xlabel(label)


def percent_ticks(axis: Axis, lowest: float, highest: float) -> None:
    """Shares on a logarithmic axis written in per cent: 1, 2, 5, 10, or powers of ten where there is no room."""
    steps = (1.0,) if highest / lowest > 200 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(10, steps, numticks=20))
    axis.set_minor_locator(NullLocator() if len(steps) > 1 else LogLocator(10, (2.0, 5.0), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axis.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, axes: list[Axes]) -> None:
    """One legend for all panels, each entry once, in the order of `LOOKS`.

    In rows of about the same length, so many that they fit the page.
    """
    found: dict[str, Artist] = {}
    for each in axes:
        handles, labels = each.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    order = [look.label for look in LOOKS.values()]
    labels = sorted(found, key=lambda label: order.index(label) if label in order else len(order))
    for most in range(min(4, 2 * len(axes), len(labels)), 0, -1):
        columns = math.ceil(len(labels) / math.ceil(len(labels) / most))
        handles = [found[label] for label in labels]
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def png_and_svg(figure: Figure) -> dict[str, bytes]:
    """The figure as files, by suffix. Call it inside `style`."""
    files = {}
    for suffix, undated in ((".png", "Software"), (".svg", "Date")):
        content = io.BytesIO()
        figure.savefig(content, format=suffix[1:], metadata={undated: None})
        files[suffix] = content.getvalue()
    return files
