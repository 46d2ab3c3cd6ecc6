"""What a placement asks of an accelerator: streams, events, buffers, copies between it and the host.

`Cuda` is the real one; simulated.py has one that runs on the processor, with clocks of its own, and that fails on any
use of a buffer before it is ready. Work of one stream is done in order; between streams, and between a stream and the
host, there is an order only where an event says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from magicpig.errors import ArgumentError, MagicPigError

T = TypeVar("T")
StreamName = Literal["compute", "down", "up"]
"""The device's work; copies from it to the host; copies from the host to it. They run beside each other."""
STREAMS: tuple[StreamName, ...] = get_args(StreamName)


class DeviceError(MagicPigError, RuntimeError):
    """An accelerator, or what was asked of it, has failed."""

    code = "device"


@dataclass(eq=False)
class Buffer:
    """Memory that both sides may use by turns: of the device, or pinned memory of the host. notes: of a device."""

    name: str
    tensor: Tensor
    pinned: bool
    held: bool = True
    notes: Any = field(default=None, repr=False)


class Device(Protocol):
    """One accelerator. Nothing but `finish` and `host` waits; errors of work may come later, from either.

    torch_device: where its tensors are.
    """

    name: str
    torch_device: torch.device

    def free_memory(self) -> int:
        """Bytes that it has left."""
        ...

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype, *, pinned: bool = False) -> Buffer:
        """Memory without content."""
        ...

    def launch(
        self,
        stream: StreamName,
        what: str,
        work: Callable[[], T],
        *,
        reads: Sequence[Buffer] = (),
        writes: Sequence[Buffer] = (),
    ) -> T:
        """Work for a stream. What it returns may be used where its buffers may."""
        ...

    def copy(self, stream: StreamName, source: Buffer, target: Buffer) -> None:
        """The content of one buffer for another of its shape, one of them pinned."""
        ...

    def record(self, stream: StreamName) -> Any:
        """An event: what the stream was given so far is done."""
        ...

    def wait(self, stream: StreamName, event: Any) -> None:
        """Lets a stream go on after an event."""
        ...

    def finish(self, event: Any) -> None:
        """Lets the host go on after an event. Raises DeviceError if something failed before it."""
        ...

    def host(
        self, what: str, work: Callable[[], T], *, reads: Sequence[Buffer] = (), writes: Sequence[Buffer] = ()
    ) -> T:
        """Work of the host's own, now."""
        ...


class Cuda:
    """A GPU of CUDA. index: which one. Raises ArgumentError, see `check_cuda`."""

    def __init__(self, index: int = 0) -> None:
        check_cuda(f"cuda:{index}", "device")
        self.torch_device = torch.device("cuda", index)
        self.name = torch.cuda.get_device_name(self.torch_device)
        self._streams = {
            name: torch.cuda.current_stream(self.torch_device) if name == "compute" else torch.cuda.Stream(index)
            for name in STREAMS
        }

    def free_memory(self) -> int:
        here = self.torch_device
        unused = torch.cuda.memory_reserved(here) - torch.cuda.memory_allocated(here)  # that torch keeps for itself
        return int(torch.cuda.mem_get_info(here)[0]) + unused

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype, *, pinned: bool = False) -> Buffer:
        if pinned:
            return Buffer(name, torch.empty(*shape, dtype=dtype, device="cpu", pin_memory=True), True)
        return Buffer(name, torch.empty(*shape, dtype=dtype, device=self.torch_device), False)

    def launch(
        self,
        stream: StreamName,
        what: str,
        work: Callable[[], T],
        *,
        reads: Sequence[Buffer] = (),
        writes: Sequence[Buffer] = (),
    ) -> T:
        with _errors(what), torch.cuda.stream(self._streams[stream]):
            return work()

    def copy(self, stream: StreamName, source: Buffer, target: Buffer) -> None:
        with _errors(f"{source.name} -> {target.name}"), torch.cuda.stream(self._streams[stream]):
            target.tensor.copy_(source.tensor, non_blocking=True)

    def record(self, stream: StreamName) -> Any:
        return self._streams[stream].record_event()

    def wait(self, stream: StreamName, event: Any) -> None:
        self._streams[stream].wait_event(event)

    def finish(self, event: Any) -> None:
        with _errors("waiting"):
            event.synchronize()

    def host(
        self, what: str, work: Callable[[], T], *, reads: Sequence[Buffer] = (), writes: Sequence[Buffer] = ()
    ) -> T:
        return work()


@contextmanager
def _errors(what: str) -> Iterator[None]:
    try:
        yield
    except torch.AcceleratorError as error:
        raise DeviceError(f"{what} failed on the device: {error}") from error


def check_cuda(value: str, parameter: str) -> None:
    """Raises ArgumentError where CUDA is asked for and there is none, or not that many GPUs."""
    name, _, number = value.partition(":")
    if name != "cuda" or (number and not number.isdecimal()):
        raise ArgumentError(f"{parameter}={value} is not a device; allowed: cpu, cuda, cuda:0, cuda:1 and so on")
    if not torch.cuda.is_available():
        built = "there is no GPU that it can use" if torch.version.cuda else "its build has no CUDA"
        raise ArgumentError(
            f"{parameter}={value}, but torch {torch.__version__} finds no CUDA: {built}; allowed here: cpu"
        )
    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        raise ArgumentError(f"{parameter}={value}, but there are {count} GPUs; allowed: cuda:0 to cuda:{count - 1}")


class Ring:
    """A few sets of buffers that are used by turns. Whoever wants the next one waits until it is free.

    make: makes a set, called when it is first needed.
    """

    def __init__(self, device: Device, slots: int, make: Callable[[int], Sequence[Buffer]]) -> None:
        if slots < 1:
            raise ArgumentError(f"slots={slots} must be at least 1")
        self._device, self._make = device, make
        self._sets: list[Sequence[Buffer]] = []
        self._busy: list[Any] = [None] * slots
        self._next = 0

    def take(self) -> tuple[int, Sequence[Buffer]]:
        """The number of a set, and its buffers, free to be written."""
        slot = self._next
        self._next = (slot + 1) % len(self._busy)
        if slot == len(self._sets):
            self._sets.append(self._make(slot))
        elif self._busy[slot] is None:
            raise DeviceError(f"buffers {slot} of {len(self._busy)} are taken and were never given back")
        else:
            self._device.finish(self._busy[slot])
            self._busy[slot] = None
        for buffer in self._sets[slot]:
            buffer.held = True
        return slot, self._sets[slot]

    def give(self, slot: int, event: Any) -> None:
        """Nobody uses a set any more once the event has come."""
        self._busy[slot] = event
        for buffer in self._sets[slot]:
            buffer.held = False
