"""What is not OpenAI's: keys, limits, hanging up, malformed requests, metrics, the end."""

from __future__ import annotations

import io
import json
import logging
import re
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from magicpig.server import app
from magicpig.server.middleware import JsonLines

ASK = {"model": "pocket", "prompt": "The number is", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def client(live):
    with live.client() as client:
        yield client


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.01)


def test_health_version_docs_and_models(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert "version" in client.get("/version").json()
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 131072
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) >= {"/v1/completions", "/v1/chat/completions", "/tokenize", "/metrics"}
    assert client.get("/docs").status_code == 200


def test_tokenize_and_back(client, live):
    told = client.post("/tokenize", json={"prompt": "The grass is green", "return_token_strs": True}).json()
    assert told["tokens"] == live.tokenizer("The grass is green")["input_ids"]
    assert (told["count"], told["max_model_len"], len(told["token_strs"])) == (
        len(told["tokens"]),
        131072,
        told["count"],
    )
    bare = client.post("/tokenize", json={"prompt": "The grass is green", "add_special_tokens": False}).json()
    assert client.post("/detokenize", json={"tokens": bare["tokens"]}).json() == {"prompt": "The grass is green"}
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "The grass is green"}]}).json()
    assert chat["tokens"] == told["tokens"]


MALFORMED = {
    "no JSON": b"{",
    "empty": b"",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a character": b'{"prompt": "\\ud800", "max_tokens": 1}',
    "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a list": b"[]",
    "null": b"null",
    "no prompt": b"{}",
    "no prompts": b'{"prompt": []}',
    "an empty list of ids": b'{"prompt": [[]]}',
    "wrong types": b'{"prompt": {"text": "x"}}',
    "mixed": b'{"prompt": ["x", 5]}',
    "negative token": b'{"prompt": [-1]}',
    "unknown token": b'{"prompt": [99999]}',
    "huge token": b'{"prompt": [99999999999999999999999]}',
    "negative": b'{"prompt": "x", "max_tokens": -1}',
    "absurd": b'{"prompt": "x", "max_tokens": 1e300}',
    "too many": b'{"prompt": "x", "max_tokens": 100000000000000000000}',
    "no number": b'{"prompt": "x", "temperature": NaN}',
    "infinite": b'{"prompt": "x", "temperature": 1e999}',
    "text for a number": b'{"prompt": "x", "n": "many"}',
    "no answers": b'{"prompt": "x", "n": 0}',
    "bias of nothing": b'{"prompt": "x", "logit_bias": {"a": 1}}',
    "bias of an unknown token": b'{"prompt": "x", "logit_bias": {"99999": 1}}',
    "bias too large": b'{"prompt": "x", "logit_bias": {"5": 1e9}}',
    "stops": b'{"prompt": "x", "stop": {}}',
    "many stops": json.dumps({"prompt": "x", "stop": [str(i) for i in range(100)]}).encode(),
    "suffix": b'{"prompt": "x", "suffix": "y"}',
    "best_of": b'{"prompt": "x", "best_of": 3}',
    "bad setting": b'{"prompt": "x", "magicpig": {"budget": -1}}',
    "setting of a wrong type": b'{"prompt": "x", "magicpig": {"layers": 5}}',
    "a layer that is not there": b'{"prompt": "x", "magicpig": {"layers": {"9": {"budget": 3}}}}',
    "not an object": b'{"prompt": "x", "magicpig": "sketch"}',
}


def test_a_body_that_is_not_called_json_is_refused_in_words_that_help(client):
    answer = client.post("/v1/completions", content=b'{"prompt": "x"}')
    assert answer.status_code == 400
    assert "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_refused_in_words(client, name):
    answer = client.post("/v1/completions", content=MALFORMED[name], headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": ""}], "max_tokens": 0, "add_generation_prompt": False, "n": 1000},
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}},
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}},
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "xml"}},
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"},
        {"messages": [{"role": "user", "content": "x"}], "functions": [{"name": "f"}]},
        {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 50, "logprobs": True},
        {"messages": [{"role": "user", "content": "x"}], "stream_options": {"include_usage": True}},
    ],
)
def test_malformed_chats(client, body):
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_other_mistakes(client):
    for method, path, status in [("GET", "/v1/completions", 405), ("GET", "/nowhere", 404), ("POST", "/tokenize", 400)]:
        answer = client.request(method, path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
    assert client.post("/tokenize", json={}).status_code == 400
    assert client.post("/detokenize", json={"tokens": [10**6]}).status_code == 400
    assert client.post("/v1/completions", json=ASK | {"unknown": {"x": [1]}, "user": "me"}).status_code == 200


def test_request_ids_are_kept_or_made(client):
    answer = client.post("/v1/completions", json=ASK, headers={"X-Request-Id": "mine-1"})
    assert answer.headers["X-Request-Id"] == "mine-1"
    assert answer.json()["id"] == "cmpl-mine-1"
    made = client.get("/health", headers={"X-Request-Id": "no\tgood id"}).headers["X-Request-Id"]
    assert len(made) == 32


def test_a_client_that_hangs_up_frees_its_memory(live, client):
    for stream in (True, False):
        body = json.dumps(ASK | {"max_tokens": 50_000, "stream": stream, "ignore_eos": True}).encode()
        with socket.create_connection(("127.0.0.1", httpx.URL(live.url).port)) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            wait_for(lambda: live.engine.scheduler.running)
            if stream:
                assert raw.recv(100)
        gone = time.monotonic()
        wait_for(lambda: live.engine.unfinished == 0)
        assert time.monotonic() - gone < 5
        assert live.engine.scheduler.reserved == 0
    wait_for(lambda: 'magicpig_answers_total{finish="abort"}' in client.get("/metrics").text)
    # Nothing is computed any more, and still they say what is.
    wait_for(lambda: "magicpig_running 0.0" in client.get("/metrics").text)
    assert "magicpig_reserved_bytes 0.0" in client.get("/metrics").text


def test_slow_and_broken_clients_do_not_matter(live, client):
    with socket.create_connection(("127.0.0.1", httpx.URL(live.url).port)) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        assert client.post("/v1/completions", json=ASK).status_code == 200
    with socket.create_connection(("127.0.0.1", httpx.URL(live.url).port)) as raw:
        raw.sendall(b"\x00\x01\x02 nonsense\r\n\r\n")
        assert b"400" in raw.recv(100)
    assert client.get("/health").status_code == 200


def test_metrics_count_what_was_done(client):
    def value(name):
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    ends = 'magicpig_answers_total{finish="length"}'
    before = {name: value(name) for name in ("magicpig_new_tokens_total", "magicpig_first_token_seconds_count", ends)}
    answer = client.post("/v1/completions", json=ASK | {"n": 2, "ignore_eos": True}).json()
    wait_for(lambda: value("magicpig_new_tokens_total") == before["magicpig_new_tokens_total"] + 8)
    assert answer["usage"]["completion_tokens"] == 8
    assert value("magicpig_first_token_seconds_count") == before["magicpig_first_token_seconds_count"] + 2
    wait_for(lambda: value(ends) == before[ends] + 2)
    wait_for(lambda: value("magicpig_running") == 0)


def test_keys(serve):
    live = serve({"api_keys": ("first-key", "schlüssel")})
    with live.client() as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first-key"}, {"Authorization": ""}):
            for path in ("/v1/models", "/metrics", "/nowhere"):
                answer = client.get(path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert client.get("/health").status_code == 200
        for key in (b"first-key", "schlüssel".encode()):
            assert client.get("/v1/models", headers={b"Authorization": b"Bearer " + key}).status_code == 200


def test_large_bodies_and_other_origins(serve):
    live = serve({"max_body": 1000, "cors_origins": ("http://page.example",)})
    with live.client() as client:
        large = json.dumps(ASK | {"prompt": "x" * 2000}).encode()
        for content in (large, (part for part in (large[:900], large[900:]))):
            answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        asked = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
        assert (
            client.options("/v1/completions", headers=asked).headers["access-control-allow-origin"] == asked["Origin"]
        )
        other = client.get("/health", headers={"Origin": "http://other.example"})
        assert "access-control-allow-origin" not in other.headers


def test_too_many_requests_are_told_to_come_back(serve):
    live = serve(engine={"running": 1, "waiting": 1, "token_budget": 8})
    long = ASK | {"max_tokens": 20_000, "ignore_eos": True, "stream": True}
    with live.client() as client, client.stream("POST", "/v1/completions", json=long) as first:
        pieces = first.iter_bytes()  # kept, since the stream is closed with it
        assert next(pieces)
        with live.client() as other, other.stream("POST", "/v1/completions", json=long):
            wait_for(lambda: live.engine.scheduler.waiting)
            with live.client() as third:
                answer = third.post("/v1/completions", json=ASK)
                assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
                assert answer.json()["error"]["code"] == "queue_full"
                # Of a request with several prompts, none runs when one is refused.
                assert third.post("/v1/completions", json=ASK | {"prompt": ["a", "b"]}).status_code == 429
                assert live.engine.unfinished == 2


def test_time_outs_are_told_in_whole_answers_and_in_streams(serve):
    live = serve(engine={"timeout": 0.5})
    long = ASK | {"max_tokens": 50_000, "ignore_eos": True}
    with live.client() as client:
        answer = client.post("/v1/completions", json=long)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        lines = client.post("/v1/completions", json=long | {"stream": True}).text.strip().split("\n\n")
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert lines[-1] == "data: [DONE]"


def test_the_end_lets_requests_finish_and_refuses_new_ones(serve):
    live = serve(drain=30.0)
    done = []
    body = ASK | {"max_tokens": 300, "ignore_eos": True}

    def ask():
        with live.client() as client:
            done.append(client.post("/v1/completions", json=body))

    asking = threading.Thread(target=ask)
    with live.client() as late:
        assert late.get("/health").status_code == 200
        asking.start()
        wait_for(lambda: live.engine.scheduler.running)
        live.server.handle_exit(signal.SIGTERM, None)
        wait_for(lambda: not live.engine.accepting)
        answer = late.post("/v1/completions", json=ASK)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert late.get("/health").json() == {"status": "draining"}
    asking.join()
    assert done[0].json()["usage"]["completion_tokens"] == 300
    wait_for(lambda: not live.engine.alive)


def test_the_end_is_told_to_requests_that_do_not_finish(serve):
    live = serve(drain=0.2)
    body = ASK | {"max_tokens": 50_000, "ignore_eos": True, "stream": True}
    with live.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        live.server.handle_exit(signal.SIGINT, None)
        rest = [line for line in lines if line]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert rest[-1] == "data: [DONE]"


def test_a_dead_engine_is_not_healthy(serve):
    live = serve()
    with live.client() as client:
        live.engine.close()
        assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json=ASK).status_code == 503


def test_a_bug_is_told_without_its_details(serve, monkeypatch, caplog):
    live = serve()

    def broken(requests):
        raise KeyError("a secret")

    monkeypatch.setattr(live.engine, "stream", broken)
    with live.client() as client:
        answer = client.post("/v1/completions", json=ASK)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert "a secret" in caplog.text


def test_log_lines_are_json_with_request_ids():
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonLines())
    record = logging.LogRecord("magicpig.server", logging.INFO, "f", 1, "%s done", ("GET /x",), None)
    record.request_id, record.seconds = "abc", 0.5
    handler.handle(record)
    line = json.loads(out.getvalue())
    assert line["message"] == "GET /x done"
    assert (line["level"], line["request_id"], line["seconds"]) == ("info", "abc", 0.5)
    assert line["time"].endswith("Z")


def test_every_metric_of_the_dashboard_is_there(serve):
    dashboard = json.loads(Path(app.__file__).with_name("grafana.json").read_text())
    shown = {name for panel in dashboard["panels"] for target in panel["targets"]
             for name in re.findall(r"magicpig_\w+", target["expr"])}  # fmt: skip
    with serve().client() as client:
        assert client.post("/v1/completions", json=ASK).status_code == 200
        # The end of an answer is counted after the client has it.
        wait_for(lambda: shown <= set(re.findall(r"^(magicpig_\w+)", client.get("/metrics").text, re.MULTILINE)))
    cells = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(cells) == len(set(cells))


def pdf(*pages):
    """A PDF file whose pages say that."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<</Type /Catalog /Pages 2 0 R>>",
        f"<</Type /Pages /Count {len(pages)} /Kids [{kids}]>>",
        "<</Type /Font /Subtype /Type1 /BaseFont /Helvetica>>",
    ]
    for i, text in enumerate(pages):
        drawn = f"BT /F 12 Tf 9 99 Td ({text}) Tj ET"
        fonts = "/Resources <</Font <</F 3 0 R>>>>"
        objects.append(f"<</Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] {fonts} /Contents {5 + 2 * i} 0 R>>")
        objects.append(f"<</Length {len(drawn)}>> stream\n{drawn}\nendstream")
    file, places = "%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(f"{len(file):010} 00000 n \n")
        file += f"{number} 0 obj {each} endobj\n"
    table = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{''.join(places)}"
    return f"{file}{table}trailer <</Size {len(objects) + 1} /Root 1 0 R>>\nstartxref\n{len(file)}\n%%EOF".encode()


def test_the_text_of_a_pdf_file(client, monkeypatch):
    from pypdf import PdfWriter

    empty = io.BytesIO()
    writer = PdfWriter()
    writer.add_blank_page(72, 72)
    writer.write(empty)
    with_text = pdf("the cat of rome", "the map of the sea")
    assert client.post("/extract", content=with_text).json() == {"text": "the cat of rome\n\nthe map of the sea"}
    for content, message in ((b"", "not a PDF"), (b"%PDF-nonsense", "not a PDF"), (empty.getvalue(), "has no text")):
        answer = client.post("/extract", content=content)
        assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True), answer.text
    monkeypatch.setitem(sys.modules, "pypdf", None)
    answer = client.post("/extract", content=with_text)
    assert (answer.status_code, "magicpig[pdf]" in answer.text) == (501, True)


def test_four_times_more_than_memory_has_room_for_waits_and_is_answered(serve):
    """Queueing: nothing fails; and nobody who was let in waits for those who were not."""
    live = serve(engine={"cache_share": 0.0, "running": 16, "token_budget": 64})
    config = live.engine.config
    live.engine.scheduler.limits = replace(live.engine.scheduler.limits, memory=2 * live.engine.size(config, 700))
    ask = {"max_tokens": 40, "ignore_eos": True, "temperature": 0}
    with live.client() as client, ThreadPoolExecutor(8) as clients:
        bodies = [ask | {"prompt": [5 + i] * 600} for i in range(8)]
        answers = list(clients.map(lambda body: client.post("/v1/completions", json=body), bodies))
        assert [answer.status_code for answer in answers] == [200] * 8
        assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {40}
        too_large = client.post("/v1/completions", json=ask | {"prompt": [5] * 5000})
        assert (too_large.status_code, too_large.json()["error"]["code"]) == (400, "request_too_large")
    assert (live.engine.scheduler.reserved, live.engine.unfinished) == (0, 0)
