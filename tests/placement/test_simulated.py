"""The schedule of a step on a device that checks every use of a buffer, and whose clocks can be added up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from magicpig.errors import ArgumentError
from magicpig.placement.device import Buffer, Cuda, DeviceError, Ring, check_cuda
from magicpig.placement.schedule import Slot, Turns, by_turns, round_trip
from magicpig.placement.simulated import RaceError, Simulated

SIZE = 64
COSTS = {"dense": 5.0, "ask": 1.0, "window": 2.0, "sample": 30.0, "merge": 1.0}
LAYERS = 4


def slot_on(device: Any, name: str = "") -> Slot:
    made = {
        n: device.buffer(f"{n}{name}", [SIZE], torch.float32, pinned=n in ("question", "answer")) for n in Slot._fields
    }
    return Slot(**made)


class Doubling:
    """Asks for a number, gets it doubled, and remembers what came."""

    ask_name, answer_name = "ask", "sample"

    def __init__(self, slot: Slot) -> None:
        self.slot, self.value, self.came = slot, 0.0, []

    def ask(self) -> None:
        self.value += 1
        self.slot.asked.tensor.fill_(self.value)

    def meanwhile(self) -> None: ...

    def answer(self) -> None:
        self.slot.answer.tensor.copy_(2 * self.slot.question.tensor)

    def finish(self) -> None:
        self.came.append(float(self.slot.answered.tensor[0]))


def layers(device: Any, trip: Doubling, name: str = "") -> Iterator[Any]:
    for _ in range(LAYERS):
        device.launch("compute", f"dense{name}", lambda: None)
        yield from round_trip(device, trip.slot, trip, name)


def step(device: Any, micro_batches: int) -> list[Doubling]:
    trips = [Doubling(slot_on(device, f" {i}")) for i in range(micro_batches)]
    by_turns([layers(device, trip, f" {i}") for i, trip in enumerate(trips)])
    return trips


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2, 3])
def test_what_was_asked_is_answered(micro_batches: int) -> None:
    for trip in step(Simulated(COSTS), micro_batches):
        assert trip.came == [2.0, 4.0, 6.0, 8.0]


def test_one_micro_batch_takes_the_sum_of_its_parts() -> None:
    rate = 256.0  # bytes a second: a copy takes a second
    device = Simulated(COSTS, down=rate, up=rate)
    step(device, 1)
    # The window is attended to while the question travels and the host answers.
    layer = COSTS["dense"] + COSTS["ask"] + 1 + COSTS["sample"] + 1 + COSTS["merge"]
    assert device.elapsed == LAYERS * layer
    assert device.busy("host") == LAYERS * COSTS["sample"]
    assert device.idle("host") == LAYERS * (layer - COSTS["sample"])
    assert device.busy("compute") == LAYERS * (5 + 1 + 2 + 1)


def test_with_two_micro_batches_a_slow_host_never_waits() -> None:
    device = Simulated(COSTS, down=256.0, up=256.0)
    step(device, 2)
    filled, emptied = 5 + 1 + 1, 1 + 1  # until the first question came, and after the last answer
    assert device.elapsed == filled + 2 * LAYERS * COSTS["sample"] + emptied
    assert device.idle("host", filled, device.elapsed - emptied) == 0.0


def test_with_two_micro_batches_a_slow_device_never_waits() -> None:
    device = Simulated(COSTS | {"dense": 100.0}, down=256.0, up=256.0)
    step(device, 2)
    # After the last layer of the second micro-batch nothing is left to do meanwhile.
    tail = 1 + COSTS["sample"] + 1 + COSTS["merge"]
    assert device.idle("compute", 0.0, device.elapsed - tail) == 0.0
    assert device.busy("compute") == 2 * LAYERS * (100 + 1 + 2 + 1)
    one = Simulated(COSTS | {"dense": 100.0}, down=256.0, up=256.0)
    step(one, 1)
    assert device.elapsed < 2 * one.elapsed - LAYERS * COSTS["sample"]


def test_the_timeline_can_be_seen() -> None:
    device = Simulated(COSTS, down=256.0, up=256.0)
    step(device, 2)
    picture = device.picture(width=60)
    lines = dict(line.strip().split(" |") for line in picture.splitlines()[:4])
    assert list(lines) == ["compute", "down", "host", "up"]
    assert {len(line) for line in lines.values()} == {61}
    # The host's line has dots only where it fills and empties.
    assert "." not in lines["host"].strip(".|")
    assert lines["compute"].count(".") > 30
    assert "d dense" in picture
    assert "s sample" in picture
    assert "c copy" in picture


# --- order ------------------------------------------------------------------------------------------------------------


class Forgetful(Simulated):
    """Forgets one of its three kinds of events."""

    def __init__(self, forgotten: str) -> None:
        super().__init__()
        self.forgotten = forgotten

    def wait(self, stream: Any, event: Any) -> None:
        if stream != self.forgotten:
            super().wait(stream, event)

    def finish(self, event: Any) -> None:
        if self.forgotten != "host":
            super().finish(event)


@pytest.mark.parametrize(
    ("forgotten", "cause"),
    [
        ("down", r"asked 0 -> question 0 \(down\) uses asked 0, but nothing says that ask 0 \(compute\)"),
        ("host", r"sample 0 \(host\) uses question 0, but nothing says that asked 0 -> question 0 \(down\)"),
        ("compute", r"merge 0 \(compute\) uses answered 0, but nothing says that answer 0 -> answered 0 \(up\)"),
    ],
)
def test_a_missing_event_is_caught_whatever_the_clocks_say(forgotten: str, cause: str) -> None:
    with pytest.raises(RaceError, match=cause):
        step(Forgetful(forgotten), 1)


def test_a_buffer_that_two_micro_batches_share_is_caught() -> None:
    device = Simulated(COSTS)
    slot = slot_on(device)
    with pytest.raises(RaceError, match="uses asked, but nothing says that asked -> question"):
        by_turns([layers(device, Doubling(slot)) for _ in range(2)])


def test_reads_of_nothing_and_lost_copies_are_caught() -> None:
    device = Simulated()
    slot = slot_on(device)
    with pytest.raises(RaceError, match="question reads asked, into which nothing was written"):
        device.copy("down", slot.asked, slot.question)
    for _ in range(2):
        device.host("fill", lambda: None, writes=[slot.answer])
        if slot.answered.notes.written is None:
            device.copy("up", slot.answer, slot.answered)
            device.finish(device.record("up"))
    with pytest.raises(RaceError, match="what answer -> answered copied there was lost"):
        device.copy("up", slot.answer, slot.answered)


def test_the_host_may_not_touch_the_devices_memory() -> None:
    device = Simulated()
    slot = slot_on(device)
    with pytest.raises(RaceError, match="sample on the host uses asked, which is memory of the device"):
        device.host("sample", lambda: None, reads=[slot.asked])
    with pytest.raises(DeviceError, match="is no copy between a device and the host"):
        device.copy("down", slot.asked, slot.answered)
    other = device.buffer("other", [SIZE + 1], torch.float32, pinned=True)
    with pytest.raises(DeviceError, match="differ in shape or dtype"):
        device.copy("down", slot.asked, other)


# --- a ring of buffers ------------------------------------------------------------------------------------------------


def ring_of(device: Simulated, slots: int) -> Ring:
    def make(slot: int) -> list[Buffer]:
        return [
            device.buffer(f"{name} {slot}", [SIZE], torch.float32, pinned=name == "above")
            for name in ("above", "below")
        ]

    return Ring(device, slots, make)


def send(device: Simulated, ring: Ring) -> tuple[Buffer, Buffer]:
    slot, (above, below) = ring.take()
    device.host("fill", lambda: above.tensor.fill_(1.0), writes=[above])
    device.copy("up", above, below)
    device.wait("compute", device.record("up"))
    device.launch("compute", "use", lambda: None, reads=[below])
    ring.give(slot, device.record("compute"))
    return above, below


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_who_is_too_fast_waits_for_a_free_buffer(slots: int) -> None:
    device = Simulated({"fill": 1.0, "use": 10.0})
    ring = ring_of(device, slots)
    for _ in range(8):
        send(device, ring)
    fills = [span for span in device.spans if span.what == "fill"]
    uses = [span for span in device.spans if span.what == "use"]
    for i in range(slots, 8):
        assert fills[i].begin >= uses[i - slots].end  # never more than `slots` are on their way
    if slots > 1:
        assert device.idle("compute", uses[0].begin) == 0.0  # and yet the device never waits


def test_buffers_that_were_given_back_may_not_be_used() -> None:
    device = Simulated()
    ring = ring_of(device, 2)
    above, below = send(device, ring)
    with pytest.raises(RaceError, match="late uses below 0, which was given back"):
        device.launch("compute", "late", lambda: None, reads=[below])
    with pytest.raises(RaceError, match="late uses above 0, which was given back"):
        device.host("late", lambda: None, writes=[above])


def test_buffers_that_are_never_given_back_are_noticed() -> None:
    ring = ring_of(Simulated(), 2)
    ring.take()
    ring.take()
    with pytest.raises(DeviceError, match="buffers 0 of 2 are taken and were never given back"):
        ring.take()
    with pytest.raises(ArgumentError, match="slots=0"):
        ring_of(Simulated(), 0)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_request_that_ends_in_flight_leaves_the_others_alone() -> None:
    device = Simulated(COSTS)
    ring = Ring(device, 2, lambda i: list(slot_on(device, f" {i}")))
    taken, first = ring.take()
    other, second = ring.take()
    cancelled, kept = Doubling(Slot(*first)), Doubling(Slot(*second))
    parts = layers(device, cancelled), layers(device, kept)
    next(parts[0])
    next(parts[1])
    parts[0].close()  # its question is on its way down
    ring.give(taken, device.record("down"))
    by_turns([parts[1]])
    assert kept.came == [2.0, 4.0, 6.0, 8.0]
    assert cancelled.came == []
    ring.give(other, device.record("compute"))
    _, again = ring.take()
    late = Doubling(Slot(*again))
    with pytest.raises(RaceError, match="copied there was lost"):  # nobody read the question: nobody should forget it
        by_turns([layers(device, late)])


def test_an_error_of_the_device_comes_where_the_host_waits_for_it() -> None:
    device = Simulated(COSTS, fail=["ask 1"])
    trips = [Doubling(slot_on(device, f" {i}")) for i in range(2)]
    parts = [layers(device, trip, f" {i}") for i, trip in enumerate(trips)]
    next(parts[0])
    next(parts[1])  # was given the work that fails, and does not know yet
    next(parts[0])
    with pytest.raises(DeviceError, match="ask 1 failed on the device"):
        next(parts[1])
    assert trips[1].came == []


# --- turns of threads -------------------------------------------------------------------------------------------------


def test_turns_are_taken_in_order_and_one_at_a_time() -> None:
    seen: list[str] = []
    running = threading.Semaphore(1)

    def call(name: str, rounds: int) -> str:
        for i in range(rounds):
            assert running.acquire(blocking=False)
            seen.append(f"{name}{i}")
            running.release()
            Turns.pass_on()
        return name

    assert Turns().run([lambda: call("a", 3), lambda: call("b", 2), lambda: call("c", 1)]) == ["a", "b", "c"]
    assert seen == ["a0", "b0", "c0", "a1", "b1", "a2"]
    Turns.pass_on()  # outside of turns nothing happens


def test_an_error_in_turns_comes_when_all_are_done() -> None:
    done = []

    def fails() -> None:
        Turns.pass_on()
        raise ArgumentError("x=1 is wrong")

    def works() -> None:
        for _ in range(3):
            Turns.pass_on()
        done.append(1)

    with pytest.raises(ArgumentError, match="x=1"):
        Turns().run([fails, works])
    assert done == [1]


# --- CUDA that is not there -------------------------------------------------------------------------------------------


def test_cuda_that_is_not_there_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match=r"device=cuda:0, but torch .* finds no CUDA: .*; allowed here: cpu"):
        Cuda()
    with pytest.raises(ArgumentError, match="--device=gpu is not a device; allowed: cpu, cuda, cuda:0"):
        check_cuda("gpu", "--device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_cuda("cuda:1", "device")
    with pytest.raises(ArgumentError, match="device=cuda:2, but there are 2 GPUs; allowed: cuda:0 to cuda:1"):
        check_cuda("cuda:2", "device")
