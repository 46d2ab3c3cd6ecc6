"""`magicpig cache`: what is in the folder of a server, and what is done about it."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from magicpig.cli import app

TEXT = "the cat of rome sat on a map of the sea. " * 20


def run(*arguments, input=None):
    return CliRunner().invoke(app, ["cache", *map(str, arguments)], input=input, prog_name="magicpig")


@pytest.fixture
def folder(tmp_path):
    """With one document."""
    (tmp_path / "text").write_text(TEXT)
    result = run("warm", tmp_path / "text", "--cache-dir", tmp_path / "cache")
    assert result.exit_code == 0, result.output
    assert "of them read now, are warm in" in result.stderr
    return tmp_path / "cache"


def test_a_document_is_warmed_listed_and_removed(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    again = run("warm", "-", "--cache-dir", folder, input=TEXT)
    assert ", 1 of them read now" in again.stderr.replace("\n", " "), "the last token is computed in any case"
    listed = run("ls", "--cache-dir", folder).stdout
    (name,) = [path.stem for path in folder.glob("*.safetensors")]
    assert name in listed
    assert "llama" in listed
    assert "the cat of rome" in listed
    assert "1 prompt, " in listed
    assert run("verify", "--cache-dir", folder).stdout == "1 prompt, 0 of them damaged\n"
    assert run("rm", name, "--cache-dir", folder).stdout == "1 prompt removed\n"
    assert run("ls", "--cache-dir", folder).stdout == "0 prompts, 0.0 MiB\n"


def test_a_changed_file_is_named(folder):
    (path,) = folder.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    (folder / f".{path.name}.999999999.part").write_bytes(b"x")
    result = run("verify", "--cache-dir", folder)
    assert result.exit_code == 1
    assert result.stdout.startswith(f"{path.stem}: ")
    assert result.stdout.endswith("the checksum does not match: it has been changed, or has lost its end\n"
                                  "1 prompt, 1 of them damaged\n")  # fmt: skip
    assert not list(folder.glob(".*")), "what a killed process left is cleared away"
    assert run("rm", "--all", "--cache-dir", folder).stdout == "1 prompt removed\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls"], "there is no such folder"),
        (["verify"], "there is no such folder"),
        (["rm", "x"], "there is no such folder"),
        (["warm", "none"], "cannot read none"),
    ],
)
def test_what_is_not_there_is_said(arguments, message, tmp_path):
    result = run(*arguments, "--cache-dir", tmp_path / "none")
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


def test_what_to_remove_is_said_clearly(tmp_path):
    for arguments in ([], ["x", "--all"], ["x"], ["../x"]):
        assert run("rm", *arguments, "--cache-dir", tmp_path).exit_code == 2
    (tmp_path / "short").write_text("the sea")
    result = run("warm", tmp_path / "short", "--cache-dir", tmp_path / "cache")
    assert (result.exit_code, "could not be kept" in result.stderr) == (2, True)
