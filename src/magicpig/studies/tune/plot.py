"""What was measured as a picture: what a small error costs, and what each layer takes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from magicpig.config import Config
from magicpig.studies.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    VERMILLION,
    Look,
    legend_below,
    panels,
    percent_ticks,
)
from magicpig.studies.tune.choose import LayerChoice, Tuning
from magicpig.studies.tune.measure import Measured

BITS = {1: (GREY, "v", ":"), 2: (SKY, "D", "-"), 3: (GREEN, "^", "--"), 4: (ORANGE, "s", "-.")}


def plot_tuning(tuning: Tuning) -> Figure:
    """Error against time of every setting over all layers, and the time of each layer before and after."""
    figure, (trade, layers) = panels(2, width=3.9, height=3.6)
    _plot_trade(trade, tuning)
    _plot_layers(layers, tuning.layers)
    legend_below(figure, [layers, trade])
    return figure


def _plot_trade(axes: Axes, tuning: Tuning) -> None:
    axes.set_title("One setting for all layers, and tuned")
    curves: dict[Look, list[tuple[float, float]]] = {}
    for tried in zip(*(each.measured[1:] for each in tuning.layers), strict=True):
        point = sum(map(LayerChoice.ms, tuning.layers, tried)), _mean(tried)
        curves.setdefault(_look(tried[0].config), []).append(point)
    for look, points in curves.items():
        times, errors = zip(*sorted(points), strict=True)
        axes.plot(
            times, errors, color=look.colour, marker=look.marker, linestyle=look.dashes, linewidth=1.2, label=look.label
        )
    axes.axvline(tuning.full_ms, color=BLACK, linestyle="--", linewidth=1.2, label="full attention")
    axes.axhline(tuning.goal.mean, color=VERMILLION, linestyle=":", linewidth=1.2, label="goal")
    if not all(each.is_dense for each in tuning.layers):
        tuned = tuning.tuned_ms, _mean([each.chosen for each in tuning.layers])
        axes.plot(*tuned, color=VERMILLION, marker="*", markersize=13, linestyle="", zorder=4, label="tuned")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("ms per token, all layers")
    axes.set_yscale("log")
    percent_ticks(axes.yaxis, *axes.get_ylim())
    axes.set_ylabel("relative error of the attention output")


def _plot_layers(axes: Axes, layers: Sequence[LayerChoice]) -> None:
    axes.set_title("Each layer")
    places = range(len(layers))
    axes.bar(places, [each.full_ms for each in layers], width=0.8, color="#d9d9d9", label="full attention")
    axes.bar(places, [each.ms(each.chosen) for each in layers], width=0.5, color=VERMILLION, label="tuned")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda place, _: _name(layers, place))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("layer")
    axes.set_ylabel("ms per token")
    axes.legend(loc="upper right", frameon=True, framealpha=1, edgecolor="white")
    axes.set_ylim(0, 1.35 * max(each.full_ms for each in layers))


def _look(config: Config) -> Look:
    """How a setting's family is plotted: the settings on one curve differ in how many rows they read."""
    if config.hashes:
        return Look("LSH sampling", BLUE, "o")
    colour, marker, dashes = BITS[config.bits]
    if config.epsilon is not None:
        return Look(f"{config.bits} bits, by predicted error", colour, "x", "")
    return Look(f"sketch, {config.bits} bits", colour, marker, dashes)


def _mean(tried: Sequence[Measured]) -> float:
    return sum(float(one.errors.mean()) for one in tried) / len(tried)


def _name(layers: Sequence[LayerChoice], place: float) -> str:
    return str(layers[int(place)].layer) if place == int(place) and 0 <= place < len(layers) else ""
