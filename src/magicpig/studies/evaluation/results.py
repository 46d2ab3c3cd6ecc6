"""The results file: JSON lines that survive being killed. Knows nothing of models.

The first line is the header. Groups of lines follow, one group per sample, each written in one go and flushed to the
disk. What stands behind the last whole group when the file is opened again is the rest of an interrupted write and is
cut off. The lines depend on the settings alone, not on when or how often a run was interrupted.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from magicpig import strict_json
from magicpig.errors import ArgumentError
from magicpig.wording import printable, shown

FORMAT = "magicpig results 1"
_START = json.dumps({"format": FORMAT})[:-1].encode()  # of every header
# Of where results come from, what computes them. A run does not go on with another; anything else may change.
_COMPUTES = ("isa", "versions.magicpig", "versions.torch", "versions.transformers", "versions.tokenizers")


class ResultsError(ArgumentError):
    """A results file that cannot be read, written or continued. One line, naming the cause."""

    code = "invalid_results"


@dataclass(frozen=True)
class Results:
    """What is in a results file.

    header: settings, and under "made" where the lines come from. resumed: the same of later starts where it had
    changed.
    """

    header: dict[str, Any]
    resumed: list[dict[str, Any]]
    lines: list[dict[str, Any]]


def read_results(path: Path) -> Results:
    """A results file, finished or not, without what an interrupted write left. Raises ResultsError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from None
    records = [record for record, _ in _records(path, data)]
    resumed = [record["resumed"] for record in records if "resumed" in record]
    return Results(records[0], resumed, [record for record in records[1:] if "resumed" not in record])


class ResultsFile:
    """A results file that is being written, by nobody else at the same time.

    settings: all that decides about the lines; a file that is there already must have been begun with the same.
    made: where they come from (`magicpig.studies.provenance`). group: lines per sample.
    Entering raises ResultsError if the file cannot be written or continued.
    """

    def __init__(self, path: Path, settings: dict[str, Any], made: dict[str, Any], *, group: int) -> None:
        self.path = path
        self.group = group
        self.done = 0  # whole groups
        self._header = json.loads(json.dumps({"format": FORMAT, **settings, "made": made}))
        self._news: list[dict[str, Any]] = []  # goes before the next group
        self._file = -1
        self._end = 0  # of what is whole, in bytes

    def __enter__(self) -> ResultsFile:
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ResultsError(f"cannot write {self.path}: {error.strerror}") from None
        try:
            self._begin()
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Write the lines of one sample; they are on the disk when this returns. Raises ResultsError if it is full."""
        assert len(lines) == self.group
        self._write([*self._news, *lines])
        self._news = []
        self.done += 1

    def _begin(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise ResultsError(f"cannot write {self.path}: not a regular file")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            cause = "another run is writing it" if isinstance(error, BlockingIOError) else error.strerror
            raise ResultsError(f"cannot write {self.path}: {cause}") from None
        data = self.path.read_bytes()
        if b"\n" not in data and (data.startswith(_START) or _START.startswith(data)):
            self._write([self._header])  # new, or killed before this line was whole
        else:
            self._continue(list(_records(self.path, data)))

    def _continue(self, records: list[tuple[dict[str, Any], int]]) -> None:
        header, self._end = records[0]
        made, latest, lines = header["made"], header["made"], 0
        for record, end in records[1:]:
            if "resumed" in record:
                latest = record["resumed"]
                continue
            lines += 1
            if lines % self.group == 0:
                made, self._end = latest, end
        self.done = lines // self.group
        now = self._header["made"]
        refused = [*_differences({**header, "made": None}, {**self._header, "made": None})]
        refused += [change for change in _differences(made, now) if change[0] in _COMPUTES]
        for name, before, after in refused:
            raise ResultsError(
                f"{self.path} was begun with {name} = {_short(before)}, now it is {_short(after)}; "
                "go on as it was begun, or choose another file"
            )
        if any(name != "date" for name, _, _ in _differences(made, now)):
            self._news = [{"resumed": now}]

    def _write(self, records: Sequence[dict[str, Any]]) -> None:
        data = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
        try:
            os.ftruncate(self._file, self._end)
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self._end + written)
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._end)
            raise ResultsError(
                f"cannot write {self.path}: {error.strerror}; {self.done} samples are safe in it, "
                "and the same command goes on from there"
            ) from None
        self._end += len(data)


def _records(path: Path, data: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Every whole line and where it ends. The first is a header."""
    if not data.startswith(_START) or b"\n" not in data:
        raise ResultsError(f"{path} is not a results file of this version of magicpig ({FORMAT!r})")
    end = 0
    for number, line in enumerate(data[: data.rindex(b"\n")].split(b"\n"), 1):
        end += len(line) + 1
        try:
            record = strict_json.parse(line)
            _check_record(record, first=number == 1)
        except (strict_json.JsonError, _FieldError) as error:
            raise ResultsError(f"{path}: line {number} is damaged: {error}") from None
        yield record, end


class _FieldError(Exception):
    """A field that is missing or wrong."""


def _check_record(record: Any, *, first: bool) -> None:
    if not isinstance(record, dict):
        raise _FieldError(f"{shown(record)} is no object")
    for name in ("settings", "model", "made") if first else {"resumed"}.intersection(record):
        if not isinstance(record.get(name), dict):
            raise _FieldError(f"{name}={shown(record.get(name))} must be an object")


def _differences(before: Any, after: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, before, after) of everything that differs between two JSON objects."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from _differences(before.get(key), after.get(key), f"{name}.{key}" if name else key)
    elif before != after:
        yield name, before, after


def _short(value: Any) -> str:
    return printable(json.dumps(value), 300)
