"""Text in, results out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType

from magicpig.cli.errors import InputError

STDIO = Path("-")


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


class OutputFile:
    """A file that appears whole or not at all.

    Entering creates a file beside it, so a path that cannot be written is refused before any work is done;
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
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            aside.touch(exist_ok=False)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None
        self._aside = aside
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
        if self._aside is not None:
            self._aside.unlink(missing_ok=True)
