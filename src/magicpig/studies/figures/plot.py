"""The figures, each from its rows of numbers alone, so that it can be plotted again from the JSON lines beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from magicpig.config import Config
from magicpig.studies.figures.anatomy import SHARES, TAIL_MASS, TAIL_SHARE
from magicpig.studies.figures.style import (
    BLACK,
    BLUE,
    GREY,
    LOOKS,
    ORANGE,
    VERMILLION,
    Point,
    curve,
    legend_below,
    panels,
    percent_ticks,
    share_axis,
)

Rows = Sequence[dict[str, Any]]
RESAMPLES = 1000
MOST_LINES = 60  # heads that can be told apart; of more, the median and two bands
CLAIM = ("topk", "lsh", "sketch")  # one loses aggregation, the others keep it


def plot_anatomy(mass: Rows, cosines: Rows) -> Figure:
    """Figure 2: how attention is spread, what the sink does to that, and the geometry behind both."""
    figure, (spread, sink, cones) = panels(3, height=3.5)
    _plot_spread(spread, mass)
    _plot_sink(sink, mass)
    _plot_cones(cones, cosines)
    return figure


def plot_errors(rows: Rows) -> Figure:
    """Figure 3: error of the attention output against the share of keys read, for long-tailed heads and for all."""
    tailed = [row for row in rows if row["long_tailed"]]
    heads, among = ({_head(row) for row in part} for part in (rows, tailed))
    parts = {f"Long-tailed heads ({len(among)} of {len(heads)})": tailed, f"All heads ({len(heads)})": rows}
    shown = {title: chosen for title, chosen in parts.items() if chosen}
    figure, axes = panels(len(shown), width=3.9, height=3.6)
    for each, (title, chosen) in zip(axes, shown.items(), strict=True):
        each.set_title(title)
        curves = _curves(chosen)
        for sampler, points in curves.items():
            _plot_points(each, sampler, points)
        shares = [point.share for points in curves.values() for point in points]
        share_axis(each, "share of keys read", *_range(shares))
        each.set_yscale("log")
        percent_ticks(each.yaxis, *each.get_ylim())
    axes[0].set_ylabel("relative error of the attention output")
    legend_below(figure, axes)
    return figure


def plot_accuracy(rows: Rows) -> Figure:
    """Figure 1: accuracy against the share of keys read, a panel per task; full attention is the line across.

    Intervals are shown where the claim needs them; more would hide the curves.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = panels(len(tasks), height=3.6, share_y=True)
    shares = [row["share_mean"] or 0.0 for row in rows]
    for each, task in zip(axes, tasks, strict=True):
        each.set_title(task)
        chosen = [row for row in rows if row["task"] == task]
        for sampler in (name for name in LOOKS if name in {row["sampler"] for row in chosen}):
            points = [
                Point(row["share_mean"] or 0.0, row["accuracy"], row["low"], row["high"])
                for row in chosen
                if row["sampler"] == sampler
            ]
            _plot_points(each, sampler, points, aside=sampler not in CLAIM)
        share_axis(each, "share of keys read", *_range(shares))
        each.set_ylim(-0.03, 1.03)
        each.yaxis.set_major_formatter(_percent)
    axes[0].set_ylabel("accuracy")
    legend_below(figure, axes)
    return figure


def plot_centring(rows: Rows) -> Figure:
    """The ablation: accuracy, and share of keys sampled, with the keys centred before hashing and without."""
    figure, (accuracy, shares) = panels(2, height=2.6, share_y=True)
    settings = list(dict.fromkeys(row["setting"] for row in rows if row["setting"]))[::-1]
    for centre, (colour, marker, label, up) in {
        True: (BLUE, "o", "keys centred", 0.12),
        False: (VERMILLION, "s", "not centred", -0.12),
    }.items():
        chosen = [row for row in rows if row["centre"] is centre]
        places = [settings.index(row["setting"]) + up for row in chosen]
        values = [row["accuracy"] for row in chosen]
        # Rounding may put the end of an interval on the wrong side of a mean of 0 or 1.
        below = [max(0.0, row["accuracy"] - row["low"]) for row in chosen]
        above = [max(0.0, row["high"] - row["accuracy"]) for row in chosen]
        accuracy.errorbar(
            values, places, xerr=[below, above], color=colour, marker=marker, linestyle="", elinewidth=1, label=label
        )
        shares.plot([row["share_mean"] for row in chosen], places, color=colour, marker=marker, linestyle="")
    for row in rows:
        if row["centre"] is None:
            accuracy.axvline(row["accuracy"], color=BLACK, linestyle="--", linewidth=1, label="full attention")
    accuracy.set_xlim(-0.03, 1.03)
    accuracy.xaxis.set_major_formatter(_percent)
    accuracy.set_xlabel("accuracy")
    accuracy.set_title("Needles found")
    accuracy.set_yticks(range(len(settings)), settings)
    accuracy.set_ylim(-0.6, len(settings) - 0.4)
    shares.set_xlabel("share of keys sampled")
    shares.set_title("Keys sampled")
    shares.set_xlim(0)
    shares.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    legend_below(figure, [accuracy, shares])
    return figure


def _range(shares: list[float]) -> tuple[float, float]:
    """The ends of a logarithmic axis with some room on both sides."""
    positive = [share for share in shares if share > 0]
    return min(positive, default=0.01) / 1.2, max(positive, default=1.0) * 1.2


def _plot_points(axes: Axes, sampler: str, points: list[Point], *, aside: bool = False) -> None:
    if Config(sampler=sampler).named_by:
        curve(axes, sampler, points, aside=aside)
        return
    (point,), look = points, LOOKS[sampler]  # there is nothing to set, so it is a line across
    axes.axhspan(point.low, point.high, color=look.colour, alpha=0.07, linewidth=0)
    axes.axhline(point.value, color=look.colour, linestyle=look.dashes, linewidth=1.2, label=look.label)


def _plot_spread(axes: Axes, rows: Rows) -> None:
    axes.set_title("How attention is spread")
    looks = {False: (GREY, "-", "other heads"), True: (ORANGE, "-", "long-tailed heads")}
    for tailed, (colour, dashes, label) in looks.items():
        chosen = [row for row in rows if row["long_tailed"] is tailed]
        if len(chosen) > MOST_LINES:
            curves = np.array([row["mass"] for row in chosen])
            for ends, alpha in (((0.05, 0.95), 0.15), ((0.25, 0.75), 0.3)):
                axes.fill_between(SHARES, *np.quantile(curves, ends, axis=0), color=colour, alpha=alpha, linewidth=0)
            axes.plot(SHARES, np.median(curves, axis=0), color=colour, linewidth=1.6, linestyle=dashes)
        else:
            for row in chosen:
                axes.plot(SHARES, row["mass"], color=colour, linewidth=0.7, alpha=0.6, linestyle=dashes)
        if chosen:
            axes.plot([], [], color=colour, label=f"{label} ({len(chosen)})")
    axes.plot([TAIL_SHARE, TAIL_SHARE, SHARES[0]], [0.3, TAIL_MASS, TAIL_MASS], color=BLACK, linestyle=":", linewidth=1)
    _mass_axes(axes)
    rule = f"long-tailed: top {_percent(TAIL_SHARE)} hold < {_percent(TAIL_MASS)}"
    _legend_under(axes, rule)


def _plot_sink(axes: Axes, rows: Rows) -> None:
    axes.set_title("With and without the sink")
    for name, colour, dashes, label in (
        ("mass", BLUE, "-", "all keys"),
        ("mass_without_sink", VERMILLION, "--", "without the heaviest key"),
    ):
        curves = np.array([row[name] for row in rows])
        axes.fill_between(SHARES, *np.quantile(curves, [0.25, 0.75], axis=0), color=colour, alpha=0.14, linewidth=0)
        axes.plot(SHARES, np.median(curves, axis=0), color=colour, linestyle=dashes, label=label)
    _mass_axes(axes)
    _legend_under(axes, "median and quartiles of heads")


def _plot_cones(axes: Axes, rows: Rows) -> None:
    axes.set_title("Where keys and queries lie")
    pairs = {
        "sink_moves": "sink key,\ntwo texts",
        "mean_to_keys": "mean key,\nkeys",
        "mean_to_queries": "mean key,\nqueries",
        "sink_to_keys": "sink key,\nother keys",
    }
    for place, name in enumerate(pairs):
        values = sorted(row[name] for row in rows if row.get(name) is not None)
        # Side by side in the order of their size: a shape, and no randomness.
        across = [place + 0.5 * (i / max(1, len(values) - 1) - 0.5) for i in range(len(values))]
        axes.plot(across, values, color=BLUE, marker="o", markersize=3, alpha=0.6, linestyle="")
        if values:
            axes.plot([place - 0.32, place + 0.32], [np.median(values)] * 2, color=BLACK, linewidth=1.6)
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.set_ylim(-1.05, 1.05)
    axes.set_xticks(range(len(pairs)), list(pairs.values()), fontsize=7.5)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("cosine (a point per head; line: median)")


def _legend_under(axes: Axes, title: str) -> None:
    """A panel's own legend, where no curve can lie."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, title=title, title_fontsize=7.5)


def _mass_axes(axes: Axes) -> None:
    share_axis(axes, "share of keys, largest first", SHARES[0], 1.0)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of the attention they hold")
    axes.yaxis.set_major_formatter(_percent)


def _percent(share: float, _: float = 0) -> str:
    return f"{100 * share:.0f} %"


def _head(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("task", "index", "layer", "head"))


def _curves(rows: Rows) -> dict[str, list[Point]]:
    """By sampler, for each of its settings: median share and median error over the heads.

    Not the mean: where the values that a head averages nearly cancel, any error is many times its output.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["sampler"], {}).setdefault(row["method"], []).append(row)
    return {name: [_point(each) for each in found[name].values()] for name in LOOKS if name in found}


def _point(rows: Rows) -> Point:
    errors = [row["error"] for row in rows]
    return Point(float(np.median([row["share"] for row in rows])), float(np.median(errors)), *bootstrap(errors))


def bootstrap(values: Iterable[float]) -> tuple[float, float]:
    """A 95 % interval of the median: percentiles over resamples (Efron 1979), the same ones every time."""
    data = np.array(list(values))
    drawn = np.random.default_rng(0).integers(len(data), size=(RESAMPLES, len(data)))
    low, high = np.quantile(np.median(data[drawn], axis=1), [0.025, 0.975])
    return float(low), float(high)
