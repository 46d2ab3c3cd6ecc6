"""The order in which a device and the host do the parts of a layer's step, said once.

A layer asks on the device, the host answers, and the device finishes; what travels is small. Placements differ in what
is asked: the paper's sends queries down and gets attention over the sample up, the other one sends the ids of a sample
and gets rows. While the host answers, the device attends over the window, and works for other micro-batches: a schedule
yields where it would wait. The same schedule runs a step, and, on a device that is simulated, foretells it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from magicpig.placement.device import Buffer, Device

T = TypeVar("T")


class Slot(NamedTuple):
    """The buffers of one round trip: what is asked and what is answered, on the device and in pinned memory."""

    asked: Buffer
    question: Buffer
    answer: Buffer
    answered: Buffer


class Trip(Protocol):
    """What a placement does in a layer. Each gets the tensors of its buffers through the slot that it was made for."""

    @property
    def ask_name(self) -> str: ...
    @property
    def answer_name(self) -> str: ...

    def tell(self) -> None:
        """On the device: what the host needs to know where it is asked nothing."""
        ...

    def ask(self) -> None:
        """On the device: what the host needs to know to answer."""
        ...

    def meanwhile(self) -> None:
        """On the device: what does not depend on the answer."""
        ...

    def answer(self) -> None:
        """On the host."""
        ...

    def finish(self) -> None:
        """On the device."""
        ...


def round_trip(device: Device, slot: Slot, trip: Trip, label: str = "") -> Iterator[None]:
    """One layer of one micro-batch. Yields once, where the host would wait, and never behind its own work: what the
    next layer is given to do has to be on its way while the host answers others.
    """
    device.launch("compute", f"{trip.ask_name}{label}", trip.ask, writes=[slot.asked])
    device.wait("down", device.record("compute"))
    device.copy("down", slot.asked, slot.question)
    down = device.record("down")
    device.launch("compute", f"window{label}", trip.meanwhile)
    yield
    device.finish(down)
    device.host(f"{trip.answer_name}{label}", trip.answer, reads=[slot.question], writes=[slot.answer])
    device.copy("up", slot.answer, slot.answered)
    device.wait("compute", device.record("up"))
    device.launch("compute", f"merge{label}", trip.finish, reads=[slot.answered])


def one_way(device: Device, asked: Buffer, question: Buffer, trip: Trip, label: str = "") -> Iterator[None]:
    """As `round_trip` where the device needs no answer: the host is told, the device goes on by itself."""
    device.launch("compute", f"tell{label}", trip.tell, writes=[asked])
    device.wait("down", device.record("compute"))
    device.copy("down", asked, question)
    down = device.record("down")
    device.launch("compute", f"window{label}", trip.meanwhile)
    device.launch("compute", f"merge{label}", trip.finish)
    yield
    device.finish(down)
    device.host(f"{trip.answer_name}{label}", trip.answer, reads=[question])


def by_turns(parts: Sequence[Iterator[T]], pass_on: Callable[[], None] = lambda: None) -> None:
    """Runs micro-batches to their ends, each up to where it yields, then the next. pass_on: is called once all have
    yielded, before the host waits for the first.
    """
    left = list(parts)
    while left:
        left = [part for part in left if next(part, _END) is not _END]
        if left:
            pass_on()


_END: Any = object()


class Turns:
    """The same for calls that cannot yield, such as the forward pass of a model: each has a thread, and one runs.

    Where the call would wait it says `Turns.pass_on()`; outside of turns that does nothing.
    """

    _own = threading.local()

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: list[int] = []

    @classmethod
    def pass_on(cls) -> None:
        """Lets the other calls go on first."""
        turn = getattr(cls._own, "turn", None)
        if turn is not None:
            turns, number = turn
            turns._pass(number)

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """What the calls return. If one raises, the others still come to their ends, and then the first error does."""
        results: list[Any] = [None] * len(calls)
        errors: list[BaseException | None] = [None] * len(calls)
        self._waiting = list(range(len(calls)))

        def one(number: int) -> None:
            Turns._own.turn = (self, number)
            with self._condition:
                self._condition.wait_for(lambda: self._waiting[0] == number)
            try:
                results[number] = calls[number]()
            except BaseException as error:
                errors[number] = error
            finally:
                with self._condition:
                    self._waiting.remove(number)
                    self._condition.notify_all()

        threads = [threading.Thread(target=one, args=(number,)) for number in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        failed = next((error for error in errors if error is not None), None)
        if failed is not None:
            raise failed
        return results

    def _pass(self, number: int) -> None:
        with self._condition:
            self._waiting.remove(number)
            self._waiting.append(number)
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._waiting[0] == number)
