"""The load is what it says, and what is measured is what a server did."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from magicpig.cli import app
from magicpig.errors import ArgumentError
from magicpig.studies.bench.serving import Load, drive, prompts, quantile

PAUSE = 0.02


class Endpoint(BaseHTTPRequestHandler):
    """Answers with three pieces, or fails where the prompt says so; notes how many requests are under way."""

    under_way, most, seen = 0, 0, []
    lock = threading.Lock()

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            Endpoint.seen.append(body)
            Endpoint.under_way += 1
            Endpoint.most = max(Endpoint.most, Endpoint.under_way)
        broken = body.get("magicpig") == {"sampler": "quest:3,sinks=2"}
        self.send_response(429 if broken else 200)
        self.end_headers()
        for i in range(0 if broken else 3):
            time.sleep(PAUSE)
            self.wfile.write(b"data: " + json.dumps({"choices": [{"text": f"{i}"}]}).encode() + b"\n\n")
            self.wfile.flush()
        usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": 3}
        with self.lock:
            Endpoint.under_way -= 1
        self.wfile.write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")


@pytest.fixture
def endpoint():
    Endpoint.most, Endpoint.seen = 0, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Endpoint) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def test_prompts_are_ragged_and_the_same_each_time():
    load = Load(requests=200, words=(10, 1000))
    lengths = sorted(len(prompt.split(" ")) for prompt in prompts(load))
    assert prompts(load) == prompts(load) != prompts(Load(requests=200, words=(10, 1000), seed=1))
    assert 10 <= lengths[0] < 20
    assert 500 < lengths[-1] <= 1000
    assert 70 < lengths[100] < 140, "half of them are below the geometric mean, 100"


def test_what_is_measured(endpoint):
    load = Load(requests=6, concurrency=2, words=(3, 9), max_tokens=3)
    done = []
    result = drive(endpoint, load, model="m", on_done=done.append)
    assert (len(result.outcomes), len(done), Endpoint.most) == (6, 6, 2)
    assert {body["model"] for body in Endpoint.seen} == {"m"}
    assert sorted(body["prompt"] for body in Endpoint.seen) == sorted(prompts(load))
    for outcome, prompt in zip(result.outcomes, prompts(load), strict=True):
        assert (outcome.prompt_tokens, outcome.new_tokens, outcome.error) == (len(prompt.split()), 3, None)
        assert outcome.first_s >= PAUSE
        assert len(outcome.gaps) == 2
        assert outcome.total_s >= outcome.first_s + sum(outcome.gaps)
    found = result.summary()
    assert found["errors"] == 0
    assert found["new_tokens_per_s"] == pytest.approx(18 / result.seconds)
    assert found["next_token_s_p95"] >= found["next_token_s_p50"] > 0


def test_arrivals_take_their_time(endpoint):
    result = drive(endpoint, Load(requests=5, rate=50.0, concurrency=5, words=(3, 3)))
    assert result.seconds > 0.02
    assert math.isclose(sum(outcome.new_tokens for outcome in result.outcomes), 15)


def test_errors_are_counted_not_raised(endpoint):
    refused = drive(endpoint, Load(requests=2, extra={"magicpig": {"sampler": "quest:3,sinks=2"}}))
    assert [outcome.error for outcome in refused.outcomes] == ["status 429"] * 2
    assert refused.summary()["first_token_s_p50"] is None
    nobody = drive("http://127.0.0.1:9/v1", Load(requests=1))
    assert nobody.outcomes[0].error == "ConnectError"


def test_command(endpoint, tmp_path):
    arguments = ["bench", "serving", "--url", endpoint, "--requests", "2", "--words", "3,5", "--concurrency", "1,2"]
    result = CliRunner().invoke(
        app, [*arguments, "--samplers", "full,quest:3,sinks=2", "--json", str(tmp_path / "out.json")]
    )
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(one["sampler"], one["concurrency"], one["errors"]) for one in told] == [
        ("full", 1, 0), ("full", 2, 0), ("quest:3,sinks=2", 1, 2), ("quest:3,sinks=2", 2, 2)
    ]  # fmt: skip
    assert re.search(r"new\s[\s\S]*tokens/s", result.output)  # the heading takes two lines of a narrow table
    failed = CliRunner().invoke(app, ["bench", "serving", "--url", "http://127.0.0.1:9/v1", "--requests", "1"])
    assert failed.exit_code == 2
    assert "nothing was answered" in failed.output
    wrong = CliRunner().invoke(app, [*arguments[:-4], "--words", "5"])
    assert "must be two numbers" in wrong.output


def test_quantiles_and_limits():
    assert (quantile([3, 1, 2], 0.5), quantile([1], 0.95), quantile([], 0.5)) == (2, 1, None)
    with pytest.raises(ArgumentError, match="words=5,3"):
        Load(words=(5, 3))
    with pytest.raises(ArgumentError, match="rate=0"):
        Load(rate=0)


def test_clients_that_hang_up_are_no_errors_and_do_not_count_in_times(endpoint):
    result = drive(endpoint, Load(requests=6, hang_up=0.5, words=(1, 3)))
    left = [outcome.left for outcome in result.outcomes]
    found = result.summary()
    assert 0 < sum(left) < 6
    assert (found["errors"], found["hung_up"]) == (0, sum(left))
    assert all(outcome.gaps == () for outcome in result.outcomes if outcome.left)
    with pytest.raises(ArgumentError, match="hang_up=2"):
        Load(hang_up=2)
