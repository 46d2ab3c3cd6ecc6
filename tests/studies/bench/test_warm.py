"""A warm document is not read again: counted in tokens, since time is not to be relied on here."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from magicpig.cli import app


def test_what_was_read_is_told(tmp_path, one_thread, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out.json"
    result = CliRunner().invoke(app, ["bench", "warm", "--context", "700", "--repeats", "1", "--json", str(out)])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(out.read_text())["results"]
    assert (found["tokens"], found["cached"], found["cached_restarted"]) == (700, 700, 700)
    assert found["second_ratio"] == found["first_s"] / found["second_s"]
    assert found["file_bytes"] > 700 * 3 * 3 * 2 * 64 * 4, "layers, heads, keys and values"
    assert "restarted" in result.stdout
