"""A command that needs the extra `studies`."""

from __future__ import annotations

from typing import Any

from magicpig.cli.commands import Command
from magicpig.cli.errors import InputError
from magicpig.studies import missing_module

PANEL = "Studies, which need the extra 'studies'"


class StudyCommand(Command):
    """A command that says how to install what it needs where that is missing, before it does anything."""

    def invoke(self, ctx: Any) -> Any:
        if (name := missing_module()) is not None:
            raise InputError(f"{ctx.command_path}: {name} is not installed: pip install 'magicpig[studies]'")
        return super().invoke(ctx)
