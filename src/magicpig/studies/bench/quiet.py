"""Which timings count on a machine that others use: those of calls whose threads never waited for a processor.

Linux counts, for each thread, the time that it could have run and did not (the second number of schedstat). A call that
lost its processor to somebody else says nothing about the code; a median over such calls was once wrong by 39 times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from magicpig.machine import waited_ns

WAKING_NS = 20_000  # threads that are woken up wait this long on an idle machine, too
WAKING_SHARE = 0.01  # or this share of the call


@dataclass(frozen=True)
class Timing:
    """A call: milliseconds, and whether a thread waited for a processor meanwhile (False where it is not known)."""

    ms: float
    waited: bool


@dataclass(frozen=True)
class Quiet:
    """How many calls there were, and how many of them never waited."""

    calls: int
    quiet: int

    def __str__(self) -> str:
        """A sentence for who reads the numbers; empty if there is nothing to say."""
        if self.quiet == self.calls:
            return ""
        if self.quiet == 0:
            return f"The machine is busy: all {self.calls:,} calls waited for a processor, so these times mean little."
        return (
            f"The machine is busy: {self.quiet:,} of {self.calls:,} calls never waited for a processor, "
            "and only these count."
        )


def has_waited(before: int | None, elapsed_s: float) -> bool:
    """Whether threads of this process have waited since `waited_ns` said ``before``, ``elapsed_s`` seconds ago."""
    after = waited_ns()
    if before is None or after is None:
        return False
    return after - before > max(WAKING_NS, WAKING_SHARE * elapsed_s * 1e9)


def timed(call: Callable[[], object]) -> Timing:
    """How long a call takes, and whether it waited meanwhile."""
    waited, start = waited_ns(), time.perf_counter()
    call()
    elapsed = time.perf_counter() - start
    return Timing(elapsed * 1e3, has_waited(waited, elapsed))


def quiet_ms(timings: Iterable[Timing]) -> list[float]:
    """The milliseconds of the calls that never waited; of all calls, if each of them did."""
    every = list(timings)
    return [timing.ms for timing in every if not timing.waited] or [timing.ms for timing in every]


def count(timings: Iterable[Timing]) -> Quiet:
    """How many of the calls count."""
    every = list(timings)
    return Quiet(len(every), sum(not timing.waited for timing in every))
