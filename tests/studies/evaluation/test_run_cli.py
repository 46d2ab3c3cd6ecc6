import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from magicpig.cli import app
from magicpig.config import SAMPLERS, Config
from magicpig.studies.evaluation import harness
from magicpig.studies.evaluation.results import read_results

MATRIX = ("--tasks", "vt,cwe", "--lengths", "1000,1K", "--samplers", "full,lsh:K=4,L=20", "--protocol", "both")


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], prog_name="magicpig")


def ruler(model_dir, out, *arguments, matrix=MATRIX):
    options = ("--samples", 1, "--max-new-tokens", 2, *arguments)
    return run("ruler", "--model", model_dir, "--out", out, *matrix, *options)


def assert_refused(result, *causes):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("magicpig: error: ")
    for cause in causes:
        assert str(cause) in line


@pytest.fixture(scope="module")
def results(model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "r.jsonl"
    result = ruler(model_dir, path)
    assert result.exit_code == 0, result.output
    return path, result.stdout


@pytest.mark.parametrize("command", ["ruler", "show", "tasks", "lm-eval"])
def test_every_command_has_help(command):
    assert f"Usage: magicpig eval {command}" in run(command, "--help").stdout


def test_the_summary_has_both_protocols(results):
    _, shown = results
    assert shown.count("accuracy in %") == 2
    assert re.search(r"1K +vt +\d+\.\d \(\d+-\d+\) +\d+\.\d \(\d+-\d+\)", shown)
    assert re.search(r"1000 +keys read, mean +all +\d+\.\d%", shown)


def test_show_is_the_same_summary(results):
    path, shown = results
    assert run("show", path).stdout == shown


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_table_wider_than_the_terminal_is_shown_in_parts(results, monkeypatch, width):
    path, _ = results
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    many = [lines[0]]
    for number in range(8):
        many += [{**line, "sampler": f"{line['sampler']} {number}"} for line in lines[1:]]
    wide = path.with_name("wide.jsonl")
    wide.write_text("".join(json.dumps(line) + "\n" for line in many))
    monkeypatch.setenv("COLUMNS", str(width))
    shown = run("show", wide).stdout
    assert max(map(len, shown.splitlines())) <= width
    for number in range(8):
        assert shown.count(f"full {number}") == 2  # protocols
    assert shown.count("length  task") == {60: 32, 80: 12, 200: 4}[width]


def test_show_for_other_programs(results):
    path, _ = results
    answer = json.loads(run("show", path, "--json").stdout)
    assert {cell["task"] for cell in answer["cells"]} == {"vt", "cwe", "average"}
    assert {cell["samples"] for cell in answer["cells"] if cell["task"] != "average"} == {1}
    assert "| 1K | vt |" in run("show", path, "--markdown").stdout
    assert_refused(run("show", path, "--markdown", "--json"), "either --markdown or --json")


def test_show_of_what_has_no_results(results, tmp_path):
    path, _ = results
    begun = tmp_path / "begun.jsonl"
    begun.write_bytes(path.read_bytes().split(b"\n")[0] + b"\n")
    assert run("show", begun).stdout == "no sample is finished yet\n"
    assert_refused(run("show", tmp_path / "missing.jsonl"), "No such file")


def test_tasks_are_listed(model_dir):
    plain, measured = run("tasks").stdout, run("tasks", "--model", model_dir).stdout
    assert re.search(r"niah_single_1 +one number in repeated noise +128 *\n", plain)
    assert re.search(r"niah_single_1 +one number in repeated noise +128 +\d+ *\n", measured)
    assert "aggregation: cwe, fwe" in plain


def test_settings_of_all_samplers(model_dir, tmp_path):
    path = tmp_path / "r.jsonl"
    options = ("--dense-layers", "none", "--exact-below", 5000, "--dtype", "bfloat16", "--seed", 5)
    assert ruler(model_dir, path, *options, matrix=("--lengths", "1K", "--tasks", "vt")).exit_code == 0
    settings = json.loads(path.read_text().splitlines()[0])["settings"]
    assert settings["samplers"]["sketch"]["dense_layers"] == []
    assert settings["samplers"]["sketch"]["exact_below"] == 5000
    assert settings["dtype"] == "bfloat16"
    assert settings["seed"] == 5


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--tasks", "niah_singel_1"], "did you mean niah_single_1"),
        (["--samplers", "full,lhs"], "did you mean lsh"),
        (["--protocol", "dense"], "unknown protocol"),
        (["--lengths", "100"], "length=100 is below the minimum of task vt"),
        (["--lengths", "64K"], "beyond the model's limit of 8192"),
        (["--chat-template", "on"], "no chat template"),
        (["--tasks", "qa_2"], "hotpotqa"),
        (["--tasks", "qa_1", "--squad", "missing.json"], "missing.json"),
        (["--dense-layers", "first"], "--dense-layers 'first'"),
        (["--dense-layers", "-1"], "negative layer"),
        (["--model", "missing"], "missing: no such directory"),
        (["--out", "missing/r.jsonl"], "missing/r.jsonl: No such file or directory"),
    ],
)
def test_mistakes_are_one_line(arguments, cause, model_dir, tmp_path):
    assert_refused(ruler(model_dir, tmp_path / "r.jsonl", *arguments), cause)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_other_settings_is_left_alone(model_dir, results):
    path, _ = results
    before = path.read_bytes()
    assert_refused(ruler(model_dir, path, "--seed", 1), "settings.seed = 0, now it is 1")
    assert path.read_bytes() == before


def test_interrupted_in_a_terminal_it_says_how_to_go_on(model_dir, tmp_path):
    path = tmp_path / "r.jsonl"
    terminal, inside = pty.openpty()
    command = [sys.executable, "-m", "magicpig", "eval", "ruler", "--model", model_dir, "--out", path, *MATRIX]
    running = subprocess.Popen(
        [*command, "--samples", "25"],
        stdout=inside,
        stderr=inside,
        start_new_session=True,
        # A background job of a shell ignores the signal, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(inside)
    shown, interrupted = b"", False
    try:
        while block := os.read(terminal, 4096):  # a program whose terminal is not read stands still
            shown += block
            if not interrupted and path.exists() and path.read_bytes().count(b"\n") >= 9:
                running.send_signal(signal.SIGINT)
                interrupted = True
    except OSError:  # how a pseudo-terminal ends
        pass
    os.close(terminal)
    assert running.wait() == 130
    assert b"vt 1000 #" in shown
    assert b"the same command goes on from there" in b" ".join(shown.split())
    assert b"Traceback" not in shown
    assert path.read_bytes().endswith(b"}\n")


def test_every_sampler_under_both_protocols(model_dir, tmp_path):
    others = [name for name in SAMPLERS if name not in ("full", "window", "lsh")]
    methods = ["full", "lsh", "window", *(f"{name}:0.05" for name in others)]
    matrix = (
        "--lengths",
        "1K",
        "--tasks",
        "niah_multivalue,cwe",
        "--samplers",
        ",".join(methods),
        "--protocol",
        "both",
    )
    path = tmp_path / "r.jsonl"
    result = ruler(model_dir, path, matrix=matrix)
    assert result.exit_code == 0, result.output
    lines = read_results(path).lines
    assert len(lines) == 2 * 2 * len(methods)
    for line in lines:
        sampler = line["sampler"].partition(":")[0]
        if sampler in ("full", "window"):
            assert line["share_mean"] == {"full": None, "window": 0.0}[sampler]
        elif sampler in others:
            assert 0.02 < line["share_mean"] < (0.07 if sampler == "quest" else 0.06)  # pages of 16 keys are coarse
            assert line["share_mean"] <= line["share_max"] < 0.1
        if sampler in ("full", "window", "topk"):
            assert line["index_bytes"] == 0
        elif sampler in ("lsh", "quest"):
            assert line["index_bytes"] > 0


# --- lm-eval ----------------------------------------------------------------------------------------------------------


def test_tasks_are_exported_for_the_harness(tmp_path):
    result = run("lm-eval", "--export", tmp_path / "tasks", "--lengths", "4K,8K")
    assert result.exit_code == 0, result.output
    assert "magicpig_niah_single_1" in result.stdout.split()
    assert (tmp_path / "tasks" / "magicpig_niah_single_1.yaml").is_file()


def test_the_harness_gets_what_was_asked_for(model_dir, tmp_path, monkeypatch):
    asked = {}

    def harnessed(model, tasks, **options):
        asked.update(options, directory=model.directory, tasks=tasks)
        scores = {"alias": "magicpig_vt", "4096,none": 0.25, "4096_stderr,none": 0.125, "acc,none": 1.0}
        return {"results": {"magicpig_vt": scores}}

    monkeypatch.setattr(harness, "run", harnessed)
    options = ("--tasks", "vt", "--sampler", "lsh:K=9", "--lengths", "8K", "--limit", 3, "--chat", "--seed", 4)
    result = run("lm-eval", "--model", model_dir, *options, "--output", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    assert re.search(r"magicpig_vt +4096 +0.2500 +0.1250", result.stdout)
    assert re.search(r"magicpig_vt +acc +1.0000", result.stdout)
    assert json.loads((tmp_path / "r.json").read_text())["results"]["magicpig_vt"]["acc,none"] == 1
    assert asked["directory"] == model_dir
    assert asked["config"] == Config(K=9)
    assert (asked["lengths"], asked["limit"], asked["seed"], asked["chat"]) == ((8192,), 3, 4, True)


def test_mistakes_before_the_harness(model_dir):
    assert_refused(run("lm-eval"), "either --model or --export")
    assert_refused(run("lm-eval", "--model", model_dir, "--sampler", "full,lsh"), "more than one")
    assert_refused(run("lm-eval", "--model", model_dir / "missing"), "no such directory")
