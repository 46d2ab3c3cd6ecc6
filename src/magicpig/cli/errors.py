"""The one place where an error becomes a line on stderr and an exit code.

What the user or the machine is to blame for: one line, exit code 2. Kernels that are wrong on this machine, so that
nothing they did may be shown: one line, 1. Ctrl-C: one line, 130. A closed pipe: silence. Everything else is a bug of
ours and keeps its traceback.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

WRONG_RESULT = 1
BAD_INPUT = 2
INTERRUPTED = 130


class InputError(ValueError):
    """Something the user passed cannot be used. One line, naming the cause."""


class OneLineErrors(TyperGroup):
    """The command group whose errors are one line."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        options["standalone_mode"] = False
        try:
            code = super().main(*args, **options)
            sys.stdout.flush()
        except Exception as error:
            if _is_known(error):
                _say(f"error: {' '.join(str(_message(error)).split())}")
                sys.exit(BAD_INPUT)
            if _is_wrong_result(error):
                _say(f"no timing, the results are wrong: {error}")
                sys.exit(WRONG_RESULT)
            raise
        if code == INTERRUPTED:
            _say("interrupted")
        sys.exit(code or 0)


def _say(line: str) -> None:
    print(f"magicpig: {line}", file=sys.stderr)


def _message(error: Exception) -> str:
    if isinstance(error, typer.TyperException):
        return error.format_message()
    return str(error)


def _is_wrong_result(error: Exception) -> bool:
    from magicpig.bench.layer import WrongResultError  # imported late, like those of _is_known

    return isinstance(error, WrongResultError)


def _is_known(error: Exception) -> bool:
    if isinstance(error, (typer.TyperException, InputError)):
        return True
    if isinstance(error, ValueError) and str(error).startswith("MAGICPIG_"):  # an environment variable
        return True
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        return True
    # Imported late: `magicpig --help` should not wait for torch.
    from magicpig.capture import CaptureError
    from magicpig.config_file import ConfigFileError
    from magicpig.evaluation.matrix import MatrixError
    from magicpig.evaluation.results import ResultsError
    from magicpig.evaluation.tasks import TaskError
    from magicpig.generation import ModelError
    from magicpig.integrations.transformers import UnsupportedModelError

    known = (CaptureError, ConfigFileError, MatrixError, ModelError, ResultsError, TaskError, UnsupportedModelError)
    return isinstance(error, known)
