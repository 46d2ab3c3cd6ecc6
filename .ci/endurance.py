"""Whether a server lasts: `soak` under load, `kills` with its cache, `overload` with more than it has room for. See
Makefile.

Each starts a server of its own, says what it saw as one JSON object, and fails if that is not as it must be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from magicpig.studies.bench.serving import Load, drive, prompts, quantile

GROWTH = 64 << 20  # bytes that a process may be larger after a soak than in its first third with warm prompts


class Server:
    """A `magicpig serve` of this Python, on a free port."""

    def __init__(self, log: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)  # a new one for each question would take longer than it
        command = [sys.executable, "-m", "magicpig", "serve", "--port", str(self.port), *options]
        with log.open("a") as stderr:
            self.process = subprocess.Popen(command, stderr=stderr)
        end = time.monotonic() + 300
        while time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=10).status_code == 200:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.process.kill()
        sys.exit(f"the server did not start: {log.read_text()[-2000:]}")

    def metric(self, *names: str) -> float:
        """The sum of metrics over their labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] in names)

    @property
    def resident(self) -> int:
        """Bytes."""
        return psutil.Process(self.process.pid).memory_info().rss

    def ask(self, prompt: str, **settings: object) -> httpx.Response:
        """One whole answer."""
        return httpx.post(f"{self.url}/v1/completions", json={"prompt": prompt, **settings}, timeout=600)

    def end(self) -> int:
        """As people end it; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@contextlib.contextmanager
def serving(log: Path, *options: str) -> Iterator[Server]:
    """A server that is gone afterwards, whatever happens."""
    server = Server(log, *options)
    try:
        yield server
    finally:
        server.http.close()
        server.process.kill()
        server.process.wait()


def hang_ups(server: Server, clients: int) -> float:
    """Seconds until nothing runs after so many clients have hung up at once."""
    with (
        ThreadPoolExecutor(clients) as pool,
        httpx.Client(timeout=600, limits=httpx.Limits(max_connections=None)) as http,
    ):
        begun, leave = threading.Barrier(clients + 1), threading.Event()

        def one(number: int) -> None:
            body = {
                "prompt": f"client {number} " * 40,
                "max_tokens": 2000,
                "ignore_eos": True,
                "stream": True,
                "logprobs": 0,
            }
            with http.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
                next(answer.iter_lines())
                begun.wait()
                leave.wait()

        done = [pool.submit(one, number) for number in range(clients)]
        begun.wait()
        start = time.monotonic()
        leave.set()
        for each in done:
            each.result()
        while server.metric("magicpig_running", "magicpig_reserved_bytes") > 0:
            if time.monotonic() - start > 60:
                break
            time.sleep(0.01)
        return time.monotonic() - start


def soak(arguments: argparse.Namespace, log: Path) -> tuple[dict[str, object], bool]:
    """Streaming clients for some minutes, of which every tenth hangs up."""
    with serving(log, *arguments.options, "--cache-dir", str(log.parent / "cache")) as server:
        start, rounds, answers, left = time.monotonic(), 0, 0, 0
        errors: list[str | None] = []
        freed: list[float] = []
        sizes: list[int] = []
        cached: list[int] = []
        while (spent := time.monotonic() - start) < arguments.minutes * 60 or rounds < 3:
            load = Load(
                requests=arguments.clients * 4,
                concurrency=arguments.clients,
                words=(10, arguments.words),
                max_tokens=arguments.tokens,
                hang_up=0.1,
                seed=rounds,
            )
            outcomes = drive(f"{server.url}/v1", load, timeout=1200).outcomes
            # The pocket model may say nothing that is text, which is an answer.
            bad = [outcome.error for outcome in outcomes if outcome.error not in (None, "no text")]
            errors, answers = errors + bad, answers + sum(not outcome.left for outcome in outcomes) - len(bad)
            left += sum(outcome.left for outcome in outcomes)
            longest = max(outcome.prompt_tokens for outcome in outcomes)
            freed.append(hang_ups(server, arguments.clients))
            cached.append(int(server.metric("magicpig_cached_bytes")))
            sizes.append(server.resident)
            rounds += 1
            print(f"{spent:.0f} s: {answers} answers, {len(errors)} errors, {sizes[-1] >> 20} MiB", file=sys.stderr)
        alive, code = server.process.poll() is None, server.end()
    # A process grows until warm prompts have filled their share of memory.
    full = [size for size, held in zip(sizes, cached, strict=True) if held > 0.9 * max(cached)]
    early = statistics.median(full[: max(1, len(full) // 3)])
    found = {
        "seconds": time.monotonic() - start,
        "answers": answers,
        "hung_up": left,
        "errors": errors[:5],
        "longest_prompt_tokens": longest,
        "freed_s_median": statistics.median(freed),
        "freed_s_max": max(freed),
        "resident_mib": [size >> 20 for size in sizes],
        "warm_prompts_mib": [size >> 20 for size in cached],
        "exit_code": code,
    }
    return found, alive and code == 0 and not errors and max(freed) < 1 and sizes[-1] < early + GROWTH


def kills(arguments: argparse.Namespace, log: Path) -> tuple[dict[str, object], bool]:
    """Kill -9 at random moments while prompts are read and written; afterwards the cache verifies clean each time."""
    chance, folder = random.Random(0), log.parent / "cache"
    warm, damaged, torn = 0, [], 0
    texts = prompts(Load(requests=arguments.times * 4, words=(200, arguments.words), seed=1))
    for turn in range(arguments.times):
        with serving(log, *arguments.options, "--cache-dir", str(folder)) as server:
            if turn:  # what the last one has left is served, not computed anew
                answer = server.ask(texts[0], max_tokens=1).json()
                warm += answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
            else:
                server.ask(texts[0], max_tokens=1)
                time.sleep(2)  # until its file is written
            with ThreadPoolExecutor(4) as pool:
                for text in texts[4 * turn : 4 * turn + 4]:
                    pool.submit(_ask_in_vain, server, text)
                time.sleep(chance.uniform(0.05, 2))
                server.process.kill()
            server.process.wait()
        torn += sum(path.suffix != ".safetensors" for path in folder.iterdir())
        verify = [sys.executable, "-m", "magicpig", "cache", "verify", "--cache-dir", str(folder)]
        done = subprocess.run(verify, capture_output=True, text=True)
        if done.returncode:
            damaged.append(done.stdout + done.stderr)
    found = {
        "kills": arguments.times,
        "warm_afterwards": warm,
        "damaged": damaged,
        "files": len(list(folder.iterdir())),
    }
    return found, not damaged and warm == arguments.times - 1


def overload(arguments: argparse.Namespace, log: Path) -> tuple[dict[str, object], bool]:
    """Four times as many clients as memory has room for, who wait or get status 429; beside as many as there is room.

    Latency is that of requests that were let in: seconds from then to their end on average, and between their tokens.
    """
    words = (arguments.words, arguments.words)
    options = [*arguments.options, "--cache-share", "0"]

    def load(server: Server, clients: int, seed: int, times: int = 3) -> dict[str, float | None]:
        sums = [f"magicpig_{name}_seconds_{part}" for name in ("request", "queue") for part in ("sum", "count")]
        before = [server.metric(name) for name in sums]
        each = Load(requests=clients * times, concurrency=clients, words=words, max_tokens=arguments.tokens, seed=seed)
        outcomes = drive(f"{server.url}/v1", each, timeout=3600).outcomes
        total, ended, queued, _ = (server.metric(name) - b for name, b in zip(sums, before, strict=True))
        gaps = [gap for outcome in outcomes for gap in outcome.gaps]
        refused = sum(outcome.error == "status 429" for outcome in outcomes)
        return {
            "clients": clients,
            "answered": ended,
            "refused": refused,
            "errors": sum(outcome.error not in (None, "no text") for outcome in outcomes) - refused,
            "let_in_to_end_s": (total - queued) / ended,
            "next_token_s_p50": quantile(gaps, 0.5),
            "next_token_s_p95": quantile(gaps, 0.95),
        }

    found: dict[str, Any] = {}
    with serving(log, *options) as server:
        most, done = 0.0, threading.Event()

        def watch() -> None:
            nonlocal most
            while not done.wait(0.05):
                most = max(most, server.metric("magicpig_running"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        load(server, 16, 0, times=1)
        done.set()
        watcher.join()
        room = int(most)
        found["room_for"] = room
        found["as_many"] = load(server, room, 1)
        found["four_times_waiting"] = load(server, 4 * room, 2)
        alive = [server.process.poll() is None, server.end() == 0]
    with serving(log, *options, "--max-waiting", str(room)) as server:
        found["four_times_refused"] = load(server, 4 * room, 3)
        alive += [server.process.poll() is None, server.end() == 0]
    found["alive"] = all(alive)
    alone, waiting, refused = (found[name] for name in ("as_many", "four_times_waiting", "four_times_refused"))
    good = all(alive) and room < 16 and refused["refused"] > 0 and alone["refused"] + waiting["refused"] == 0
    for one in (waiting, refused):
        good = good and all(one[name] <= 2 * alone[name] for name in ("let_in_to_end_s", "next_token_s_p95"))
    return found, good and not any(one["errors"] for one in (alone, waiting, refused))


def _ask_in_vain(server: Server, text: str) -> None:
    with contextlib.suppress(httpx.HTTPError):
        server.ask(text, max_tokens=8)


def main() -> None:
    """Runs what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="after --: options of magicpig serve")
    parser.add_argument("what", choices=["soak", "kills", "overload"])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--words", type=int, default=16000, help="of the longest prompt")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--times", type=int, default=50)
    own, _, options = " ".join(sys.argv[1:]).partition(" -- ")
    arguments = parser.parse_args(own.split())
    arguments.options = options.split()
    run: Callable[[argparse.Namespace, Path], tuple[dict[str, object], bool]] = globals()[arguments.what]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        found, good = run(arguments, log)
        print(json.dumps(found))
        if not good:
            sys.exit(f"not as it must be; the server said last:\n{log.read_text()[-3000:]}")


if __name__ == "__main__":
    main()
