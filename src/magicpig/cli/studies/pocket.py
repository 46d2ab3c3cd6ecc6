"""`magicpig pocket`: make the small model that ships with the package."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from magicpig.cli.commands import CommandGroup
from magicpig.cli.errors import InputError
from magicpig.cli.files import OutputFile
from magicpig.cli.options import MOST_SEED, MOST_THREADS
from magicpig.cli.studies.command import StudyCommand
from magicpig.cli.studies.progress import work_progress

if TYPE_CHECKING:
    from magicpig.studies.pocket.train import Progress

pocket = typer.Typer(cls=CommandGroup, help="Make the small model that ships with the package.")


class Preset(str, Enum):
    """What there is in `magicpig.studies.pocket.train.PRESETS`."""

    cpu = "cpu"
    gpu = "gpu"


@pocket.command(cls=StudyCommand)
def train(
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoint, log and model. A run goes on where it was stopped.")
    ],
    preset: Annotated[
        Preset, typer.Option(help="cpu: eight minutes on two cores. gpu: more and longer texts.")
    ] = Preset.cpu,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of the weights and the lessons.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads. [default: all]")] = None,
) -> None:
    """Train the pocket model on made-up texts, short ones first. Stop it at will; the same command goes on."""
    notes = Console(stderr=True, highlight=False)
    with notes.status("Preparing"):
        import torch

        from magicpig.studies.pocket import train as training

        if threads is not None:
            torch.set_num_threads(threads)
        if preset is Preset.gpu and not torch.cuda.is_available():
            raise InputError("preset=gpu needs a CUDA device and there is none; use cpu")
    chosen = training.PRESETS[preset.value]
    with work_progress(notes) as progress:
        bar = progress.add_task("Starting", total=chosen.steps)

        def report(now: Progress) -> None:
            right = " ".join(f"{kind} {share:.0%}" for kind, share in now.right.items())
            progress.update(bar, completed=now.step + 1, description=f"{now.length} tokens: {right}")

        try:
            device = "cuda" if preset is Preset.gpu else "cpu"
            model = training.train(out, chosen, seed=seed, device=device, report=report)
        except ValueError as error:
            raise InputError(str(error)) from None
        except KeyboardInterrupt:
            notes.print(f"The same command goes on from the last checkpoint in {escape(str(out))}.")
            raise
    training.save(model, out / "model")
    notes.print(
        f"The model is in {out / 'model'}. Next: magicpig eval ruler --model {out / 'model'}, magicpig pocket card"
    )


@pocket.command(cls=StudyCommand)
def card(
    results: Annotated[Path, typer.Argument(help="Results of `magicpig eval ruler` for the model, full attention.")],
    model: Annotated[Path, typer.Option(help="Folder of the model; its README.md is written.")],
    command: Annotated[str, typer.Option(help="The command that trained it.")] = "magicpig pocket train --preset cpu",
    machine: Annotated[str, typer.Option(help="Where and how long, in words.")] = "",
) -> None:
    """Write the model card of a pocket model, with the table of its own evaluation."""
    from magicpig.studies.evaluation.results import read_results
    from magicpig.studies.pocket.card import write

    with OutputFile(model / "README.md") as file:
        file.write(write(model, read_results(results), command=command, machine=machine))
