import numpy as np
import pytest
from scipy.stats import binomtest

from magicpig.studies.evaluation.results import Results
from magicpig.studies.evaluation.table import AVERAGE, markdown, summarise, tables, wilson


@pytest.mark.parametrize(("right", "samples"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (95, 100), (499, 1000)])
def test_wilson_interval(right, samples):
    expected = binomtest(right, samples).proportion_ci(method="wilson")
    assert wilson(right / samples, samples) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize("samples", [10, 50])
def test_interval_holds_for_part_credit(samples):
    """Of 4000 experiments with scores in quarters, 95 % minus four standard errors (0.34 %) are caught."""
    rng = np.random.default_rng(0)
    scores = rng.binomial(4, rng.beta(2, 1, (4000, samples))) / 4
    caught = [low <= 2 / 3 <= high for low, high in (wilson(mean, samples) for mean in scores.mean(1))]
    assert np.mean(caught) > 0.936


def line(task, length, index, sampler, score, share=None, protocol="question-dense"):
    return {
        "task": task,
        "length": length,
        "index": index,
        "protocol": protocol,
        "sampler": sampler,
        "score": score,
        "share_mean": share,
        "share_max": None if share is None else 2 * share,
        "index_bytes": 0 if share is None else 50,
        "kv_bytes": 200,
    }


RESULTS = Results(
    header={},
    resumed=[],
    lines=[
        *(line(task, 1024, i, "full", 1.0) for task in ("vt", "cwe") for i in range(4)),
        *(line("vt", 1024, i, "lsh:K=9,L=120", i / 3, 0.02) for i in range(4)),
        *(line("cwe", 1024, i, "lsh:K=9,L=120", 0.0, 0.04) for i in range(4)),
        line("vt", 1500, 0, "full", 0.0),
        line("vt", 1500, 0, "lsh:K=9,L=120", 1.0, 0.03),
        line("vt", 1024, 0, "full", 1.0, protocol="question-sparse"),
    ],
)


def test_cells():
    cells = {(c.protocol, c.length, c.task, c.sampler): c for c in summarise(RESULTS)}
    assert len(cells) == 12
    tracking = cells["question-dense", 1024, "vt", "lsh:K=9,L=120"]
    assert tracking.samples == 4
    assert tracking.accuracy == pytest.approx(0.5)
    assert (tracking.low, tracking.high) == wilson(tracking.accuracy, 4)
    average = cells["question-dense", 1024, AVERAGE, "lsh:K=9,L=120"]
    assert (average.samples, average.accuracy) == (8, pytest.approx(0.25))
    assert average.share_mean == pytest.approx(0.03)
    assert average.share_max == pytest.approx(0.08)
    assert (average.index_bytes, average.kv_bytes) == (50, 200)
    assert cells["question-dense", 1024, "vt", "full"].share_mean is None


def test_markdown():
    dense, sparse = tables(summarise(RESULTS))
    assert "question-sparse" in sparse.title
    assert [len(block) for block in dense.blocks] == [6, 5]
    assert markdown(dense).splitlines()[2:9] == [
        "| length | task | full | lsh:K=9,L=120 |",
        "| --- | --- | --: | --: |",
        "| 1K | vt | 100.0 (51-100) | 50.0 (15-85) |",
        "| 1K | cwe | 100.0 (51-100) | 0.0 (0-49) |",
        "| 1K | average | 100.0 (68-100) | 25.0 (7-59) |",
        "| 1K | keys read, mean | all | 3.0% |",
        "| 1K | keys read, most | all | 8.0% |",
    ]
    assert "| 1500 | vt | 0.0 (0-79) | 100.0 (21-100) |" in markdown(dense)


def test_no_lines_no_tables():
    assert tables(summarise(Results({}, [], []))) == []
