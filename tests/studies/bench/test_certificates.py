import dataclasses

import pytest
import torch

from magicpig.studies.bench import certificates, layer
from magicpig.studies.bench.layer import Shape
from magicpig.studies.bench.plot import plot_heads
from magicpig.studies.evaluation.matrix import parse_methods
from magicpig.studies.figures.style import png_and_svg, style

LARGE = Shape(heads=8, kv_heads=2)  # heads of 128: their attention is spread widely enough for each to err
SHAPE = Shape(heads=4, kv_heads=2, head_dim=32, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def small_evictor(monkeypatch):
    monkeypatch.setattr(layer, "EVICTION_BYTES", 1 << 16)


def measured(samplers, tokens=900, contexts=2, steps=3, shape=SHAPE):
    sets = [shape.contexts(tokens, steps)[0] for _ in range(contexts)]
    calls = []
    found = certificates.measure("made up", sets, parse_methods(samplers, exact_below=0), lambda: calls.append(1))
    assert len(calls) == contexts
    return found


def test_a_certificate_per_setting_over_all_contexts():
    few, many, bounded, oracle = measured("sketch:32,sketch:256,sketch:32,epsilon=0.005,oracle:32")
    for each in (few, many, bounded, oracle):
        assert (each.source, each.tokens, each.cases) == ("made up", 900, 4 * 3 * 2)
        assert 0 < each.error < each.error_p95
        assert each.share == pytest.approx(each.rows / 764)
    assert (few.rows, many.rows) == (pytest.approx(32, rel=0.05), pytest.approx(256, rel=0.05))
    assert many.error < few.error
    assert many.predicted < few.predicted
    assert (few.epsilon, few.below, few.nearly_below) == (None, None, None)
    assert bounded.epsilon == 0.005
    assert bounded.below <= bounded.nearly_below
    assert bounded.rows > few.rows
    assert (oracle.predicted, oracle.kept) == (None, None)


def test_errors_of_each_context_and_head():
    (found,) = measured("sketch:32", contexts=3)
    assert [len(heads) for heads in found.heads] == [4, 4, 4]
    assert sum(map(sum, found.heads)) / 12 == pytest.approx(found.error, rel=1e-3)
    with style():
        figure = plot_heads([dataclasses.asdict(found)] * 2, [0, 5, 11])
        files = png_and_svg(figure)
    panel, other, _ = figure.axes
    assert panel.get_images()[0].get_array().shape == (3, 4)
    assert panel.get_title(loc="left") == other.get_title(loc="left") == f"sketch:32: {100 * found.error:.2g} %"
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0", "5", "11"]
    assert files[".png"].startswith(b"\x89PNG")


def test_predictions_hold_on_synthetic_contexts():
    (found,) = measured("sketch:256", tokens=4096, contexts=1, steps=8, shape=LARGE)
    assert found.error > 0.02
    assert found.kept >= 0.95


def test_a_promise_that_is_broken_is_seen(monkeypatch):
    real = certificates.attend_stores

    def boastful(*args, **options):
        state, info = real(*args, **options)
        return state, dataclasses.replace(info, predicted_error=info.predicted_error * 0)

    monkeypatch.setattr(certificates, "attend_stores", boastful)
    (found,) = measured("sketch:32", shape=LARGE)
    assert found.kept == 0


def test_errors_are_of_sampling_and_not_of_rounding():
    # Contexts are bfloat16, whose rounding alone is 0.2 %; nearly all keys are read.
    (found,) = measured("sketch:763")
    assert found.error < 1e-3
    assert found.kept == 1


def test_what_leaves_nothing_out_is_left_out():
    assert [each.name for each in measured("sketch:764,sketch:100,lsh:K=4,L=20")] == ["sketch:100", "lsh:K=4,L=20"]
    assert measured("lsh", tokens=60) == []
