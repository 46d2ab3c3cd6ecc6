from dataclasses import replace

import pytest

from magicpig.config import Config
from magicpig.config_file import ConfigFileError, to_text
from magicpig.studies.evaluation import matrix
from magicpig.studies.evaluation.tasks import TASKS


def test_tasks_and_groups_in_rulers_order():
    assert matrix.parse_tasks("fwe,niah_single_2") == ("niah_single_2", "fwe")
    assert matrix.parse_tasks("aggregation,cwe, vt") == ("vt", "cwe", "fwe")
    assert matrix.parse_tasks("all") == tuple(TASKS)
    assert set(TASKS) - set(matrix.parse_tasks("generated")) == {"qa_1", "qa_2"}


def test_lengths_by_size():
    assert matrix.parse_lengths("32K,1000,1k,1M") == (1000, 1024, 32768, 1 << 20)


def test_protocols():
    assert matrix.parse_protocols("both") == ("question-dense", "question-sparse")
    assert matrix.parse_protocols("question-sparse") == ("question-sparse",)


def test_samplers_with_settings():
    methods = matrix.parse_methods("full,lsh:K=9,L=120,window,topk:0.02,lsh,quest:budget=64,sinks=8", exact_below=0)
    assert [method.name for method in methods] == [
        "full",
        "lsh:K=9,L=120",
        "window",
        "topk:0.02",
        "lsh",
        "quest:budget=64,sinks=8",
    ]
    assert [method.config for method in methods] == [
        Config(sampler="full", exact_below=0),
        Config(sampler="lsh", K=9, L=120, exact_below=0),
        Config(sampler="window", exact_below=0),
        Config(sampler="topk", budget=0.02, exact_below=0),
        Config(sampler="lsh", exact_below=0),
        Config(sampler="quest", budget=64, sinks=8, exact_below=0),
    ]


def test_settings_in_a_file(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(to_text(Config(dense_layers=(1,), layers={0: {"sampler": "sketch"}}), {}))
    full, tuned = matrix.parse_methods(f"full,{path}", exact_below=0, dense_layers=(2,))
    assert full.config == Config(sampler="full", exact_below=0, dense_layers=(2,))
    assert tuned.name == "tuned.json"
    assert tuned.config == Config(exact_below=0, dense_layers=(1,), layers={0: {"sampler": "sketch"}})
    (tmp_path / "others").mkdir()
    other = tmp_path / "others" / "tuned.json"
    other.write_text(to_text(Config(K=9), {}))
    with pytest.raises(matrix.MatrixError, match="are the same"):
        matrix.parse_methods(f"{path},{other}")
    path.write_text("{}")
    with pytest.raises(ConfigFileError, match=r"tuned\.json: not a file of settings"):
        matrix.parse_methods(str(path))


def test_a_samplers_own_setting_wins():
    (method,) = matrix.parse_methods("lsh:exact_below=100,centre=false", exact_below=0)
    assert method.config == Config(sampler="lsh", exact_below=100, centre=False)


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        ("tasks", "niah_singel_1", "unknown task 'niah_singel_1'; did you mean niah_single_1"),
        ("tasks", "xyz", "allowed: niah_single_1, niah_single_2"),
        ("tasks", "vt,,cwe", "--tasks 'vt,,cwe' has an empty name"),
        ("lengths", "4G", "length '4G' is not a number of tokens"),
        ("lengths", "K", "length 'K'"),
        ("lengths", "0", "length '0'"),
        ("lengths", "-4", "length '-4'"),
        ("protocols", "question-spares", "unknown protocol 'question-spares'; did you mean question-sparse"),
        ("protocols", "none", "allowed: question-dense, question-sparse, both"),
        ("methods", "top-k", "unknown sampler 'top-k'; did you mean topk"),
        ("methods", "K=9,lsh", "unknown sampler 'K=9'"),
        ("methods", "lsh:k=9", "unknown setting 'k' of 'lsh:k=9'"),
        ("methods", "lsh:minhits=2", "did you mean min_hits?"),
        ("methods", "lsh:K=9,K=8", "unknown setting 'K' of"),
        ("methods", "lsh:sampler=full", "unknown setting 'sampler' of"),
        ("methods", "lsh:K=nine", "sampler 'lsh:K=nine': K='nine' is not a number"),
        ("methods", "lsh:kv_dtype=int9", "sampler 'lsh:kv_dtype=int9': kv_dtype='int9'"),
        ("methods", "lsh:K=99", "sampler 'lsh:K=99': K=99"),
        ("methods", "lsh,lsh:K=10", "samplers 'lsh' and 'lsh:K=10' are the same"),
    ],
)
def test_mistakes_are_named(parse, text, message):
    with pytest.raises(matrix.MatrixError) as refused:
        getattr(matrix, f"parse_{parse}")(text)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_order_of_samples_and_runs():
    both = matrix.Matrix(("vt", "cwe"), (1024, 2048), matrix.parse_methods("full,lsh"), samples=2)
    assert list(both.cells())[:3] == [("vt", 1024, 0), ("cwe", 1024, 0), ("vt", 2048, 0)]
    assert len(set(both.cells())) == 8
    assert list(both.cells())[:4] == list(replace(both, samples=1).cells())
    assert [(protocol, method.name) for protocol, method in both.runs()] == [
        ("question-dense", "full"),
        ("question-dense", "lsh"),
        ("question-sparse", "full"),
        ("question-sparse", "lsh"),
    ]
