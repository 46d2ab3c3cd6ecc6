"""A device that is none: work is done at once, on the processor, and every use of a buffer is checked.

It keeps two kinds of time. Clocks say when things would happen, from costs that are given: a timeline of a schedule, to
be looked at and added up. Order says what is known to have happened before what (vector clocks, Fidge 1988): a use of a
buffer that nothing orders behind the last write, or a write that nothing orders behind the last read, raises a
RaceError, however the clocks stand. So does a read of what was never written, and a copy that is overwritten before
anyone read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch

from magicpig.placement.device import STREAMS, Buffer, DeviceError, StreamName

T = TypeVar("T")


class RaceError(DeviceError):
    """A buffer was used before it was ready, or after somebody else had got it."""

    code = "race"


class Span(NamedTuple):
    """Something that a stream or the host does from `begin` to `end`, in seconds."""

    where: str
    what: str
    begin: float
    end: float


class _Event(NamedTuple):
    time: float
    known: dict[str, int]
    failed: str | None


class _Use(NamedTuple):
    where: str
    number: int
    what: str
    copied: bool = False


@dataclass
class _Notes:
    written: _Use | None = None
    read: list[_Use] = field(default_factory=list)


class Simulated:
    """costs: seconds that work takes, by its name or the first word of it, looked up anew each time; none is nothing.
    overhead: seconds that any work or copy takes besides. down, up: bytes a second of copies.
    fail: names of work that fails, as on a broken device; the error comes when the host waits for it.
    tensors: "cpu", or "meta" for a schedule that computes nothing. memory: bytes that it says it has left.
    """

    name = "simulated"

    def __init__(
        self,
        costs: Mapping[str, float] | None = None,
        *,
        down: float = 50e9,
        up: float = 50e9,
        overhead: float = 0.0,
        fail: Sequence[str] = (),
        tensors: str = "cpu",
        memory: int = 24 << 30,
    ) -> None:
        self._memory = memory
        self.torch_device = torch.device(tensors)
        self.spans: list[Span] = []
        self._costs, self._overhead, self._fail = {} if costs is None else costs, overhead, set(fail)
        self._rates = {"down": down, "up": up}
        everyone = (*STREAMS, "host")
        self._time = dict.fromkeys(everyone, 0.0)
        self._known: dict[str, dict[str, int]] = {who: {} for who in everyone}
        self._failed: dict[str, str | None] = dict.fromkeys(everyone)

    def break_at(self, what: str) -> None:
        """From now on work of that name fails."""
        self._fail.add(what)

    # --- the interface ------------------------------------------------------------------------------------------------

    def free_memory(self) -> int:
        return self._memory

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype, *, pinned: bool = False) -> Buffer:
        tensor = torch.empty(*shape, dtype=dtype, device=self.torch_device)
        if dtype.is_floating_point:
            tensor.fill_(torch.nan)
        return Buffer(name, tensor, pinned, notes=_Notes())

    def launch(
        self,
        stream: StreamName,
        what: str,
        work: Callable[[], T],
        *,
        reads: Sequence[Buffer] = (),
        writes: Sequence[Buffer] = (),
    ) -> T:
        self._enqueue(stream, what, self._cost(what), reads, writes)
        return work()

    def copy(self, stream: StreamName, source: Buffer, target: Buffer) -> None:
        if source.tensor.shape != target.tensor.shape or source.tensor.dtype != target.tensor.dtype:
            raise DeviceError(f"{source.name} and {target.name} differ in shape or dtype")
        if source.pinned == target.pinned:
            raise DeviceError(f"{source.name} -> {target.name} is no copy between a device and the host")
        what = f"{source.name} -> {target.name}"
        seconds = self._overhead + source.tensor.nbytes / self._rates["down" if target.pinned else "up"]
        self._enqueue(stream, what, seconds, [source], [target], copied=True)
        target.tensor.copy_(source.tensor)

    def record(self, stream: StreamName) -> _Event:
        return _Event(self._time[stream], dict(self._known[stream]), self._failed[stream])

    def wait(self, stream: StreamName, event: _Event) -> None:
        self._join(stream, event)

    def finish(self, event: _Event) -> None:
        self._join("host", event)
        if event.failed is not None:
            raise DeviceError(f"{event.failed} failed on the device")

    def host(
        self, what: str, work: Callable[[], T], *, reads: Sequence[Buffer] = (), writes: Sequence[Buffer] = ()
    ) -> T:
        for buffer in (*reads, *writes):
            if not buffer.pinned:
                raise RaceError(f"{what} on the host uses {buffer.name}, which is memory of the device")
        self._do("host", what, self._cost(what), reads, writes)
        return work()

    # --- the timeline -------------------------------------------------------------------------------------------------

    @property
    def elapsed(self) -> float:
        """When the last piece of work ends."""
        return max((span.end for span in self.spans), default=0.0)

    def busy(self, where: str, begin: float = 0.0, end: float | None = None) -> float:
        """Seconds between two times that a stream or the host works."""
        end = self.elapsed if end is None else end
        return sum(max(0.0, min(s.end, end) - max(s.begin, begin)) for s in self.spans if s.where == where)

    def idle(self, where: str, begin: float = 0.0, end: float | None = None) -> float:
        """The rest of that time."""
        end = self.elapsed if end is None else end
        return end - begin - self.busy(where, begin, end)

    def picture(self, begin: float = 0.0, end: float | None = None, width: int = 100) -> str:
        """A line of text for the host and each stream: letters where it works, dots where it waits."""
        end = self.elapsed if end is None else end
        lines, letters = [], dict[str, str]()
        for where in ("compute", "down", "host", "up"):
            cells = ["."] * width
            for span in self.spans:
                if span.where != where or span.end <= begin or span.begin >= end or span.end == span.begin:
                    continue
                kind = "copy" if " -> " in span.what else span.what.partition(" ")[0]
                letter = letters.setdefault(kind, _letter(kind, set(letters.values())))
                first = int((max(span.begin, begin) - begin) / (end - begin) * width)
                last = max(first + 1, round((min(span.end, end) - begin) / (end - begin) * width))
                cells[first:last] = letter * (min(last, width) - first)
            lines.append(f"{where:>7} |{''.join(cells)}|")
        lines.append("        " + "  ".join(f"{letter} {kind}" for kind, letter in letters.items()))
        return "\n".join(lines)

    # --- who knows what -----------------------------------------------------------------------------------------------

    def _cost(self, what: str) -> float:
        return self._overhead + self._costs.get(what, self._costs.get(what.partition(" ")[0], 0.0))

    def _enqueue(
        self,
        stream: StreamName,
        what: str,
        seconds: float,
        reads: Sequence[Buffer],
        writes: Sequence[Buffer],
        copied: bool = False,
    ) -> None:
        # What the host gives a stream to do comes after all that the host did before.
        self._join(stream, _Event(self._time["host"], self._known["host"], None))
        if not copied and (what in self._fail or what.partition(" ")[0] in self._fail):
            self._failed[stream] = self._failed[stream] or what
        self._do(stream, what, seconds, reads, writes, copied)

    def _do(
        self,
        who: str,
        what: str,
        seconds: float,
        reads: Sequence[Buffer],
        writes: Sequence[Buffer],
        copied: bool = False,
    ) -> None:
        known = self._known[who]
        known[who] = known.get(who, 0) + 1
        use = _Use(who, known[who], what, copied)
        for buffer in reads:
            self._check(buffer, use, buffer.notes.written)
            if buffer.notes.written is None:
                raise RaceError(f"{what} reads {buffer.name}, into which nothing was written")
            buffer.notes.read.append(use)
        for buffer in writes:
            notes: _Notes = buffer.notes
            others = [each for each in notes.read if each != use]
            for before in (notes.written, *others):
                self._check(buffer, use, before)
            if notes.written is not None and notes.written.copied and not notes.read:
                raise RaceError(f"{what} overwrites {buffer.name}: what {notes.written.what} copied there was lost")
            notes.written, notes.read = use, []
        begin = self._time[who]
        self._time[who] = begin + seconds
        self.spans.append(Span(who, what, begin, begin + seconds))

    def _check(self, buffer: Buffer, use: _Use, before: _Use | None) -> None:
        if not buffer.held:
            raise RaceError(f"{use.what} uses {buffer.name}, which was given back")
        if before is not None and self._known[use.where].get(before.where, 0) < before.number:
            raise RaceError(
                f"{use.what} ({use.where}) uses {buffer.name}, but nothing says that {before.what} ({before.where}) "
                "is done with it: an event is missing"
            )

    def _join(self, who: str, event: _Event) -> None:
        known = self._known[who]
        for other, number in event.known.items():
            known[other] = max(known.get(other, 0), number)
        self._time[who] = max(self._time[who], event.time)
        if who != "host":
            self._failed[who] = self._failed[who] or event.failed


def _letter(kind: str, taken: set[str]) -> str:
    return next((x for x in (*kind, *kind.upper(), *"#@%&*+=~") if x.isalpha() and x not in taken), "?")
