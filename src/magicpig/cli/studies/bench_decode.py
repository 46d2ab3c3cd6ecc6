"""`magicpig bench decode`: tokens per second of a model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from magicpig.cli.files import STDIO, OutputFile
from magicpig.cli.options import MOST_REPEATS, MOST_STEPS, Dtype, KeptWeights, Weights, checked
from magicpig.cli.settings import takes_settings
from magicpig.cli.studies.bench_options import (
    Contexts,
    JsonFile,
    Samplers,
    Threads,
    made_of,
    made_up_model,
    methods,
    say_if_busy,
    say_if_slow_baseline,
    short_length,
    write_results,
)
from magicpig.config import EXACT, NATIVE
from magicpig.model_dir import MOST_PARTS
from magicpig.studies.bench.shapes import SHAPES

if TYPE_CHECKING:
    from magicpig.studies.bench.decode import Result


@takes_settings("budget", "candidates", "bits", "dense_layers")
def decode(
    *,
    shape: Annotated[str, typer.Option(help=f"A model's sizes: {', '.join(SHAPES)}.")] = "llama-3.2-1b",
    layers: Annotated[
        int | None, typer.Option(min=1, max=MOST_PARTS, help="Its first so many layers. [default: all]")
    ] = None,
    context: Contexts = "32K",
    samplers: Samplers = "full,lsh,sketch",
    settings: dict[str, Any],
    dtype: Annotated[Dtype, typer.Option(help="Of weights, keys and values.")] = Dtype.bfloat16,
    weights: KeptWeights = Weights.auto,
    steps: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Tokens of an answer that are timed.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="Answers of each sampler, in turns.")] = 3,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Tokens per second of a model's shape behind a long context, by samplers in turns.

    Weights are random and keys and values made up, so there is nothing to download and no prompt to wait for. The time
    of a token is split into the model's own layers, attention, indexing, the Python of this package, and transformers'
    loop around it. Medians, threads pinned to cores.
    """
    to_stdout = json_file == STDIO
    console = Console(stderr=to_stdout)
    from magicpig.studies.bench.shapes import settings as shape_settings
    from magicpig.studies.evaluation.matrix import parse_lengths

    checked(shape_settings, shape, layers)
    contexts = parse_lengths(context, "--context")
    compared = methods(samplers, (EXACT.sampler, *NATIVE), **settings)
    with OutputFile(None if to_stdout else json_file) as file:
        from magicpig.studies.bench.decode import describe

        decoder = made_up_model(shape, layers, dtype, weights, contexts=contexts, steps=steps, threads=threads)
        for tokens in contexts:
            checked(decoder.check, tokens, compared)
        results = []
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("Generating", total=None)
            for tokens in contexts:
                results += decoder.measure(tokens, compared, repeats=repeats, on_round=lambda: progress.advance(task))
        described = describe(decoder, shape, repeats)
        write_results(described, [asdict(result) for result in results], file, to_stdout=to_stdout)
    console.print(_table(results))
    say_if_busy(console, results)
    say_if_slow_baseline(console, ((each.read_ms, each.attention_ms) for each in results))
    console.print(
        f"[dim]ms per token, medians of {repeats * steps} tokens; ours: Python of this package, per layer in "
        f"microseconds; loop: transformers' around the forward pass; " + made_of(decoder, dtype, described)
    )


def _table(results: list[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("keys", justify="right", no_wrap=True)
    table.add_column(" sampler", no_wrap=True)
    for name in ("tokens/s", "vs full", "token", "weights", "attention", "index", "loop", "ours", "us/layer"):
        table.add_column(name, justify="right", no_wrap=" " not in name)
    for each in results:
        table.add_row(
            short_length(each.context),
            f" {each.name}",
            f"[bold]{each.tokens_per_s:.2f}",
            "" if each.ratio_full is None else f"[bold]{each.ratio_full:.2f}x",
            f"{each.token_ms:.1f}",
            f"{each.weights_ms:.1f}",
            f"{each.attention_ms:.1f}",
            f"{each.index_ms:.2f}",
            f"{each.generate_ms:.1f}",
            f"{each.python_ms:.2f}",
            f"{each.python_us_per_layer:.0f}",
        )
    return table
