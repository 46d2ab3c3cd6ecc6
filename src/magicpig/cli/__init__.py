"""The command `magicpig`. Commands only parse, call and print; torch is imported when a command needs it."""

from __future__ import annotations

import sys
from importlib.metadata import version as package_version
from typing import Annotated

import typer

from magicpig.cli.bench import follow_cpu_quota, measure, pin_threads
from magicpig.cli.capture import capture
from magicpig.cli.chat import chat
from magicpig.cli.commands import Command, end_in_order, prepare_streams
from magicpig.cli.demo import demo
from magicpig.cli.doctor import doctor
from magicpig.cli.errors import OneLineErrors
from magicpig.cli.evaluate import evaluate
from magicpig.cli.figures import figures
from magicpig.cli.generate import generate
from magicpig.cli.pocket import pocket
from magicpig.cli.serve import serve
from magicpig.cli.tune import tune

app = typer.Typer(
    name="magicpig",
    cls=OneLineErrors,
    help="Long-context attention on the CPU by sampling: reads the few keys that matter instead of all of them.",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (generate, chat, demo, tune, capture, figures, doctor):
    app.command(cls=Command)(command)
app.command(cls=Command, context_settings={"auto_envvar_prefix": "MAGICPIG_SERVE"})(serve)

app.add_typer(measure, name="bench")
app.add_typer(evaluate, name="eval")
app.add_typer(pocket, name="pocket")


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
