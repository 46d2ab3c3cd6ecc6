import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from magicpig import generation
from magicpig.studies.evaluation import run
from magicpig.studies.evaluation.matrix import Matrix, MatrixError, parse_methods
from magicpig.studies.evaluation.results import ResultsError, read_results
from magicpig.studies.evaluation.tasks import Sources, TaskError

MATRIX = Matrix(
    ("niah_single_1", "fwe"), (1000, 1024), parse_methods("full,lsh:K=4,L=20", exact_below=0), samples=2, new_tokens=3
)


@pytest.fixture(scope="module")
def model(model_dir):
    return generation.open_model(model_dir)


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "whole.jsonl"
    run.evaluate(model, MATRIX, path)
    return path


def lines(path):
    return path.read_bytes().split(b"\n", 1)[1]


def test_one_line_per_sample_protocol_and_sampler(finished):
    found = read_results(finished).lines
    assert [(line["length"], line["task"], line["index"], line["protocol"], line["sampler"]) for line in found] == [
        (length, task, index, protocol, sampler)
        for index in (0, 1)
        for length in (1000, 1024)
        for task in ("niah_single_1", "fwe")
        for protocol in ("question-dense", "question-sparse")
        for sampler in ("full", "lsh:K=4,L=20")
    ]
    for line in found:
        allowed = {"niah_single_1": 128, "fwe": 50}[line["task"]]
        assert line["prompt_tokens"] == line["length"] - allowed
        assert 1 <= line["new_tokens"] <= 3
        assert 0 <= line["score"] <= 1
        if line["sampler"] == "full":
            assert (line["share_mean"], line["index_bytes"]) == (None, 0)
        else:
            assert 0 < line["share_mean"] <= line["share_max"] < 1
            assert line["index_bytes"] > 0


def test_the_header_says_all_that_decides(finished, model):
    header = read_results(finished).header
    assert header["settings"]["samplers"]["lsh:K=4,L=20"]["K"] == 4
    assert header["settings"]["lengths"] == [1000, 1024]
    assert header["model"]["name"] == "tiny"
    assert len(header["model"]["sha256"]) == 64
    assert {"date", "commit", "machine", "usable_cpus", "memory_total", "isa", "versions"} <= header["made"].keys()


def test_a_finished_run_is_not_repeated(finished, model, monkeypatch):
    monkeypatch.setattr(run, "load", None)
    before = finished.read_bytes()
    seen = []
    run.evaluate(model, MATRIX, finished, on_start=lambda *work: seen.append(work))
    assert seen[0][0] == seen[0][1]
    assert finished.read_bytes() == before


def test_more_samples_go_on_where_fewer_ended(finished, model, tmp_path):
    path, seen = tmp_path / "r.jsonl", []
    run.evaluate(model, replace(MATRIX, samples=1), path)
    assert lines(finished).startswith(lines(path))
    run.evaluate(model, MATRIX, path)
    assert lines(path) == lines(finished)
    run.evaluate(model, replace(MATRIX, samples=1), path, on_start=lambda *work: seen.append(work))
    assert seen[0][0] == seen[0][1]
    assert lines(path) == lines(finished)


def test_work_adds_up_also_after_an_interruption(model, tmp_path, finished):
    path = tmp_path / "r.jsonl"
    starts, steps = [], []

    def interrupt(step, work):
        if step.startswith("fwe 1000 #1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.evaluate(model, MATRIX, path, on_step=interrupt)
    run.evaluate(
        model,
        MATRIX,
        path,
        on_start=lambda *work: starts.append(work),
        on_step=lambda step, work: steps.append(work),
    )
    ((before, total),) = starts
    assert before > 0
    assert before + sum(steps) == total
    assert lines(path) == lines(finished)


def test_two_processes_write_the_same_lines_in_order(model, one_thread, tmp_path):
    alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    run.evaluate(model, MATRIX, alone)
    run.evaluate(model, MATRIX, shared, jobs=2)
    assert lines(shared) == lines(alone)
    assert read_results(shared).header["made"]["jobs"] == 2


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch

sys.path.insert(0, os.environ["FOLDER"])
from test_run import MATRIX, generation, run

torch.set_num_threads(1)  # there must be no threads before a fork
model = generation.open_model(Path(os.environ["MODEL"]))
whole, killed = Path(os.environ["WHOLE"]), Path(os.environ["KILLED"])

def slow_write(file, data, offset, write=os.pwrite):
    time.sleep(pause)
    return write(file, data[: len(data) // 2 + 1], offset)

def start(path):
    child = os.fork()
    if child == 0:
        os.pwrite = slow_write  # however fast the machine is, a kill meets lines that are half written
        run.evaluate(model, MATRIX, path)
        os._exit(0)
    return child

pause = 0.02
begin = time.perf_counter()
assert os.waitpid(start(whole), 0)[1] == 0
longest = time.perf_counter() - begin
moments = random.Random(0)

def size():
    return killed.stat().st_size if killed.exists() else 0

for turn in range(8):
    before, child, ended = size(), start(killed), False
    if turn % 2:
        time.sleep(moments.uniform(0, longest))
    else:  # soon after it has written something, however long that takes
        while size() <= before and not ended:
            time.sleep(0.001)
            ended = os.waitpid(child, os.WNOHANG)[0] != 0
        time.sleep(moments.uniform(0, longest / 10))
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    print(size())
assert os.waitpid(start(killed), 0)[1] == 0
"""


@pytest.mark.slow
def test_killed_at_random_moments_the_file_ends_up_the_same(model_dir, tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    paths = {"FOLDER": Path(__file__).parent, "MODEL": model_dir, "WHOLE": whole, "KILLED": killed}
    environment = os.environ | {name: str(path) for name, path in paths.items()} | {"MAGICPIG_POOL": "serial"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    assert lines(killed) == lines(whole)
    sizes = [int(size) for size in done.stdout.split()]
    assert sizes == sorted(sizes), "what was whole has been lost"
    header, end = len(whole.read_bytes().split(b"\n")[0]) + 1, whole.stat().st_size
    assert any(header < size < end for size in sizes), f"no kill hit the middle of the run: {header} < {sizes} < {end}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (200,)}, "length=200 is below the minimum of task niah_single_1"),
        ({"lengths": (1000, 9000)}, "length 9000 is beyond the model's limit of 8192 tokens"),
        ({"tasks": ("qa_1",)}, "squad"),
        ({"tasks": ("qa_2",), "sources": Sources(hotpotqa=Path("missing.json"))}, "missing.json"),
        ({"tasks": ("niah_single_2",), "sources": Sources(filler=Path("missing.txt"))}, "missing.txt"),
        ({"chat": True}, "the tokenizer has no chat template"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(changes, message, model, tmp_path):
    path = tmp_path / "r.jsonl"
    with pytest.raises((MatrixError, TaskError)) as refused:
        run.evaluate(model, replace(MATRIX, **changes), path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not path.exists()


def test_a_run_is_not_continued_with_other_settings(model, finished):
    with pytest.raises(ResultsError, match=r"settings.seed = 0, now it is 1"):
        run.evaluate(model, replace(MATRIX, seed=1), finished)


def test_in_a_chat_the_answer_begins_behind_the_template(model_dir, tmp_path):
    model = generation.open_model(model_dir)
    model.tokenizer.chat_template = "the {% for message in messages %}{{ message.content }}{% endfor %} of and"
    matrix = replace(MATRIX, tasks=("niah_single_1",), lengths=(1000,), samples=1, chat=True)
    sample = run.make_sample(model, matrix, "niah_single_1", 1000, 0)
    context, question = run.make_prompt(model, sample, 3, chat=matrix.chat)
    assert len(context) + len(question) == 1000 - sample.tokens_to_generate
    text = model.tokenizer.decode(question)
    assert text.startswith("What is the special magic number for")
    assert "of and The special magic number for" in text
    (first, *_) = run.evaluate(model, matrix, tmp_path / "r.jsonl").lines
    assert first["prompt_tokens"] == len(context) + len(question)
