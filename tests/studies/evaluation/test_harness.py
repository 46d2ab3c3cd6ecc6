"""Our tasks in lm-evaluation-harness. What needs the harness itself is skipped where it is not installed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from magicpig.config import Config
from magicpig.generation import load, open_model
from magicpig.studies.evaluation import harness
from magicpig.studies.evaluation.matrix import MatrixError
from magicpig.studies.evaluation.tasks import TASKS, Sources, TaskError

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None,
    reason="lm-eval is not installed: pip install 'magicpig[eval]'",
)
# The harness and what it imports are not ours to mend.
foreign = pytest.mark.filterwarnings("ignore")


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def test_export_writes_a_task_for_each_of_ruler(tmp_path):
    squad = Path("questions.json")
    names = harness.export(tmp_path / "tasks", lengths=[1024, 2048], samples=3, seed=5, sources=Sources(squad=squad))
    assert names == [*(f"magicpig_{task}" for task in TASKS if task != "qa_2"), "magicpig_ruler"]
    assert {path.name for path in (tmp_path / "tasks").iterdir()} == {
        "magicpig_tasks.py",
        *(f"{name}.yaml" for name in names),
    }
    task = yaml.load((tmp_path / "tasks/magicpig_qa_1.yaml").read_text(), _Loader)
    assert task["task"] == "magicpig_qa_1"
    assert task["dataset_kwargs"] == {"task": "qa_1"}
    assert task["metadata"] == {
        "version": 1.0,
        "lengths": [1024, 2048],
        "samples": 3,
        "seed": 5,
        "squad": str(squad.absolute()),
    }
    assert [metric["metric"] for metric in task["metric_list"]] == ["1024", "2048"]
    assert task["generation_kwargs"]["max_gen_toks"] == 32
    assert task["doc_to_text"] == "{{prompt}}"
    group = yaml.safe_load((tmp_path / "tasks/magicpig_ruler.yaml").read_text())
    assert group["task"] == names[:-1]
    assert harness.export(tmp_path / "tasks", samples=4)[0] == names[0]  # again, over the files there are
    assert yaml.load((tmp_path / "tasks/magicpig_vt.yaml").read_text(), _Loader)["metadata"]["samples"] == 4


def test_export_needs_a_directory_it_can_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MatrixError, match=r"cannot write .*file: "):
        harness.export(tmp_path / "file")


def test_scores_are_those_of_the_task():
    doc = {"task": "niah_multivalue", "length": 2048, "answers": ["1111111", "2222222"]}
    assert harness.process_results(doc, [" 2222222."]) == {"2048": 0.5}


@installed
@foreign
def test_dataset_has_the_samples(model_dir):
    made = harness.dataset("vt", lengths=[900, 1000], samples=2, pretrained=str(model_dir), version=1.0)["test"]
    assert [row["length"] for row in made] == [900, 900, 1000, 1000]
    assert made[0]["prompt"].endswith("in the text above.")
    assert made[0]["answer_prefix"].endswith("they are:")
    assert len(made[0]["answers"]) == 5
    with pytest.raises(ValueError, match="tokenizer is not given"):
        harness.dataset("vt", lengths=[900], samples=1)


@installed
@foreign
def test_run_answers_our_tasks(model_dir):
    settings = {"lengths": [1024], "samples": 2, "limit": 1}
    lsh = harness.run(open_model(model_dir), "fwe,niah_single_1", config=Config(exact_below=0, K=4, L=20), **settings)
    assert lsh["config"]["K"] == 4
    assert {*lsh["results"]} == {"magicpig_fwe", "magicpig_niah_single_1"}
    for scores in lsh["results"].values():
        assert 0 <= scores["1024,none"] <= 1
    json.dumps(lsh)


@installed
@foreign
@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        ("fwe,no_such", {}, r"task 'no_such' is neither ours nor one of lm_eval"),
        ("fwe", {"lengths": [50]}, r"length=50 is below the minimum of task fwe"),
        ("fwe", {"lengths": [10**6]}, r"length 1000000 is beyond the model's limit"),
        ("qa_1", {}, r"task qa_1 needs the file dev-v2.0.json of SQuAD"),
        ("vt", {"chat": True}, r"the tokenizer has no chat template"),
    ],
)
def test_run_refuses_what_cannot_be_evaluated(model_dir, monkeypatch, tasks, settings, message):
    import lm_eval.tasks

    class OurTasks(lm_eval.tasks.TaskManager):  # finding lm_eval's own takes seconds
        def __init__(self, **options):
            super().__init__(**options | {"include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", OurTasks)
    with pytest.raises((MatrixError, TaskError), match=message):
        harness.run(open_model(model_dir), tasks, config=Config(), **settings)


@installed
@foreign
@pytest.mark.parametrize("settings", [{"sampler": "full"}, {"K": 1, "L": 64, "exact_below": 0}])
def test_likelihoods_are_exact_where_attention_is(model_dir, settings):
    from magicpig.integrations.lm_eval import SamplingLM

    opened = open_model(model_dir)
    sampled = SamplingLM(load(opened, dtype="float32"), opened.tokenizer, Config(**settings))
    generator = torch.Generator().manual_seed(1)
    context = torch.randint(10, 9000, (300,), generator=generator).tolist()
    requests = [(None, context, [7, 8, 9]), (None, context, [11]), (("a", "b"), [3, 4], [5, 6])]
    found = sampled._loglikelihood_tokens(requests, disable_tqdm=True)

    for (_, read, answer), (likelihood, likeliest) in zip(requests, found, strict=True):
        with torch.inference_mode():
            logits = sampled.model(torch.tensor([read + answer[:-1]])).logits[0, -len(answer) :]
        chances = logits.log_softmax(-1)
        expected = sum(chances[place, token].item() for place, token in enumerate(answer))
        exact = settings.get("sampler") == "full" or len(answer) == 1 or len(read) < 10
        if exact:
            assert likelihood == pytest.approx(expected, abs=1e-4)
        else:
            # K = 1 finds nearly all keys: close, but an estimate.
            assert likelihood == pytest.approx(expected, abs=1)
            assert likelihood != pytest.approx(expected, abs=1e-9)
        assert likeliest == bool((chances.argmax(-1) == torch.tensor(answer)).all())


def test_run_says_what_is_missing(model_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MatrixError, match=r"lm_eval is not installed; pip install 'magicpig\[eval\]'"):
        harness.run(open_model(model_dir), "fwe", config=Config())
