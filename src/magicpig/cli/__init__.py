"""The command `magicpig`. Commands only parse, call and print; torch is imported when a command needs it."""

from __future__ import annotations

import sys
from importlib.metadata import version as package_version
from typing import Annotated

import typer

from magicpig.cli.cache import cache
from magicpig.cli.chat import chat
from magicpig.cli.commands import Command, end_in_order, prepare_streams
from magicpig.cli.convert import convert
from magicpig.cli.doctor import doctor
from magicpig.cli.errors import OneLineErrors
from magicpig.cli.generate import generate
from magicpig.cli.plan import plan
from magicpig.cli.serve import serve
from magicpig.cli.studies.bench import measure
from magicpig.cli.studies.capture import capture
from magicpig.cli.studies.command import PANEL, StudyCommand
from magicpig.cli.studies.demo import demo
from magicpig.cli.studies.evaluate import evaluate
from magicpig.cli.studies.figures import figures
from magicpig.cli.studies.pocket import pocket
from magicpig.cli.studies.tune import tune
from magicpig.cli.threads import follow_cpu_quota, pin_threads

app = typer.Typer(
    name="magicpig",
    cls=OneLineErrors,
    help="Long-context attention on the CPU by sampling: reads the few keys that matter instead of all of them.",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, convert):
    app.command(cls=Command)(command)
app.command(cls=Command, context_settings={"auto_envvar_prefix": "MAGICPIG_SERVE"})(serve)
for command in (doctor, plan):
    app.command(cls=Command)(command)

app.add_typer(cache, name="cache")
for study in (demo, tune, capture, figures):
    app.command(cls=StudyCommand, rich_help_panel=PANEL)(study)
for name, group in {"bench": measure, "eval": evaluate, "pocket": pocket}.items():
    app.add_typer(group, name=name, rich_help_panel=PANEL)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"magicpig {package_version('magicpig')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            expose_value=False,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Entry point of the `magicpig` command."""
    prepare_streams()
    end_in_order()
    follow_cpu_quota()
    if sys.argv[1:2] in (["bench"], ["tune"]):
        pin_threads()
    app(prog_name="magicpig")
