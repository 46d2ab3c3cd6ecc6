"""`magicpig bench certificates`: whether predicted errors can be believed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from magicpig.cli.errors import InputError
from magicpig.cli.files import STDIO, OutputFile
from magicpig.cli.options import MOST_SAMPLES, MOST_STEPS, checked
from magicpig.cli.studies.bench_options import (
    JsonFile,
    Samplers,
    Sets,
    SyntheticContexts,
    SyntheticHeadDim,
    SyntheticHeads,
    SyntheticKvHeads,
    Threads,
    check_sets,
    load_sets,
    methods,
    short_length,
    synthetic_lengths,
    write_results,
)
from magicpig.config import EXACT, SAMPLERS

if TYPE_CHECKING:
    from magicpig.studies.bench.certificates import Certificate

BUDGETS = ",".join(f"sketch:{rows}" for rows in (256, 512, 1024, 2048, 4096))


def certificates(
    contexts: SyntheticContexts = "16K,128K",
    sets: Sets = None,
    samplers: Samplers = f"{BUDGETS},sketch:64,epsilon=0.05,oracle:512,lsh",
    seeds: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="Synthetic contexts of each length.")] = 4,
    heads: SyntheticHeads = 8,
    kv_heads: SyntheticKvHeads = 2,
    head_dim: SyntheticHeadDim = 128,
    steps: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Query steps of a synthetic context.")] = 8,
    threads: Threads = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the errors of each layer and head of the first --set, as PNG and SVG.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Predicted errors against true ones, over all heads and steps of synthetic contexts and captured ones.

    The true error is relative to exact attention in float64; everything is computed in float32. A prediction holds when
    the error is at most 1.5 times as large. With epsilon, also how often the error is below it, and what that took.
    """
    to_stdout = json_file == STDIO
    console = Console(stderr=to_stdout)
    lengths = synthetic_lengths(contexts)
    asked = methods(samplers, tuple(name for name in SAMPLERS if name != EXACT.sampler))
    check_sets(sets, lengths)
    if figure is not None and not sets:
        raise InputError("--figure draws the layers of a capture; pass one with --set")
    with ExitStack() as files:
        pictures = {
            suffix: files.enter_context(OutputFile(figure.with_suffix(suffix)))
            for suffix in (".png", ".svg")
            if figure is not None
        }
        json_out = files.enter_context(OutputFile(None if to_stdout else json_file))
        import torch

        from magicpig.studies.bench import certificates as bench
        from magicpig.studies.bench.layer import Shape, check_context, verify_kernels
        from magicpig.studies.provenance import provenance

        shape = checked(Shape, heads, kv_heads, head_dim, 1, torch.float32)
        for tokens in lengths:
            checked(check_context, tokens, [method.config for method in asked], shape)
        captures = load_sets(sets)
        if threads is not None:
            torch.set_num_threads(threads)
        verify_kernels(shape)
        found: list[Certificate] = []
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            layers = sum(len(capture.layers) for capture in captures.values())
            task = progress.add_task("Measuring", total=layers + seeds * len(lengths))

            def done() -> None:
                progress.advance(task)

            for path, capture in captures.items():
                sizes = {data.tokens - data.steps for data in capture.layers.values()}
                name = f"{path.stem}, {short_length(max(sizes))}"
                found += bench.measure(name, capture.layers.values(), asked, done)
            for tokens in lengths:
                drawn = (shape.context(tokens, steps, seed) for seed in range(seeds))
                found += bench.measure(f"synthetic, {short_length(tokens)}", drawn, asked, done)
        if not found:
            raise InputError("nothing to measure: every context is shorter than what is always read, or the budgets")
        described = provenance() | {
            "seeds": seeds,
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "steps": steps,
        }
        first = next(iter(captures.values()), None)
        if first is not None:
            described["layers"] = list(first.layers)  # of the first capture: what `heads` are of
        write_results(described, [asdict(each) for each in found], json_out, to_stdout=to_stdout)
        if figure is not None and first is not None:
            from magicpig.studies.bench.plot import plot_heads
            from magicpig.studies.figures.style import png_and_svg, style

            rows = [asdict(each) for each in found if each.source == found[0].source]
            with style():
                for suffix, content in png_and_svg(plot_heads(rows, list(first.layers))).items():
                    pictures[suffix].write(content)
    for source in dict.fromkeys(each.source for each in found):
        console.print(_table([each for each in found if each.source == source]))
    console.print(
        "[dim]error, pred.: true and predicted, means over heads and steps; holds: error at most 1.5 times predicted"
    )


def _table(rows: list[Certificate]) -> Table:
    title = f"{rows[0].source}, {rows[0].cases} heads and steps"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("setting", no_wrap=True)
    for name in ("rows", "error", "pred.", "holds", "<= eps", "<=1.5eps"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in rows:
        table.add_row(
            each.name,
            f"{each.rows:.0f}",
            f"{each.error:.3f}",
            _or_nothing(each.predicted, ".3f"),
            _or_nothing(each.kept, ".1%"),
            _or_nothing(each.below, ".1%"),
            _or_nothing(each.nearly_below, ".1%"),
        )
    return table


def _or_nothing(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)
