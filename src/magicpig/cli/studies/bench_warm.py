"""`magicpig bench warm`: what a warm document saves."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from magicpig.cli.files import STDIO, OutputFile
from magicpig.cli.options import MOST_REPEATS, ModelOrPocket, or_pocket
from magicpig.cli.studies.bench_options import Contexts, JsonFile, Samplers, methods, short_length, write_results
from magicpig.config import EXACT, NATIVE


def warm(
    model: ModelOrPocket = None,
    context: Contexts = "32K",
    samplers: Samplers = "sketch",
    repeats: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="Second questions, and restarts.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Time to the first token: of a first question about a document, of a second, and of one after a restart."""
    to_stdout = json_file == STDIO
    console = Console(stderr=to_stdout)
    from magicpig.studies.evaluation.matrix import parse_lengths

    contexts = parse_lengths(context, "--context")
    compared = methods(samplers, (EXACT.sampler, *NATIVE))
    folder = or_pocket(model, Console(stderr=True))
    with OutputFile(None if to_stdout else json_file) as file:
        from magicpig.generation import silence_transformers
        from magicpig.studies.bench.warm import measure
        from magicpig.studies.provenance import provenance

        silence_transformers()
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("sampler", "document", "first, s", "second, s", "as fast", "restarted, s", "as fast", "file, MiB"):
            table.add_column(name, justify="left" if name == "sampler" else "right")
        results = []
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("Asking", total=len(contexts) * len(compared) * (2 * repeats + 1))
            for tokens in contexts:
                for method in compared:
                    done = lambda: progress.advance(task)  # noqa: E731
                    result = measure(folder, method.config, tokens, repeats=repeats, on_done=done)
                    results.append(
                        {"sampler": method.name, **asdict(result)}
                        | {"second_ratio": result.second_ratio, "restarted_ratio": result.restarted_ratio}
                    )
                    table.add_row(
                        method.name,
                        short_length(tokens),
                        f"{result.first_s:.2f}",
                        f"{result.second_s:.3f}",
                        f"{result.second_ratio:.0f} times",
                        f"{result.restarted_s:.3f}",
                        f"{result.restarted_ratio:.0f} times",
                        f"{result.file_bytes / 2**20:,.0f}",
                    )
        console.print(table)
        write_results({**provenance(), "model": folder.name, "repeats": repeats}, results, file, to_stdout=to_stdout)
