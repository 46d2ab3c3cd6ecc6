"""What all commands have in common: --version, a word about what is missing, and streams that can be written."""

from __future__ import annotations

import os
import signal
import sys
from io import TextIOWrapper
from types import FrameType
from typing import Any

from typer.core import TyperCommand, TyperGroup

TERMINATED = 128 + signal.SIGTERM


class Command(TyperCommand):
    """A command with the options that the root has for all of them."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _with_version(super().get_params(ctx), ctx)


class CommandGroup(TyperGroup):
    """A group of commands that says which there are when none is given."""

    command_class = Command

    def get_params(self, ctx: Any) -> list[Any]:
        return _with_version(super().get_params(ctx), ctx)

    def invoke(self, ctx: Any) -> Any:
        if not ctx._protected_args and not self.invoke_without_command:
            ctx.fail(f"{ctx.command_path} needs a command: {', '.join(self.list_commands(ctx))}.")
        return super().invoke(ctx)


def _with_version(params: list[Any], ctx: Any) -> list[Any]:
    version = next((each for each in ctx.find_root().command.params if each.name == "version"), None)
    return params if version is None or version in params else [*params, version]


def prepare_streams() -> None:
    """Make the standard streams what the commands take them for.

    Text that the terminal cannot show is replaced. A stream that was closed is one that nothing can be read from or
    written to: else the next file to be opened would get its number, and what is printed.
    """
    for number, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # the lowest free number is this one
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def end_in_order() -> None:
    """Let SIGTERM and SIGHUP end the process as an error does, so that nothing half-written stays behind."""

    def end(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)
