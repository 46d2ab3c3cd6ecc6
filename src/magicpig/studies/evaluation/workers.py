"""Several processes that do one kind of work side by side, each with what it needs loaded once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from magicpig.errors import InsufficientMemoryError

T = TypeVar("T")
R = TypeVar("R")

_work: Callable[[Any], Any]


def in_order(prepare: Callable[[], Callable[[T], R]], items: Iterable[T], jobs: int) -> Iterator[R]:
    """``prepare()(item)`` of every item, in the order of the items, by ``jobs`` processes; each prepares once.

    prepare, items and results are pickled; what the work raises is raised here. Raises MemoryError when a process dies,
    for want of memory is nearly always why.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(jobs, context, _start, (prepare,))
    try:
        yield from pool.map(_do, items)
    except BrokenProcessPool:
        raise InsufficientMemoryError(f"one of {jobs} processes died, probably for lack of memory; use fewer") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start(prepare: Callable[[], Callable[[Any], Any]]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # end without a word; the parent has the say
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = prepare()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(item: Any) -> Any:
    return _work(item)
