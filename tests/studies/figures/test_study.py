import dataclasses

import pytest

from magicpig.config import Config
from magicpig.functional import attend
from magicpig.studies.bench.synthetic import synthetic_context
from magicpig.studies.figures.study import estimate, exact_outputs


@pytest.fixture(scope="module")
def attention():
    return synthetic_context(1500, heads=6, kv_heads=2, head_dim=64, steps=3)


def test_reading_everything_makes_no_error(attention):
    estimates = estimate(attention, Config(sampler="full"), exact_outputs(attention))
    assert [each.head for each in estimates] == list(range(6))
    for each in estimates:
        assert each.share == 1
        assert each.error < 1e-5
        assert each.lse_error < 1e-5


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_one_step_is_that_of_attend(attention, softcap):
    last = dataclasses.replace(attention, queries=attention.queries[-1:], softcap=softcap)
    (exact,) = exact_outputs(last)
    config = Config(K=6, L=40)
    output, lse, info = attend(
        last.queries[:, :, None], last.keys[None], last.values[None], K=6, L=40, scale=last.scale, softcap=softcap
    )
    errors = (output[0, :, 0].double() - exact.output).norm(dim=-1) / exact.output.norm(dim=-1)
    for head, each in enumerate(estimate(last, config, [exact])):
        assert each.error == pytest.approx(float(errors[head]), rel=1e-4)
        assert each.lse_error == pytest.approx(float((lse[0, head] - exact.lse[head]).abs()), rel=1e-3, abs=1e-5)
        assert each.share == pytest.approx(len(info.ids[0][head]) / (5 * 256 - 4), rel=1e-5)


def test_more_tables_read_more_and_err_less(attention):
    exact = exact_outputs(attention)
    few, many = (estimate(attention, Config(K=6, L=L), exact) for L in (10, 160))
    for less, more in zip(few, many, strict=True):
        assert less.share < more.share
    assert sum(each.error for each in many) < sum(each.error for each in few)


def test_every_layer_and_length_is_sampled(attention):
    config = Config(K=6, L=40, exact_below=10**6, dense_layers=(0,))
    assert all(0 < each.share < 1 for each in estimate(attention, config, exact_outputs(attention)))
