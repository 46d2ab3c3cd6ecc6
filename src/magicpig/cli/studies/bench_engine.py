"""`magicpig bench engine`: what the engine adds to the model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from magicpig.cli.files import STDIO, OutputFile
from magicpig.cli.options import MOST_REPEATS, MOST_STEPS, Dtype, ModelDtype, ModelOrPocket, checked, or_pocket
from magicpig.cli.settings import takes_settings
from magicpig.cli.studies.bench_options import (
    Contexts,
    JsonFile,
    Samplers,
    Threads,
    methods,
    say_if_busy,
    short_length,
    write_results,
)
from magicpig.config import EXACT, NATIVE

if TYPE_CHECKING:
    from magicpig.studies.bench.engine import Result


@takes_settings("budget", "candidates", "bits")
def engine(
    *,
    model: ModelOrPocket = None,
    running: Annotated[int, typer.Option(min=1, max=1024, help="Answers at once.")] = 8,
    context: Contexts = "8K",
    samplers: Samplers = "full,sketch",
    settings: dict[str, Any],
    dtype: ModelDtype = Dtype.auto,
    steps: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Steps of a turn.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="Turns.")] = 5,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """A step of the engine, beside a bare forward pass of the model over the same contexts as one batch.

    Keys and values are made up, so there is no prompt to wait for. Medians, in turns, threads pinned to cores.
    """
    to_stdout = json_file == STDIO
    console = Console(stderr=to_stdout)
    from magicpig.studies.evaluation.matrix import parse_lengths

    contexts = parse_lengths(context, "--context")
    compared = methods(samplers, (EXACT.sampler, *NATIVE), **settings)
    folder = or_pocket(model, Console(stderr=True))
    with OutputFile(None if to_stdout else json_file) as file:
        import torch

        from magicpig import generation
        from magicpig.studies.bench.engine import measure
        from magicpig.studies.provenance import provenance

        generation.silence_transformers()
        opened = generation.open_model(folder)
        network = generation.load(opened, dtype=dtype.value)
        if threads is not None:
            torch.set_num_threads(threads)
        results: list[Result] = []
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("Measuring", total=len(contexts) * len(compared) * repeats)
            for tokens in contexts:
                results += checked(
                    measure,
                    network,
                    opened.tokenizer,
                    [(method.name, method.config) for method in compared],
                    running=running,
                    context=tokens,
                    steps=steps,
                    rounds=repeats,
                    on_round=lambda: progress.advance(task),
                )
        console.print(_table(results))
        say_if_busy(console, results)
        described = {**provenance(), "model": folder.name, "steps": steps, "repeats": repeats}
        write_results(described, [asdict(result) for result in results], file, to_stdout=to_stdout)


def _table(results: list[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("sampler")
    for name in ("answers", "context", "engine ms", "of it forward", "bare ms", "overhead", "tokens/s"):
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(
            result.name,
            str(result.running),
            short_length(result.context),
            f"{result.step_ms:.2f}",
            f"{result.packed_ms:.2f}",
            f"{result.bare_ms:.2f}",
            f"{result.overhead:+.1%}",
            f"{result.tokens_per_s:,.0f}",
        )
    return table
