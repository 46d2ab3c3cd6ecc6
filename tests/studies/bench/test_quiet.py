import os
import threading
import time
from pathlib import Path

import pytest

from magicpig import machine
from magicpig.studies.bench import quiet
from magicpig.studies.bench.quiet import Quiet, Timing, count, has_waited, quiet_ms

needs_schedstat = pytest.mark.skipif(
    not Path("/proc/self/schedstat").exists() or not hasattr(os, "sched_setaffinity"), reason="needs Linux's schedstat"
)


def test_only_calls_that_never_waited_count():
    timings = [Timing(1.0, False), Timing(39.0, True), Timing(1.2, False)]
    assert quiet_ms(timings) == [1.0, 1.2]
    assert count(timings) == Quiet(calls=3, quiet=2)
    assert quiet_ms([Timing(39.0, True)]) == [39.0]  # there is nothing better


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Quiet(0, 0), ""),
        (Quiet(96, 96), ""),
        (Quiet(96, 12), "12 of 96 calls never waited for a processor, and only these count"),
        (Quiet(1920, 0), "all 1,920 calls waited for a processor"),
    ],
    ids=["nothing", "all", "some", "none"],
)
def test_what_is_said(found, expected):
    assert expected in str(found)
    assert bool(str(found)) == bool(expected)


def test_waking_up_is_no_waiting(monkeypatch):
    for after, elapsed, expected in ((19_000, 1e-4, False), (21_000, 1e-4, True), (900_000, 0.1, False)):
        monkeypatch.setattr(quiet, "waited_ns", lambda after=after: after)
        assert has_waited(0, elapsed) is expected
    assert has_waited(None, 1.0) is False
    monkeypatch.setattr(quiet, "waited_ns", lambda: None)
    assert has_waited(0, 1.0) is False


def test_waits_of_all_threads_are_added(tmp_path):
    for task, text in (("1", "100 7 3\n"), ("2", "5 35 1\n")):
        (tmp_path / task).mkdir()
        (tmp_path / task / "schedstat").write_text(text)
    assert machine.waited_ns(tmp_path) == 42
    assert machine.waited_ns(tmp_path / "missing") is None


@needs_schedstat
def test_threads_that_share_a_processor_wait():
    """Two processes bound to one processor: each waits about half of the time."""
    ours = os.sched_getaffinity(0)
    child = os.posix_spawn("/bin/sh", ["sh", "-c", "while :; do :; done"], os.environ)
    try:
        one = {min(ours)}
        os.sched_setaffinity(child, one)
        waited = []

        def work():
            os.sched_setaffinity(0, one)  # of this thread
            time.sleep(0.05)
            before, start = machine.waited_ns(), time.perf_counter()
            while time.perf_counter() - start < 0.3:
                pass
            waited.append(has_waited(before, 0.3))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert waited == [True]
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
