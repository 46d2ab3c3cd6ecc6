"""The one place where an error becomes a line on stderr and an exit code.

What the user or the machine is to blame for: one line, exit code 2. Kernels that are wrong on this machine, so that
nothing they did may be shown: one line, 1. Ctrl-C: one line, 130; SIGTERM: 143. A closed pipe: silence, 1. Everything
else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import typer

from magicpig.cli.commands import CommandGroup
from magicpig.errors import ArgumentError, MagicPigError
from magicpig.wording import printable

WRONG_RESULT = 1
BROKEN_PIPE = 1
BAD_INPUT = 2
INTERRUPTED = 130
LONGEST = 1000  # characters of an error


class InputError(ArgumentError):
    """Something the user passed cannot be used. One line, naming the cause."""

    code = "invalid_input"


class OneLineErrors(CommandGroup):
    """The command group whose errors are one line."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        options["standalone_mode"] = False
        try:
            code = super().main(*args, **options)
            if sys.stdout is not None:
                sys.stdout.flush()
        except Exception as error:
            _exit(error)
        except SystemExit:
            _drop_output()  # of a closed pipe, or after a signal: what is left has nowhere to go
            raise
        if code == INTERRUPTED:
            _say("interrupted")
        sys.exit(code or 0)


def _exit(error: Exception) -> NoReturn:
    """End the process, if the error is known; raise it, if not."""
    if isinstance(error, OSError):
        _drop_output()  # Python would try to write the rest once more and complain
    if isinstance(error, BrokenPipeError):
        sys.exit(BROKEN_PIPE)
    if (line := _line(error)) is None:
        raise error
    _say(line)
    sys.exit(WRONG_RESULT if isinstance(error, MagicPigError) and error.code == "wrong_result" else BAD_INPUT)


def _line(error: Exception) -> str | None:
    if isinstance(error, MagicPigError) and error.code == "wrong_result":
        return f"no timing, the results are wrong: {error}"
    if isinstance(error, MagicPigError):
        return f"error: {error}"
    if isinstance(error, typer.TyperException):
        return f"error: {error.format_message()}"
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        return f"error: there is not enough memory: {str(error) or 'Python asked for more than it got'}"
    if isinstance(error, OSError) and error.errno is None:  # in a library's own words: something took too long, say
        return f"error: {str(error) or type(error).__name__}"
    if isinstance(error, OSError):
        where = "standard output or standard error" if error.filename is None else error.filename
        return f"error: cannot use {where}: {error.strerror or error}"
    return None


def _is_torch_out_of_memory(error: Exception) -> bool:
    # torch has no class for it on the CPU, so its text is all there is.
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def _say(line: str) -> None:
    try:
        print(f"magicpig: {printable(line, LONGEST)}", file=sys.stderr, flush=True)
    except OSError:
        _drop_output()  # nobody can be told


def _drop_output() -> None:
    """What is buffered and cannot be written goes nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
