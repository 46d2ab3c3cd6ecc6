"""Text in, results out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

from magicpig.cli.errors import InputError

STDIO = Path("-")
SPACE = 1 << 16  # bytes that must be free where a file is to be written


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, of standard input for "-". Raises InputError."""
    try:
        data = sys.stdin.buffer.read() if path == STDIO else path.read_bytes()
        text = data.decode()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        raise InputError(f"cannot read {path}: binary, not text")
    return text


def check_readable(path: Path) -> None:
    """Raise InputError unless there is a file at ``path`` that may be read."""
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


class OutputFile:
    """A file that appears whole or not at all.

    Entering creates a file beside it, so a path that cannot be written, and a full disk, are refused before any work;
    `write` fills and renames it. Without a path nothing happens. Raises InputError.
    """

    def __init__(self, path: Path | None) -> None:
        # A link stays a link: what it points to is replaced.
        self.path = None if path is None else Path(os.path.realpath(path))
        self._aside: Path | None = None

    def __enter__(self) -> OutputFile:
        if self.path is None:
            return self
        if self.path.exists() and not self.path.is_file():
            raise InputError(f"cannot write {self.path}: not a regular file")
        if self.path.exists() and not os.access(self.path, os.W_OK):
            raise InputError(f"cannot write {self.path}: it is read-only")
        aside = self.path.with_name(f".{self.path.name[:100]}.{os.getpid()}.part")
        try:
            with aside.open("xb") as file:
                self._aside = aside
                file.write(bytes(SPACE))  # a full disk takes names, but no content
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self._remove()
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None
        except BaseException:
            self._remove()
            raise
        return self

    def write(self, content: str | bytes) -> None:
        """Replace the file by ``content``."""
        if self.path is None or self._aside is None:
            return
        try:
            self._aside.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(self._aside, self.path)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None
        self._aside = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._aside is not None:
            self._aside.unlink(missing_ok=True)
            self._aside = None
