"""The studies' commands where their extra is not installed, and all else without it."""

import json
import subprocess
import sys
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

from magicpig.studies import MODULES, missing_module

HIDDEN = "import sys; sys.modules.update(dict.fromkeys({names!r})); from magicpig.cli import main; main()"
STUDIES = [
    ["demo"],
    ["tune", "--text", "text.txt", "--out", "out.json"],
    ["capture", "--task", "cwe", "--out", "out.safetensors"],
    ["figures", "--out", "figures"],
    ["eval", "ruler", "--out", "results.jsonl"],
    ["eval", "show", "results.jsonl"],
    ["eval", "tasks"],
    ["eval", "lm-eval"],
    ["pocket", "train", "--out", "model"],
    ["pocket", "card", "results.jsonl", "--model", "model"],
    ["bench", "attention"],
    ["bench", "certificates"],
    ["bench", "decode"],
    ["bench", "frontier"],
    ["bench", "serving", "--url", "http://127.0.0.1:1"],
]


def without(names, *arguments, folder, **options):
    command = [sys.executable, "-c", HIDDEN.format(names=names), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, **options)


def test_extra_is_declared_and_installed_here():
    wanted = [Requirement(line) for line in requires("magicpig")]
    extra = {each.name for each in wanted if each.marker and each.marker.evaluate({"extra": "studies"})}
    assert extra == set(MODULES)
    assert {each.name for each in wanted if each.marker is None} & extra == set()
    assert missing_module() is None


@pytest.mark.parametrize("arguments", STUDIES, ids=lambda arguments: "-".join(arguments[:2]))
def test_a_study_says_what_to_install(arguments, tmp_path):
    done = without(MODULES, *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"{MODULES[0]} is not installed: pip install 'magicpig[studies]'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", MODULES)
def test_each_module_is_missed(name, tmp_path):
    assert f"{name} is not installed" in without([name], "eval", "tasks", folder=tmp_path).stderr


def test_help_of_studies_needs_nothing(tmp_path):
    assert "--tokens" in without(MODULES, "demo", "--help", folder=tmp_path, check=True).stdout


def test_the_pocket_model_answers_without_the_extra(tmp_path):
    arguments = ["generate", "--prompt", "the green book is in the old house", "--max-new-tokens", "2", "--json"]
    done = without(MODULES, *arguments, folder=tmp_path, check=True)
    assert json.loads(done.stdout)["new_tokens"] <= 2
