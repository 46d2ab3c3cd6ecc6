"""Whatever the command line is given: one line that names the cause and exit code 2, and never a traceback."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from magicpig.cli import app
from magicpig.cli.errors import LONGEST
from magicpig.config import Config
from magicpig.studies.evaluation.results import FORMAT

HUGE = "9" * 30  # beyond 64 bits
ENDLESS = "9" * 5000  # beyond what Python turns into a number
LONG = "x" * 100_000
COMMANDS = [
    ["generate", "--prompt", "x"],
    ["serve", "missing"],
    ["chat", "missing"],
    ["demo"],
    ["tune", "--text", "missing"],
    ["capture", "--out", "missing/out", "--task", "fwe"],
    ["figures", "--out", "missing/out"],
    ["convert", "missing", "missing/out"],
    ["doctor"],
    ["plan", "--model", "missing"],
    ["bench", "attention"],
    ["bench", "certificates"],
    ["bench", "decode"],
    ["bench", "engine"],
    ["bench", "frontier"],
    ["bench", "placements"],
    ["bench", "prefill"],
    ["bench", "serving", "--url", "http://127.0.0.1:9/v1", "--requests", "1"],
    ["bench", "warm"],
    ["eval", "ruler", "--out", "missing/out"],
    ["eval", "perplexity", "--out", "missing/out"],
    ["eval", "recall", "--out", "missing/out"],
    ["eval", "show", "missing"],
    ["eval", "tasks"],
    ["eval", "lm-eval", "--export", "missing/out"],
    ["pocket", "train", "--out", "missing/out"],
    ["pocket", "card", "missing", "--model", "missing"],
    ["cache", "ls", "--cache-dir", "missing"],
    ["cache", "warm", "missing", "--cache-dir", "missing"],
    ["cache", "rm", "missing", "--cache-dir", "missing"],
    ["cache", "verify", "--cache-dir", "missing"],
]
GROUPS = {
    "bench": "attention, certificates, decode, engine, frontier, placements, prefill, serving, warm",
    "eval": "ruler, perplexity, recall, show",
    "pocket": "train, card",
}


def run(*arguments, input=None):
    return CliRunner().invoke(app, [str(each) for each in arguments], input=input, prog_name="magicpig")


def assert_one_line(result, *causes):
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("magicpig: error: ")
    assert line.isprintable()
    assert len(line) < LONGEST + 100
    for cause in causes:
        assert cause in line


def commands():
    """All commands by the words they are called with, and their parameters."""

    def walk(command, words):
        if hasattr(command, "commands"):
            for name, child in command.commands.items():
                yield from walk(child, [*words, name])
        else:
            yield words, command.params

    return list(walk(typer.main.get_command(app), []))


def test_the_table_has_every_command():
    listed = [[word for word in words if word.replace("-", "").isalpha()] for words in COMMANDS]
    for words, _ in commands():
        assert any(each[: len(words)] == words for each in listed), words


@pytest.mark.parametrize("words", [words for words, _ in commands()], ids=" ".join)
def test_every_command_has_the_version(words):
    assert run(*words, "--version").stdout == run("--version").stdout
    assert "--version" in run(*words, "--help").stdout


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_says_which_commands_it_has(group):
    assert_one_line(run(group), f"magicpig {group} needs a command: {GROUPS[group]}")
    assert run(group, "--version").exit_code == 0


@pytest.mark.parametrize(
    ("words", "hint"), [(["genrate"], "generate"), (["bench", "atention"], "attention"), (["eval", "rular"], "ruler")]
)
def test_a_mistyped_command_gets_a_suggestion(words, hint):
    assert_one_line(run(*words), f"Did you mean '{hint}'?")


def test_every_whole_number_has_bounds():
    for words, params in commands():
        for param in params:
            if param.type_descriptor.annotation in (int, int | None) and param.name not in Config.model_fields:
                assert param.max is not None, f"{' '.join(words)} {param.opts}"


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_numbers_that_no_machine_holds(words):
    numbers = next(params for name, params in commands() if words[: len(name)] == name)
    for param in numbers:
        if param.type_descriptor.annotation in (int, int | None, float, float | None) and param.opts:
            for value in (HUGE, ENDLESS, f"-{HUGE}", "1e999", "-1e999", "nan", "x"):
                if value != HUGE or param.name != "epsilon" or words[0] != "generate":  # there it only means nothing
                    assert_one_line(run(*words, param.opts[0], value))


@pytest.mark.parametrize("option", ["--budget", "--epsilon"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_none(option, value):
    assert_one_line(run("generate", "--prompt", "x", option, value), option[2:])


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "attention", "--context"],
        ["bench", "decode", "--context"],
        ["bench", "frontier", "--contexts"],
        ["bench", "certificates", "--contexts"],
        ["eval", "ruler", "--out", "missing/out", "--lengths"],
        ["capture", "--out", "missing/out", "--task", "fwe", "--length"],
        ["figures", "--out", "missing/out", "--length"],
        ["tune", "--text", "missing", "--length"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("value", [HUGE, ENDLESS, "1" + "0" * 15 + "M", "-1", "0", "", "x" * 1000, "\x1b[31m"])
def test_lengths_that_are_none(words, value):
    assert_one_line(run(*words, value))


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--prompt", "x", "--model"],
        ["generate", "--prompt-file"],
        ["generate", "--prompt", "x", "--config"],
        ["generate", "--prompt", "x", "--output"],
        ["demo", "--model"],
        ["tune", "--text"],
        ["capture", "--task", "fwe", "--out"],
        ["capture", "--out", "missing/out", "--task"],
        ["capture", "--out", "missing/out", "--task", "fwe", "--layers"],
        ["figures", "--only"],
        ["figures", "--out", "missing/out", "--model"],
        ["bench", "attention", "--samplers"],
        ["bench", "attention", "--json"],
        ["bench", "decode", "--shape"],
        ["bench", "decode", "--dense-layers"],
        ["bench", "frontier", "--set"],
        ["bench", "frontier", "--figure"],
        ["bench", "certificates", "--set"],
        ["eval", "ruler", "--out", "missing/out", "--tasks"],
        ["eval", "ruler", "--out", "missing/out", "--samplers"],
        ["eval", "ruler", "--out", "missing/out", "--protocol"],
        ["eval", "show"],
        ["eval", "lm-eval", "--export", "missing/out", "--sampler"],
        ["pocket", "card", "--model", "missing"],
    ],
    ids=" ".join,
)
def test_long_values_and_control_characters(words):
    for value in (LONG, "missing/a\x1b[31m\rb", "missing/a\nb"):
        assert_one_line(run(*words, value))


# --- files ------------------------------------------------------------------------------------------------------------

SETTINGS = '{"format": "magicpig.config", "version": 1, "settings": {}}'
BAD_JSON = {
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "twice": '{"format": "magicpig.config", "format": "magicpig.config", "version": 1, "settings": {}}',
    "long number": ENDLESS,
    "infinite": '{"format": "magicpig.config", "version": 1, "settings": {"budget": Infinity}}',
    "number beyond 64 bits": SETTINGS.replace("{}", f'{{"sinks": {HUGE}}}'),
    "1 beside 01": '{"format": "magicpig.config", "version": 1, "settings": {"layers": {"1": {}, "01": {}}}}',
    "control characters": '{"format": "magicpig.config", "version": 1, "settings": {"\\u001b[31m": 1}}',
    "long value": SETTINGS.replace("{}", f'{{"sampler": "{LONG}"}}'),
    "long name": SETTINGS.replace("{}", f'{{"{LONG}": 1}}'),
    "many values": json.dumps({"format": "magicpig.config", "version": 1, "settings": {"sampler": [1] * 50_000}}),
}


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
def test_files_of_settings(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert_one_line(run("generate", "--prompt", "x", "--config", path), str(path))
    assert_one_line(run("eval", "ruler", "--out", tmp_path / "missing" / "out", "--samplers", path), str(path))


HEADER = {"format": FORMAT, "settings": {}, "model": {}, "made": {}}
LINE = {
    "task": "fwe",
    "length": 1000,
    "index": 0,
    "protocol": "question-dense",
    "sampler": "lsh",
    "score": 1.0,
    "share_mean": 0.1,
    "share_max": 0.2,
    "kv_bytes": 10,
    "index_bytes": 1,
}


def results(path, *records):
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in records))
    return path


@pytest.mark.parametrize(
    ("records", "cause"),
    [
        ([HEADER, {**LINE, "score": float("nan")}], "NaN"),
        ([HEADER, {**LINE, "score": 2}], "score=2"),
        ([HEADER, {**LINE, "share_mean": "x"}], "share_mean='x'"),
        ([HEADER, {**LINE, "length": -1}], "length=-1"),
        ([HEADER, {**LINE, "kv_bytes": None}], "kv_bytes=None"),
        ([HEADER, {**LINE, "index_bytes": int(HUGE)}], "index_bytes=9"),
        ([HEADER, {**LINE, "sampler": ["a"]}], "sampler=['a']"),
        ([HEADER, {name: LINE[name] for name in LINE if name != "task"}], "task=None"),
        ([HEADER, "[1]"], "line 2"),
        ([HEADER, "[" * 100_000], "line 2"),
        ([HEADER, {"resumed": 3}], "resumed=3"),
        ([{**HEADER, "settings": 3}], "settings=3"),
        (["{}"], "not a results file"),
        ([LONG], "not a results file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_results_with_wrong_fields(records, cause, tmp_path):
    for form in ([], ["--json"], ["--markdown"]):
        assert_one_line(run("eval", "show", results(tmp_path / "r.jsonl", *records), *form), cause)


def test_results_that_are_odd_but_right(tmp_path):
    odd = [
        LINE | {"kv_bytes": 0, "index_bytes": 0, "share_mean": None, "share_max": None},
        LINE | {"sampler": "s" * 1000, "length": 2000},  # the other sampler has none of this length
        LINE | {"task": "a\x1b[31mb"},
    ]
    for form in ([], ["--json"], ["--markdown"]):
        result = run("eval", "show", results(tmp_path / "r.jsonl", HEADER, *odd), *form)
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.stdout
    assert run("eval", "show", results(tmp_path / "r.jsonl", HEADER)).exit_code == 0


GOOD_RULES = {"version": 1, "layers": {"0": {"scale": 0.1, "softcap": None}}, "about": {}}


@pytest.mark.parametrize(
    ("changes", "tensors", "cause"),
    [
        ({"layers": {"0": {"scale": float("nan"), "softcap": None}}}, {}, "NaN"),
        ({"layers": {"0": {"scale": -1, "softcap": None}}}, {}, "scale=-1"),
        ({"layers": {"0": {"scale": 0.1, "softcap": -3}}}, {}, "softcap=-3"),
        ({"layers": {"0": {"scale": "x", "softcap": None}}}, {}, "scale='x'"),
        ({"layers": {"0": {}}}, {}, "'scale' is missing"),
        ({"layers": {"0": []}}, {}, "layers.0=[]"),
        ({"layers": {}}, {}, "no layer"),
        ({"layers": {"-1": GOOD_RULES["layers"]["0"]}}, {}, "layers.'-1'"),
        ({"layers": {"01": GOOD_RULES["layers"]["0"]}}, {}, "layers.'01'"),
        ({"layers": {"7": GOOD_RULES["layers"]["0"]}}, {}, "'7.keys' is missing"),
        ({"about": 3}, {}, "about=3"),
        ({"version": [1] * 10_000}, {}, "version [1, 1"),
        ({}, {"keys": torch.zeros(0, 9, 8), "values": torch.zeros(0, 9, 8)}, "(0, 9, 8): no axis may be empty"),
        ({}, {"queries": torch.zeros(2, 0, 8)}, "(2, 0, 8): no axis may be empty"),
        ({}, {"keys": torch.zeros(2, 9, 8, dtype=torch.int64)}, "0.keys is torch.int64"),
        ({}, {"sink_logits": torch.full((4,), torch.nan)}, "not finite"),
        ({}, {"values": torch.full((2, 9, 8), torch.inf)}, "0.values has entries that are not finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("command", ["frontier", "certificates"])
def test_captures_with_wrong_fields(command, changes, tensors, cause, tmp_path):
    parts = {"keys": torch.zeros(2, 9, 8), "values": torch.zeros(2, 9, 8), "queries": torch.zeros(2, 4, 8)} | tensors
    path = tmp_path / "c.safetensors"
    save_file(
        {f"0.{name}": part for name, part in parts.items()},
        path,
        {"magicpig.capture": json.dumps(GOOD_RULES | changes)},
    )
    assert_one_line(run("bench", command, "--contexts", "none", "--set", path), str(path), cause)


# --- streams ----------------------------------------------------------------------------------------------------------

MAIN = [sys.executable, "-m", "magicpig"]
needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def shell(line, **options):
    command = line.format(magicpig=f"{sys.executable} -m magicpig")
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False, **options)


@needs_full
@pytest.mark.parametrize("words", ["--version", "--help", "eval tasks", "bench --help"])
def test_a_full_disk_under_standard_output(words):
    done = shell(f"{{magicpig}} {words} > /dev/full")
    assert done.returncode == 2
    assert done.stderr == ("magicpig: error: cannot use standard output or standard error: No space left on device\n")


@pytest.mark.parametrize("words", ["--version", "eval tasks"])
def test_a_closed_standard_output(words):
    done = shell(f"{{magicpig}} {words} >&-")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Bad file descriptor" in done.stderr


def test_all_streams_closed():
    assert shell("{magicpig} --version <&- >&- 2>&-").returncode == 2
    assert shell("{magicpig} generate <&- 2>&-").returncode == 2


@needs_full
def test_nobody_to_complain_to():
    done = shell("{magicpig} frobnicate 2> /dev/full")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_pipe_that_nobody_reads():
    done = shell("{magicpig} eval tasks | true; echo ${{PIPESTATUS[0]}}")
    assert done.stdout in ("0\n", "1\n")  # it may have been faster
    assert done.stderr == ""


def test_a_closed_standard_input():
    done = shell("{magicpig} generate --prompt-file - <&-")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "magicpig: error: cannot read -: Bad file descriptor\n"


def test_sigterm_leaves_no_temporary_file(tmp_path):
    os.mkfifo(tmp_path / "text")
    words = ["generate", "--prompt", "x", "--model", tmp_path, "--output", tmp_path / "answer"]
    (tmp_path / "config.json").symlink_to("text")  # reading it waits for a writer that never comes
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "tokenizer.json").touch()
    with subprocess.Popen([*MAIN, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (parts := list(tmp_path.glob(".answer.*.part"))) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert parts
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert stderr == b""
    assert not list(tmp_path.glob(".answer*"))


WITHOUT_TORCH = """
import sys
from magicpig.cli import main
for words in {all!r}:
    sys.argv = ["magicpig", *words]
    try:
        main()
    except SystemExit as end:
        assert end.code == 2, words
    assert "torch" not in sys.modules, words
    assert "transformers" not in sys.modules, words
"""


def test_what_is_typed_wrong_is_said_before_torch_is_imported(tmp_path):
    missing = str(tmp_path / "missing" / "out")
    wrong = [
        ["frobnicate"],
        ["bench"],
        ["generate", "--promt", "x"],
        ["generate", "--prompt", "x", "--budget", "0"],
        ["generate", "--prompt", "x", "--model", missing],
        ["generate", "--prompt", "x", "--output", missing],
        ["demo", "--model", missing],
        ["tune", "--text", missing],
        ["tune", "--text", __file__, "--samplers", "lhs"],
        ["capture", "--out", missing, "--task", "few"],
        ["capture", "--out", missing, "--task", "fwe"],
        ["figures", "--out", missing, "--tasks", "few"],
        ["figures", "--out", missing],
        ["plan", "--model", missing],
        ["plan", "--model", missing, "--vram", "0"],
        ["bench", "attention", "--context", "many"],
        ["bench", "attention", "--samplers", "lhs"],
        ["bench", "placements", "--context", "many"],
        ["bench", "attention", "--json", missing],
        ["bench", "decode", "--shape", "gpt"],
        ["bench", "frontier", "--samplers", "full"],
        ["bench", "frontier", "--set", missing],
        ["bench", "certificates", "--contexts", "none"],
        ["eval", "ruler", "--out", missing, "--samplers", "lhs"],
        ["eval", "ruler", "--out", missing, "--model", missing],
        ["eval", "perplexity", "--out", missing, "--samplers", "lhs"],
        ["eval", "recall", "--out", missing, "--samplers", "lhs"],
        ["convert", missing, missing],
        ["eval", "show", missing],
        ["pocket", "train"],
    ]
    script = WITHOUT_TORCH.format(all=wrong)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stderr.splitlines()) == len(wrong)


def test_the_shell_completes_commands():
    environment = os.environ | {"_MAGICPIG_COMPLETE": "complete_bash", "COMP_WORDS": "magicpig gen", "COMP_CWORD": "1"}
    done = subprocess.run(
        [Path(sys.executable).with_name("magicpig")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "generate"
    assert "--install-completion" in run("--help").stdout
