"""The scheduler on a simulated clock: nothing starves, no token is lost or computed twice, memory is never exceeded."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magicpig.engine.errors import QueueFullError, RequestTooLargeError
from magicpig.engine.scheduler import Limits, Phase, Scheduler, Status, Task, share
from magicpig.errors import ArgumentError

BYTES = 10  # of a token


def linear(tokens: int) -> int:
    return BYTES * tokens


def task(prompt: int, most: int, **options: Any) -> Task:
    return Task(prompt=prompt, most=most, size=linear, **options)


class Machine:
    """Computes what the scheduler says, and checks it: which tokens of each task have keys and values."""

    def __init__(self, limits: Limits, *, cached: Callable[[Task], int] = lambda task: 0) -> None:
        self.held: dict[Task, int] = {}
        self.kept = 0  # bytes of a cache that can be given back
        self.cached = cached
        self.scheduler = Scheduler(
            limits, on_admit=self.admit, on_preempt=self.held.pop, held=lambda: self.kept, reclaim=self.reclaim
        )
        self.now = 0.0
        self.steps = self.computed = 0

    def admit(self, task: Task) -> int:
        assert task not in self.held
        self.held[task] = self.cached(task)
        return self.held[task]

    def reclaim(self, size: int) -> None:
        self.kept = max(0, self.kept - size)

    def step(self) -> list[Task]:
        """One step; returns the tasks that got a token."""
        scheduler, limits = self.scheduler, self.scheduler.limits
        batch = scheduler.schedule(self.now)
        assert scheduler.reserved + self.kept <= limits.memory
        assert len(scheduler.running) <= limits.running
        assert sum(piece.count for piece in batch.pieces) <= limits.token_budget
        assert len({piece.task for piece in batch.pieces}) == len(batch.pieces)
        got = []
        for piece in batch.pieces:
            assert piece.task.status is Status.RUNNING
            assert piece.count >= 1
            assert piece.begin == self.held[piece.task], "a token is lost, or computed twice"
            assert (piece.begin + piece.count <= piece.task.prompt) == (piece.phase is Phase.PREFILL)
            assert piece.phase is Phase.DECODE or piece.count <= (piece.task.chunk or piece.count)
            self.held[piece.task] += piece.count
            self.computed += piece.count
            assert linear(self.held[piece.task]) <= piece.task.reserved
            if piece.reaches_end:
                got.append(piece.task)
        scheduler.commit(batch)
        for one in got:
            if one.produced < one.most:
                scheduler.produced(one)
            if one.produced == one.most:
                scheduler.finish(one)
                del self.held[one]
        self.now += 1.0
        self.steps += 1
        return got

    def run(self, most: int = 10_000) -> None:
        while not self.scheduler.idle:
            assert self.steps < most, "no end in sight"
            self.step()


def test_a_long_prompt_does_not_stall_who_generates_nor_short_prompts():
    machine = Machine(Limits(memory=10**9, token_budget=64, running=4))
    talking, long, short = task(10, 100), task(10_000, 5), task(20, 5)
    machine.scheduler.add(talking, 0.0)
    machine.step()
    machine.scheduler.add(long, 1.0)
    machine.scheduler.add(short, 2.0)
    got = [machine.step() for _ in range(3)]
    assert all(talking in now for now in got), "a token in every step"
    assert short in got[0], "the short prompt needs what the first leaves"
    before = long.computed
    machine.step()
    assert long.computed - before >= 62 - 1, "what nobody else needs is for the long one"


def test_memory_is_reserved_for_the_answer_and_the_head_of_the_line_is_not_overtaken():
    machine = Machine(Limits(memory=BYTES * 100))
    first, large, small = task(40, 20), task(60, 30), task(5, 5)
    for one in (first, large, small):
        machine.scheduler.add(one, 0.0)
    machine.step()
    assert [one.status for one in (first, large, small)] == [Status.RUNNING, Status.WAITING, Status.WAITING]
    machine.run()
    assert first.preemptions == large.preemptions == small.preemptions == 0


def test_without_headroom_the_last_in_line_gives_way_and_loses_nothing():
    machine = Machine(Limits(memory=BYTES * 100, headroom=1))
    tasks = [task(20, 60) for _ in range(4)]
    for one in tasks:
        machine.scheduler.add(one, 0.0)
    machine.run()
    assert tasks[0].preemptions == 0
    assert sum(one.preemptions for one in tasks) > 0
    assert all(one.status is Status.DONE and one.produced == 60 for one in tasks)


def test_higher_priority_takes_memory_from_lower():
    machine = Machine(Limits(memory=BYTES * 100))
    low = task(50, 40, priority=1)
    machine.scheduler.add(low, 0.0)
    machine.step()
    high = task(50, 20)
    machine.scheduler.add(high, machine.now)
    machine.step()
    assert (low.status, high.status, low.preemptions) == (Status.WAITING, Status.RUNNING, 1)
    machine.run()
    assert low.produced == 40


def test_waiting_makes_up_for_priority():
    limits = Limits(memory=BYTES * 50, aging=10.0)
    machine = Machine(limits)
    low = task(30, 5, priority=1)
    machine.scheduler.add(task(40, 5), 0.0)
    machine.step()
    machine.scheduler.add(low, 1.0)
    # One urgent request after another would keep it waiting for ever.
    while low.status is Status.WAITING:
        assert machine.now < 60
        machine.scheduler.add(task(30, 5), machine.now)
        machine.step()
    assert machine.now > 10


def test_equal_priority_is_not_preempted_for_newcomers():
    machine = Machine(Limits(memory=BYTES * 100))
    first = task(50, 30)
    machine.scheduler.add(first, 0.0)
    machine.step()
    machine.scheduler.add(task(50, 30), 1.0)
    machine.step()
    assert first.status is Status.RUNNING
    assert machine.scheduler.waiting


def test_a_cache_gives_back_what_requests_need():
    machine = Machine(Limits(memory=BYTES * 100))
    machine.kept = BYTES * 90
    machine.scheduler.add(task(40, 10), 0.0)
    machine.step()
    assert machine.kept == BYTES * 50
    assert len(machine.scheduler.running) == 1


def test_cached_tokens_are_not_computed_again():
    machine = Machine(Limits(memory=BYTES * 1000, token_budget=50), cached=lambda task: task.prompt - 1)
    one = task(300, 1)
    machine.scheduler.add(one, 0.0)
    assert machine.step() == [one]


def test_queue_limit_and_requests_that_never_fit():
    scheduler = Scheduler(Limits(memory=BYTES * 100, waiting=2))
    with pytest.raises(RequestTooLargeError, match="90 tokens of prompt and 11 of answer need"):
        scheduler.add(task(90, 11), 0.0)
    scheduler.add(task(90, 10), 0.0)
    scheduler.add(task(1, 1), 0.0)
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        scheduler.add(task(1, 1), 0.0)
    assert len(scheduler.waiting) == 2


@pytest.mark.parametrize(
    ("prompt", "most", "headroom", "slowest"),
    [(400, 200, 1024, 2.0), (2000, 20, 1024, 2.0), (5, 500, 1024, 2.0), (400, 800, 50, 4.0)],
    ids=["both", "prompts", "answers", "answers that outgrow what was reserved for them"],
)
@pytest.mark.parametrize("waiting", [256, 8], ids=["queue", "refuse"])
def test_under_four_times_the_load_those_let_in_take_at_most_twice_as_long(prompt, most, headroom, slowest, waiting):
    room = 8

    def seconds(clients: int) -> list[float]:
        """From when each is let in to its end; a step takes a second, and a hundredth more for each token."""
        limits = Limits(BYTES * room * (prompt + most), headroom=headroom, waiting=waiting)
        machine, let_in, ends = Machine(limits), [], {}
        for _ in range(clients):
            try:
                machine.scheduler.add(one := task(prompt, most), 0.0)
                let_in.append(one)
            except QueueFullError:
                assert len(machine.scheduler.waiting) == waiting
        while not machine.scheduler.idle:
            before = machine.computed
            machine.step()
            machine.now += 0.01 * (machine.computed - before)
            ends |= {one: machine.now for one in let_in if one.status is Status.DONE and one not in ends}
        return [ends[one] - one.admitted for one in let_in]

    alone, crowded = seconds(room), seconds(4 * room)
    assert len(crowded) == (4 * room if waiting > room else room)
    assert statistics.median(crowded) <= 2 * statistics.median(alone)
    assert max(crowded) <= slowest * max(alone)


def test_time_is_over_in_the_queue_and_at_work():
    scheduler = Scheduler(Limits(memory=BYTES * 100))
    running, waiting = task(50, 40, deadline=9.0), task(50, 40, start_by=5.0)
    scheduler.add(running, 0.0)
    scheduler.add(waiting, 0.0)
    scheduler.schedule(0.0)
    assert scheduler.next_expiry() == 5.0
    assert scheduler.expired(4.9) == []
    assert scheduler.expired(5.0) == [waiting]
    assert scheduler.expired(9.0) == [running, waiting]
    scheduler.finish(waiting)
    scheduler.finish(running)
    assert scheduler.idle
    assert scheduler.next_expiry() is None


def test_admit_out_of_line_only_into_free_room():
    scheduler = Scheduler(Limits(memory=BYTES * 100, running=2))
    first, second, third = task(40, 5), task(40, 5), task(4, 5)
    scheduler.add(first, 0.0)
    scheduler.schedule(0.0)
    for one in (second, third):
        scheduler.enter(one, 0.0)
    assert scheduler.admit(second, 1.0)
    assert not scheduler.admit(third, 1.0), "two run already"
    assert (second.status, second.admitted, third.status) == (Status.RUNNING, 1.0, Status.WAITING)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": 0}, "memory=0"),
        ({"token_budget": 3, "running": 4}, "token_budget=3 is less than running=4"),
        ({"aging": 0.0}, "aging=0.0"),
    ],
)
def test_limits_are_checked(settings, message):
    with pytest.raises(ArgumentError, match=message):
        Limits(**{"memory": 1, **settings})


@given(st.lists(st.integers(1, 1000), max_size=9), st.integers(0, 1000))
def test_share_gives_away_what_there_is(due, room):
    shares = share(due, room)
    assert all(0 <= got <= wanted for got, wanted in zip(shares, due, strict=True))
    assert sum(shares) == min(sum(due), room)
    assert not due or shares[0] >= min(due[0], (room + 1) // 2)


ARRIVAL = st.tuples(
    st.integers(0, 40),  # when
    st.integers(1, 60),  # prompt
    st.integers(0, 40),  # answer
    st.integers(0, 2),  # priority
    st.sampled_from([None, 1, 7]),  # chunk
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(ARRIVAL, min_size=1, max_size=14),
    st.integers(100, 250),
    st.integers(1, 8),
    st.integers(1, 30),
    st.integers(0, 2**32),
)
def test_whatever_comes_all_is_done_within_bounds(arrivals, tokens, running, headroom, seed):
    chance = random.Random(seed)
    limits = Limits(memory=BYTES * tokens, token_budget=running + 8, running=running, headroom=headroom, aging=20.0)
    machine = Machine(limits, cached=lambda one: chance.randrange(one.tokens) if chance.random() < 0.3 else 0)
    machine.kept = BYTES * 50
    line = sorted(arrivals, key=lambda arrival: arrival[0])
    tasks, cancelled = [], set()
    while line or not machine.scheduler.idle:
        while line and line[0][0] <= machine.now:
            _, prompt, most, priority, chunk = line.pop(0)
            tasks.append(task(prompt, most, priority=priority, chunk=chunk))
            machine.scheduler.add(tasks[-1], machine.now)
        if tasks and chance.random() < 0.05:
            gone = chance.choice(tasks)
            machine.scheduler.finish(gone)
            machine.held.pop(gone, None)
            cancelled.add(gone)
        machine.step()
        # Alone, one after the other, each would need fewer steps than this.
        assert machine.now < 41 + sum(60 + 2 * most for _, _, most, _, _ in arrivals) * (len(arrivals) + 1)
    assert all(one.produced == one.most or one in cancelled for one in tasks)
    assert machine.held == {}


def test_a_task_that_is_held_is_passed_and_keeps_its_place():
    scheduler = Scheduler(Limits(memory=linear(1000), running=2, token_budget=64))
    first, second, third = (task(20, 4) for _ in range(3))
    for i, one in enumerate((first, second, third)):
        scheduler.add(one, float(i))
    first.held = True
    assert [piece.task for piece in scheduler.schedule(3.0).pieces] == [second, third]
    first.held, second.held = False, True
    batch = scheduler.schedule(4.0)
    assert [piece.task for piece in batch.pieces] == [third], "nobody ends, so the first waits; the second stands still"
    scheduler.finish(third)
    assert [piece.task for piece in scheduler.schedule(5.0).pieces] == [first]
    second.held = False
    assert [piece.task for piece in scheduler.schedule(6.0).pieces] == [first, second]
    for one in (first, second):
        scheduler.finish(one)
    alone = task(20, 4)
    alone.held = True
    scheduler.add(alone, 7.0)
    assert scheduler.schedule(8.0).pieces == ()
    assert not scheduler.idle
