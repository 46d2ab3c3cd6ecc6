"""`magicpig serve` as people start it: flags, environment, a file; signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import httpx
import pytest
from typer.testing import CliRunner

from magicpig.cli import app
from magicpig.cli.errors import BAD_INPUT


def invoke(*arguments: str, env: dict[str, str] | None = None):
    return CliRunner().invoke(app, ["serve", *arguments], env=env)


def test_it_serves_the_pocket_model_and_ends_in_order(tmp_path):
    keys, settings = tmp_path / "keys", tmp_path / "serve.yaml"
    keys.write_text("# for tests\nsecret-one\n\n")
    settings.write_text(
        f"port: 0\nname: [mine]\napi-key-file: {keys}\nmax_waiting: 3\nsampler: sketch:99\ndense-layers: [0, 2]\n"
    )
    command = [sys.executable, "-m", "magicpig", "serve", "--settings", str(settings), "--log-json"]
    env = {**os.environ, "MAGICPIG_SERVE_TOKEN_BUDGET": "64", "MAGICPIG_API_KEYS": "secret-two,"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            url = next(
                found[1] for line in process.stderr if (found := re.search(r"running on (http://127.0.0.1:\d+)", line))
            )
            for key in ("secret-one", "secret-two"):
                headers = {"Authorization": f"Bearer {key}"}
                model = httpx.get(f"{url}/v1/models", headers=headers, timeout=30).json()["data"][0]
                assert (model["id"], model["magicpig"]) == (
                    "mine",
                    {"sampler": "sketch", "budget": 99.0, "dense_layers": [0, 2]},
                )
            assert httpx.get(f"{url}/v1/models", timeout=30).status_code == 401
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            assert process.wait(30) == 0
        finally:
            process.kill()
    logged = [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
    assert [line["status"] for line in logged if "status" in line] == [200, 200, 401]
    assert "secret" not in rest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ssl-certfile", "x"], "--ssl-certfile and --ssl-keyfile go together"),
        (["--replicas", "2", "--port", "0"], "--replicas listen on a --port of their own"),
        (["--replicas", "3", "--max-replicas", "2"], "--max-replicas 2 must be at least --replicas, 3"),
        (["--budget", "-1"], "budget=-1"),
        (["--token-budget", "2", "--max-running", "4"], "token_budget=2 is less than running=4"),
        (["--settings", "{folder}/none.yaml"], "none.yaml"),
        (["--settings", "{folder}/list.yaml"], "must be options by name"),
        (["--settings", "{folder}/unknown.yaml"], "colour: there is no such option"),
        (["--settings", "{folder}/bad.yaml"], "not YAML"),
        (["--api-key-file", "{folder}/empty"], "has no API key"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(arguments, message, tmp_path):
    (tmp_path / "list.yaml").write_text("- port\n")
    (tmp_path / "unknown.yaml").write_text("colour: red\n")
    (tmp_path / "bad.yaml").write_text("port: [\n")
    (tmp_path / "empty").write_text("# nothing\n")
    result = invoke(*[argument.format(folder=tmp_path) for argument in arguments])
    assert result.exit_code == BAD_INPUT
    assert message in result.output
    assert result.output.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "magicpig.server.app", None)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = invoke()
    assert "pip install 'magicpig[serve]'" in result.output
