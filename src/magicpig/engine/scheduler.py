"""Who computes what in the next step. Knows numbers of tokens, bytes and seconds; no torch, no model, no text.

Tasks wait, run, and are done. All share one line, ordered by `Task.rank`: the time of arrival plus `aging` seconds for
each level of priority. Later arrivals come to stand behind, so whoever waits comes to the front in the end, whatever
its priority. From the line follow all decisions:

- admission is in line, and the head waits until its memory is there: large requests are not overtaken for ever;
- a running task whose reserved memory is used up takes from the task at the end of the line: that one is preempted,
  goes back into the line at its old place, and computes its tokens again later. The first of the line never has to;
- every task that generates gets its token in every step; the prompts share what is left of the token budget: the
  first in line gets at least half of it, the others by who is done soonest. So a long prompt stalls nobody.

Preemption is as in vLLM (arXiv 2309.06180), chunked prefill beside decoding as in Sarathi-Serve (arXiv 2403.02310).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from magicpig.engine.errors import QueueFullError, RequestTooLargeError
from magicpig.errors import ArgumentError


class Phase(Enum):
    """How a piece attends: the prompt exactly, an answer by what the settings say."""

    PREFILL = "prefill"
    DECODE = "decode"


class Status(Enum):
    """Where a task stands. Preempted tasks wait."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


@dataclass(eq=False)
class Task:
    """One sequence of tokens, seen from outside.

    prompt: tokens of the prompt, at least one. most: tokens that it may produce. size: upper bound in bytes of what n
    tokens keep, growing with n. priority: smaller comes first. deadline: by when it must be done; start_by: by when it
    must have been admitted (seconds of the scheduler's clock). chunk: the most tokens of one prefill piece.
    produced: tokens sampled so far; computed: tokens whose keys and values are there.
    held: something is made ready for it elsewhere; until then it neither starts nor computes, and others pass.
    """

    prompt: int
    most: int
    size: Callable[[int], int]
    priority: int = 0
    deadline: float | None = None
    start_by: float | None = None
    chunk: int | None = None
    produced: int = field(default=0, init=False)
    computed: int = field(default=0, init=False)
    status: Status = field(default=Status.NEW, init=False)
    rank: tuple[float, int] = field(default=(0.0, 0), init=False)
    arrived: float = field(default=0.0, init=False)
    admitted: float | None = field(default=None, init=False)  # for the first time
    reserved: int = field(default=0, init=False)  # bytes
    reserved_tokens: int = field(default=0, init=False)
    preemptions: int = field(default=0, init=False)
    held: bool = field(default=False, init=False)

    @property
    def tokens(self) -> int:
        """Known tokens, of prompt and answer."""
        return self.prompt + self.produced

    @property
    def phase(self) -> Phase:
        return Phase.PREFILL if self.computed < self.prompt else Phase.DECODE

    @property
    def due(self) -> int:
        """Known tokens that may be computed in one piece; a piece has one phase."""
        if self.phase is Phase.DECODE:
            return self.tokens - self.computed
        left = self.prompt - self.computed
        return left if self.chunk is None else min(left, self.chunk)

    @property
    def generates(self) -> bool:
        """Whether the newest token alone is to be computed."""
        return self.phase is Phase.DECODE and self.due == 1


@dataclass(frozen=True)
class Piece:
    """`count` tokens of a task from position `begin` on, computed in one step."""

    task: Task
    begin: int
    count: int
    phase: Phase

    @property
    def reaches_end(self) -> bool:
        """Whether the next token can be sampled after it."""
        return self.begin + self.count == self.task.tokens


@dataclass(frozen=True)
class Batch:
    """One step: at most one piece of each task."""

    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Limits:
    """memory: bytes for all tasks. token_budget: tokens of one step. running: tasks at once. waiting: the longest line.

    headroom: tokens of an answer for which memory is reserved ahead; a longer answer asks again when it gets there.
    aging: seconds of waiting that make up for one level of priority.
    """

    memory: int
    token_budget: int = 512
    running: int = 32
    waiting: int = 256
    headroom: int = 1024
    aging: float = 60.0

    def __post_init__(self) -> None:
        for name in ("memory", "token_budget", "running", "waiting", "headroom"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}={getattr(self, name)} must be at least 1")
        if self.token_budget < self.running:
            raise ArgumentError(
                f"token_budget={self.token_budget} is less than running={self.running}: "
                "each running request gets a token in every step"
            )
        if not self.aging > 0:
            raise ArgumentError(f"aging={self.aging} must be positive")


class Scheduler:
    """See the module. Use: `add`, then again and again `schedule`, `commit`, and `finish` of what is done.

    on_admit: called when a task is admitted; returns how many of its tokens have keys and values already.
    on_preempt: called when a task gives way, to drop the keys and values it has.
    held: bytes that others hold of `Limits.memory` and can give back, and reclaim(n): asks them for n bytes.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        on_admit: Callable[[Task], int] = lambda task: 0,
        on_preempt: Callable[[Task], None] = lambda task: None,
        held: Callable[[], int] = lambda: 0,
        reclaim: Callable[[int], None] = lambda size: None,
    ) -> None:
        self.limits = limits
        self.waiting: list[Task] = []
        self.running: list[Task] = []
        self._on_admit, self._on_preempt = on_admit, on_preempt
        self._held, self._reclaim = held, reclaim
        self._added = 0

    @property
    def reserved(self) -> int:
        """Bytes that running tasks may come to hold without asking again."""
        return sum(task.reserved for task in self.running)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, task: Task, now: float) -> None:
        """Puts a new task into the line.

        Raises QueueFullError when the line is too long, RequestTooLargeError for a task that could never run to its
        end; both leave everything as it was.
        """
        need = task.size(task.prompt + task.most)
        if need > self.limits.memory:
            raise RequestTooLargeError(
                f"{task.prompt} tokens of prompt and {task.most} of answer need {need / 2**20:.1f} MiB of memory, and "
                f"{self.limits.memory / 2**20:.1f} MiB are there for all requests"
            )
        if len(self.waiting) >= self.limits.waiting:
            raise QueueFullError(f"{len(self.waiting)} requests are waiting already; try again later")
        self.enter(task, now)

    def enter(self, task: Task, now: float) -> None:
        """As `add`, for a task that belongs to one which was let in: it is not refused."""
        task.arrived = now
        task.rank = (now + task.priority * self.limits.aging, self._added)
        self._added += 1
        self._enqueue(task)

    def admit(self, task: Task, now: float) -> bool:
        """Lets a waiting task run at once, out of line, if nothing has to give way for it."""
        if len(self.running) >= self.limits.running or not self._fits(self._wanted(task)[1]):
            return False
        self.waiting.remove(task)
        self._start(task, now)
        return True

    def schedule(self, now: float) -> Batch:
        """The next step: who gives way, who is let in, who computes which tokens."""
        for task in sorted(self.running, key=_rank):
            if task.status is Status.RUNNING:
                self._grow(task)
        while len(self.running) < self.limits.running:
            head = next((task for task in self.waiting if not task.held), None)
            if head is None or not self._make_room(head):
                break
            self.waiting.remove(head)
            self._start(head, now)
        return Batch(tuple(self._pieces()))

    def commit(self, batch: Batch) -> None:
        """The step was computed. Tasks that were removed meanwhile stay removed."""
        for piece in batch.pieces:
            if piece.task.status is Status.RUNNING:
                piece.task.computed = piece.begin + piece.count

    def produced(self, task: Task) -> None:
        """A token was sampled."""
        assert task.produced < task.most
        task.produced += 1

    def finish(self, task: Task) -> None:
        """Takes a task out, wherever it is; done, cancelled or failed."""
        if task.status is Status.RUNNING:
            self.running.remove(task)
        elif task.status is Status.WAITING:
            self.waiting.remove(task)
        task.status, task.reserved, task.reserved_tokens = Status.DONE, 0, 0

    def expired(self, now: float) -> list[Task]:
        """Tasks whose time is over."""
        late = [task for task in self.running + self.waiting if task.deadline is not None and task.deadline <= now]
        return late + [
            task
            for task in self.waiting
            if task.start_by is not None and task.start_by <= now and task.admitted is None and task not in late
        ]

    def next_expiry(self) -> float | None:
        """When `expired` will next find something, if nothing else happens before."""
        times = [task.deadline for task in self.running + self.waiting if task.deadline is not None]
        times += [task.start_by for task in self.waiting if task.start_by is not None and task.admitted is None]
        return min(times, default=None)

    # --- memory -------------------------------------------------------------------------------------------------------

    def _wanted(self, task: Task) -> tuple[int, int]:
        """The tokens to reserve memory for, and the bytes."""
        tokens = min(task.prompt + task.most, task.tokens + self.limits.headroom)
        return tokens, task.size(tokens)

    def _fits(self, size: int) -> bool:
        """Whether there are so many bytes more; others that hold memory give it back for it."""
        lacking = self.reserved + self._held() + size - self.limits.memory
        if lacking > 0 and self.reserved + size <= self.limits.memory:
            self._reclaim(lacking)
            lacking = self.reserved + self._held() + size - self.limits.memory
        return lacking <= 0

    def _grow(self, task: Task) -> None:
        """Reserves memory for the next tokens of a running task, of the last in line if it must be."""
        if task.tokens <= task.reserved_tokens:
            return
        # As far ahead as there is room for; if there is none, just enough.
        tokens, size = self._wanted(task)
        if not self._fits(size - task.reserved):
            tokens = task.tokens
            size = task.size(tokens)
        while not self._fits(size - task.reserved):
            last = max(self.running, key=_rank)
            self._preempt(last)
            if last is task:
                return
        task.reserved, task.reserved_tokens = size, tokens

    def _make_room(self, task: Task) -> bool:
        """Whether a waiting task has its memory; running tasks of lower priority behind it in line give way."""
        size = self._wanted(task)[1]
        if self._fits(size):
            return True
        behind = [other for other in self.running if other.priority > task.priority and other.rank > task.rank]
        behind.sort(key=_rank, reverse=True)
        if self.reserved - sum(other.reserved for other in behind) + size > self.limits.memory:
            return False
        for other in behind:
            self._preempt(other)
            if self._fits(size):
                return True
        return False

    def _preempt(self, task: Task) -> None:
        self.running.remove(task)
        task.computed = task.reserved = task.reserved_tokens = 0
        task.preemptions += 1
        self._on_preempt(task)
        self._enqueue(task)

    def _enqueue(self, task: Task) -> None:
        task.status = Status.WAITING
        bisect.insort(self.waiting, task, key=_rank)

    def _start(self, task: Task, now: float) -> None:
        task.reserved_tokens, task.reserved = self._wanted(task)
        task.status = Status.RUNNING
        task.admitted = now if task.admitted is None else task.admitted
        self.running.append(task)
        known = self._on_admit(task)
        assert 0 <= known < task.tokens
        task.computed = known

    # --- tokens -------------------------------------------------------------------------------------------------------

    def _pieces(self) -> Iterator[Piece]:
        line = sorted((task for task in self.running if not task.held), key=_rank)
        generating = [task for task in line if task.generates]
        reading = [task for task in line if not task.generates]
        for task in generating:
            yield Piece(task, task.computed, 1, Phase.DECODE)
        shares = share([task.due for task in reading], self.limits.token_budget - len(generating))
        for task, count in zip(reading, shares, strict=True):
            if count:
                yield Piece(task, task.computed, count, task.phase)


def share(due: list[int], room: int) -> list[int]:
    """How many of `room` tokens each gets, of the many that are due to it: at least half for the first, the rest by
    who is done soonest, and what nobody else needs for the first again.
    """
    if not due:
        return []
    shares = [0] * len(due)
    shares[0] = min(due[0], room - room // 2)
    left = room - shares[0]
    for i in sorted(range(1, len(due)), key=lambda i: due[i]):
        shares[i] = min(due[i], left)
        left -= shares[i]
    shares[0] += min(due[0] - shares[0], left)
    return shares


def _rank(task: Task) -> tuple[float, int]:
    return task.rank
