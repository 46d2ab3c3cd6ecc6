import numpy as np
import pytest

from magicpig.studies.figures import plot
from magicpig.studies.figures.anatomy import SHARES
from magicpig.studies.figures.style import LOOKS, RULES, Point, curve, legend_below, panels, png_and_svg, style

HEADS = [{"task": "cwe", "index": 0, "layer": layer, "head": head} for layer in range(2) for head in range(4)]


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    monkeypatch.setitem(RULES, "savefig.dpi", 30)


def error_rows(long_tailed=(True, False)):
    return [
        head
        | {"sampler": sampler, "method": f"{sampler}:{share}", "share": share, "error": 0.1 / (1 + place) / share}
        | {"long_tailed": long_tailed[place % 2]}
        for sampler in ("topk", "lsh")
        for share in (0.02, 0.01)
        for place, head in enumerate(HEADS)
    ]


def accuracy_rows():
    full = {"sampler": "full", "accuracy": 1.0, "low": 0.8, "high": 1.0, "share_mean": None}
    window = full | {"sampler": "window", "accuracy": 0.1, "low": 0.0, "share_mean": 0.0}
    sampled = [
        {"sampler": sampler, "accuracy": 10 * share, "low": 0.0, "high": 0.9, "share_mean": share}
        for sampler in ("lsh", "quest")
        for share in (0.05, 0.01)
    ]
    return [{"task": task} | row for task in ("cwe", "fwe") for row in (full, window, *sampled)]


def centring_rows():
    rows = [{"setting": None, "centre": None, "accuracy": 1.0, "low": 0.84, "high": 1.0, "share_mean": None}]
    for setting in ("a", "b"):
        for centre in (True, False):
            # As Wilson's interval rounds: its end is just below the mean.
            rows.append(
                {"setting": setting, "centre": centre, "accuracy": float(centre), "low": 0.0, "high": 1.0 - 1e-16}
                | {"share_mean": 0.02 if centre else 0.0001}
            )
    return rows


def anatomy_rows():
    mass = [
        head | {"mass": list(np.array(SHARES) ** 0.5), "mass_without_sink": list(SHARES), "long_tailed": place > 3}
        for place, head in enumerate(HEADS)
    ]
    cosines = [
        {"layer": 0, "kv_head": g, "sink_to_keys": 0.1, "mean_to_keys": 0.8, "mean_to_queries": -0.7} for g in range(2)
    ]
    return mass, cosines


FIGURES = {
    "accuracy": lambda: plot.plot_accuracy(accuracy_rows()),
    "anatomy": lambda: plot.plot_anatomy(*anatomy_rows()),
    "errors": lambda: plot.plot_errors(error_rows()),
    "centring": lambda: plot.plot_centring(centring_rows()),
}


@pytest.mark.parametrize("name", FIGURES)
def test_same_numbers_same_bytes(name):
    files = []
    for _ in range(2):
        with style():
            files.append(png_and_svg(FIGURES[name]()))
    assert files[0] == files[1]
    assert files[0][".png"].startswith(b"\x89PNG")
    assert b"<dc:date>" not in files[0][".svg"]


def drawn(axes, label):
    (line,) = [line for line in axes.get_lines() if line.get_label() == LOOKS[label].label]
    return line.get_xdata(), line.get_ydata()


def test_curves_of_errors_are_medians_over_heads():
    with style():
        tailed, everything = plot.plot_errors(error_rows()).axes
    assert tailed.get_title(loc="left") == "Long-tailed heads (4 of 8)"
    assert everything.get_title(loc="left") == "All heads (8)"
    shares, errors = drawn(everything, "topk")
    assert list(shares) == [0.01, 0.02]  # in order
    assert errors[0] == pytest.approx(np.median([0.1 / (1 + place) / 0.01 for place in range(8)]))
    _, errors = drawn(tailed, "lsh")
    assert errors[1] == pytest.approx(np.median([0.1 / (1 + place) / 0.02 for place in (0, 2, 4, 6)]))


def test_many_heads_are_bands_and_a_median():
    mass, cosines = anatomy_rows()
    with style():
        spread = plot.plot_anatomy([row | {"index": i} for i in range(20) for row in mass], cosines).axes[0]
    assert len(spread.get_lines()) == 5  # two medians, two entries of the legend, and the rule
    assert len(spread.collections) == 4


def test_no_panel_for_long_tailed_heads_where_there_are_none():
    with style():
        (only,) = plot.plot_errors(error_rows((False, False))).axes
    assert only.get_title(loc="left") == "All heads (8)"


def test_accuracy_has_a_panel_per_task_and_full_attention_across():
    with style():
        panels = plot.plot_accuracy(accuracy_rows()).axes
    assert [axes.get_title(loc="left") for axes in panels] == ["cwe", "fwe"]
    shares, accuracies = drawn(panels[0], "lsh")
    assert list(shares) == [0.01, 0.05]
    assert list(accuracies) == pytest.approx([0.1, 0.5])
    assert list(drawn(panels[1], "full")[1]) == [1.0, 1.0]
    assert list(drawn(panels[1], "window")[1]) == [0.1, 0.1]


def test_the_users_own_settings_do_not_matter(monkeypatch):
    import matplotlib

    with style():
        once = png_and_svg(plot.plot_errors(error_rows()))
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 9)
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "red")
    with style():
        assert png_and_svg(plot.plot_errors(error_rows())) == once
    assert matplotlib.rcParams["lines.linewidth"] == 9


def test_looks_can_be_told_apart_without_colour():
    shapes = [(look.marker, look.dashes) for look in LOOKS.values()]
    assert len(set(shapes)) == len(shapes)
    assert len({look.label for look in LOOKS.values()}) == len(LOOKS)


def test_bootstrap_is_about_two_standard_errors():
    values = np.random.default_rng(1).normal(3, 1, 400)
    low, high = plot.bootstrap(values)
    # A median's standard error is sqrt(pi / 2) / sqrt(400); a percentile of 1000 resamples is within some 10 % of it,
    # and the density of 400 values at their median within some 20 % of the normal one.
    assert low == pytest.approx(np.median(values) - 1.96 * 0.0627, abs=0.04)
    assert high == pytest.approx(np.median(values) + 1.96 * 0.0627, abs=0.04)
    assert plot.bootstrap([0.5]) == (0.5, 0.5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_legend_fits_the_page(count):
    with style():
        figure, axes = panels(count)
        for sampler in LOOKS:
            curve(axes[0], sampler, [Point(0.01, 0.5, 0.4, 0.6), Point(0.1, 0.6, 0.5, 0.7)])
        legend_below(figure, axes)
        figure.canvas.draw()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert len(legend.get_texts()) == len(LOOKS)
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
