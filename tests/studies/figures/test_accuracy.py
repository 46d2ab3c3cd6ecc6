import pytest

from magicpig.config import SAMPLERS, Config
from magicpig.studies.evaluation.matrix import Matrix, MatrixError
from magicpig.studies.evaluation.results import Results
from magicpig.studies.figures.accuracy import (
    COMPARED,
    SHARES,
    accuracy_rows,
    centring_methods,
    centring_rows,
    methods,
)
from magicpig.studies.figures.style import LOOKS


def test_every_sampler_has_its_curve():
    made = methods(exact_below=0, dense_layers=())
    assert {method.config.sampler for method in made} == set(COMPARED)
    for method in made:
        assert (method.config.exact_below, method.config.dense_layers) == (0, ())
    for sampler in (name for name in COMPARED if "budget" in Config(sampler=name).named_by):
        assert [method.config.budget for method in made if method.config.sampler == sampler] == list(SHARES)


def test_every_sampler_has_a_look():
    assert set(SAMPLERS) <= set(LOOKS)


def test_unknown_sampler():
    with pytest.raises(MatrixError, match="unknown sampler 'top'"):
        methods(["full", "top"])


def results(matrix) -> Results:
    line = {"length": 4096, "protocol": "question-dense", "index_bytes": 1, "kv_bytes": 2, "share_max": 0.1}
    return Results(
        {},
        [],
        [
            line | {"task": task, "sampler": method.name, "score": score, "share_mean": 0.05 if place else None}
            for task, score in (("cwe", 1.0), ("fwe", 0.5))
            for place, method in enumerate(matrix.methods)
        ],
    )


def test_rows_name_sampler_and_setting():
    matrix = Matrix(("cwe", "fwe"), (4096,), methods(["full", "lsh", "topk"]))
    rows = accuracy_rows(results(matrix), matrix)
    assert len(rows) == 2 * len(matrix.methods)
    assert (rows[0]["sampler"], rows[0]["method"], rows[0]["share_mean"]) == ("full", "full", None)
    assert (rows[1]["sampler"], rows[1]["method"]) == ("lsh", "lsh:K=10,L=75")
    assert (rows[1]["task"], rows[1]["accuracy"], rows[1]["share_mean"]) == ("cwe", 1.0, 0.05)


def test_centring_is_over_all_tasks():
    matrix = Matrix(("cwe", "fwe"), (4096,), centring_methods())
    full, first, second, *_ = centring_rows(results(matrix), matrix)
    assert (full["setting"], full["centre"], full["accuracy"]) == (None, None, 0.75)
    assert (first["setting"], first["centre"]) == ("K = 10, L = 150", True)
    assert (second["setting"], second["centre"]) == ("K = 10, L = 150", False)
