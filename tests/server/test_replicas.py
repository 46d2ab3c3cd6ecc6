"""Two replicas of a server on Ray: a warm document meets its replica, and one that is killed is missed by few."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest


def _replicas(driver):
    found = {}
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith("ray::ServeReplica:magicpig:Replica"):
                found[process.pid] = process
        except psutil.NoSuchProcess:
            pass
    return found


def _wait(what, seconds=900.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if what():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"nothing after {seconds} s")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "magicpig", "serve", "--replicas", "2", "--port", str(port), "--memory", "1"]
    log = tmp_path_factory.mktemp("replicas") / "log"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as driver:
        try:
            _wait(lambda: httpx.get(f"{url}/health", timeout=5).status_code == 200)
            _wait(lambda: len(_replicas(driver)) == 2)
            yield url, driver
            driver.send_signal(signal.SIGTERM)
            assert driver.wait(300) == 0, log.read_text()[-3000:]
        finally:
            for child in psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []:
                child.kill()
            driver.kill()


@pytest.mark.ray
def test_second_questions_reach_the_replica_that_has_the_document(service):
    url, _ = service
    documents = [f"Chapter {i}. " + f"In the {i}th year nothing came of it. " * 150 for i in range(20)]

    def ask(prompt):
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": 2}, timeout=300)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    with ThreadPoolExecutor(4) as pool:
        assert not any(pool.map(ask, [document + " Who came?" for document in documents]))
        warm = list(pool.map(ask, [document + " What else was there to say?" for document in documents]))
    assert sum(cached > 1000 for cached in warm) >= 0.9 * len(documents)


@pytest.mark.ray
def test_a_killed_replica_is_replaced_and_only_those_that_it_answered_notice(service):
    url, driver = service
    before = _replicas(driver)
    begun = []

    def stream(number):
        # With these, every token is an event.
        body = {"prompt": f"{number}", "max_tokens": 1000, "ignore_eos": True, "stream": True, "logprobs": 0}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=300) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()
            next(lines)
            begun.append(number)
            return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(stream, number) for number in range(12)]
        _wait(lambda: len(begun) == 12)
        next(iter(before.values())).kill()
        # Those who come now do not notice.
        for _ in range(5):
            later = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 2}, timeout=300)
            assert later.status_code == 200, later.text
        ends = [answer.result()[-1] for answer in answers]
    told = [end for end in ends if "error" in end]
    assert 0 < len(told) < 12
    assert {end["error"]["code"] for end in told} == {"replica_ended"}
    assert all(end["choices"][0]["finish_reason"] == "length" for end in ends if "error" not in end)
    _wait(lambda: len(_replicas(driver)) == 2 and set(_replicas(driver)) != set(before))


@pytest.mark.ray
def test_a_replica_answers_errors_and_hang_ups_as_one_server_does(service):
    url, _ = service
    assert httpx.post(f"{url}/v1/completions", content=b"{", timeout=60).status_code == 400
    assert httpx.get(f"{url}/nowhere", timeout=60).status_code == 404
    huge = httpx.post(f"{url}/v1/completions", content=b"x" * (33 << 20), timeout=60)
    assert (huge.status_code, huge.json()["error"]["code"]) == (413, "body_too_large")
    chat = httpx.post(
        f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    )
    assert chat.json()["choices"][0]["finish_reason"] in ("length", "stop")
