import dataclasses
import math

import pytest
import torch

from magicpig.studies.bench import frontier, layer, settings
from magicpig.studies.bench.layer import Shape
from magicpig.studies.bench.plot import plot_frontier
from magicpig.studies.evaluation.matrix import MatrixError
from magicpig.studies.figures.style import LOOKS, png_and_svg, style

SHAPE = Shape(heads=4, kv_heads=2, head_dim=32, dtype=torch.float32)


@pytest.fixture(autouse=True)
def small_evictor(monkeypatch):
    monkeypatch.setattr(layer, "EVICTION_BYTES", 1 << 16)


def measured(samplers, tokens=900, **options):
    (data,) = SHAPE.contexts(tokens, steps=2)
    return list(frontier.measure("made up", data, settings.settings(samplers), repeats=1, **options))


def test_settings_of_a_name_are_all_there_are():
    names = [method.name for method in settings.settings("lsh,sketch,oracle,window")]
    assert len(names) == len(settings.TABLES) + 4 * len(settings.BUDGETS) + len(settings.BUDGETS) + 1
    assert {"lsh:K=10,L=150", "sketch:512,bits=2", "oracle:512", "window"} <= set(names)


def test_settings_of_their_own_are_kept():
    assert [method.name for method in settings.settings("lsh:K=9,L=120,sketch:99")] == ["lsh:K=9,L=120", "sketch:99"]
    with pytest.raises(MatrixError, match="unknown sampler 'lhs'"):
        settings.settings("lhs")


def test_a_point_per_setting():
    calls = []
    small, large, lsh, oracle = measured(
        "sketch:32,sketch:256,lsh:K=5,L=30,oracle:256", layer=3, on_point=lambda: calls.append(1)
    )
    assert len(calls) == 4
    for point in (small, large, lsh, oracle):
        assert (point.source, point.layer, point.tokens) == ("made up", 3, 900)
        assert 0 < point.error < point.error_p95
    assert (small.bits, small.budget, small.K, small.L) == (2, 32, None, None)
    assert (lsh.bits, lsh.budget, lsh.K, lsh.L) == (None, None, 5, 30)
    assert small.sampled_share == pytest.approx(32 / 764, rel=0.05)
    assert large.error < small.error
    assert small.step_ms > 0
    assert small.exact_ms > 0
    assert small.read_ms > 0
    assert oracle.step_ms is None
    assert oracle.exact_ms is None
    assert oracle.read_ms is None
    assert oracle.index_bytes_per_key == 0
    assert small.index_bytes_per_key < lsh.index_bytes_per_key


def test_what_leaves_nothing_out_is_left_out():
    calls = []
    points = measured("sketch:512,topk:512,topk:100,lsh:K=4,L=20", tokens=580, on_point=lambda: calls.append(1))
    assert [point.name for point in points] == ["topk:100", "lsh:K=4,L=20"]
    assert len(calls) == 4
    assert measured("lsh", tokens=68) == []


def test_layers_of_a_capture_become_one_point():
    layers = [measured("sketch:32,topk:64", layer=n) for n in (0, 1)]
    sketch, topk = frontier.over_layers([point for points in layers for point in points])
    assert (sketch.name, sketch.layer, topk.name, topk.layer) == ("sketch:32", None, "topk:64", None)
    assert sketch.error == pytest.approx((layers[0][0].error + layers[1][0].error) / 2)
    assert sketch.calls == layers[0][0].calls + layers[1][0].calls
    assert topk.step_ms is None
    assert frontier.over_layers(layers[0]) == layers[0]


def test_the_default_width_of_a_sketch_is_bold():
    rows = [dataclasses.asdict(point) for point in measured("sketch:32,bits=4,sketch:64,bits=4,sketch:32,sketch:64")]
    with style():
        bold = [line for line in plot_frontier(rows).axes[1].get_lines() if line.get_label() == LOOKS["sketch"].label]
    (line,) = bold
    default = [row["error"] for row in rows if row["bits"] == 2]
    assert sorted(line.get_ydata()) == sorted(default)


def test_the_best_are_beaten_by_none():
    (base,) = measured("sketch:32")

    def point(step_ms, error):
        return dataclasses.replace(base, step_ms=step_ms, error=error)

    fast, slow, worse, untimed = point(1.0, 0.3), point(2.0, 0.1), point(1.5, 0.3), point(None, 0.01)
    assert frontier.best([untimed, slow, worse, fast]) == [fast, slow]
    assert frontier.best([untimed]) == []


@pytest.mark.parametrize("samplers", ["lsh:K=5,L=30,lsh:K=5,L=60,sketch:32,sketch:32,bits=3,topk:64", "topk:64"])
def test_the_figure_has_a_column_per_source(samplers):
    rows = [dataclasses.asdict(point) for point in measured(samplers)]
    both = [row | {"source": source} for source in ("one", "two") for row in rows]
    with style():
        figure = plot_frontier(both)
        files = png_and_svg(figure)
        again = png_and_svg(plot_frontier(both))
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["one", "two"]
    assert len(figure.axes) == 6
    assert files == again
    assert files[".png"].startswith(b"\x89PNG")


def test_layers_of_a_capture_are_averaged():
    rows = [
        dataclasses.asdict(point) | {"layer": n, "error": e}
        for n, e in ((0, 0.1), (1, 0.3))
        for point in measured("topk:64")
    ]
    with style():
        (line,) = plot_frontier(rows).axes[1].get_lines()
    assert list(line.get_ydata()) == [pytest.approx(0.2)]
    assert all(math.isfinite(x) for x in line.get_xdata())
