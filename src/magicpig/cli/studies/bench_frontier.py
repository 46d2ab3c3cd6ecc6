"""`magicpig bench frontier`: what each sampler's error costs."""

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
from magicpig.cli.options import MOST_REPEATS, MOST_STEPS, Dtype, checked
from magicpig.cli.studies.bench_options import (
    JsonFile,
    Sets,
    SyntheticContexts,
    SyntheticHeadDim,
    SyntheticHeads,
    SyntheticKvHeads,
    Threads,
    check_sets,
    load_sets,
    say_if_busy,
    say_if_slow_baseline,
    short_length,
    synthetic_lengths,
    torch_dtype,
    write_results,
)

if TYPE_CHECKING:
    from magicpig.studies.bench.frontier import Point


def frontier(
    contexts: SyntheticContexts = "16K,128K,1M",
    sets: Sets = None,
    samplers: Annotated[
        str,
        typer.Option(help="Samplers separated by commas: all settings of each, or those behind a colon (sketch:256)."),
    ] = "lsh,sketch,topk,oracle",
    heads: SyntheticHeads = 8,
    kv_heads: SyntheticKvHeads = 2,
    head_dim: SyntheticHeadDim = 128,
    dtype: Annotated[Dtype, typer.Option(help="Of synthetic queries, keys and values.")] = Dtype.bfloat16,
    repeats: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="Rounds over all query steps.")] = 3,
    steps: Annotated[
        int, typer.Option(min=1, max=MOST_STEPS, help="Different query steps in a round, of synthetic contexts.")
    ] = 8,
    threads: Threads = None,
    json_file: JsonFile = None,
    figure: Annotated[
        Path | None, typer.Option(help="Plot the results into this file and its like, .png and .svg.")
    ] = None,
) -> None:
    """Output error against time per step, index and keys read, for every sampler and setting.

    On synthetic contexts and captured ones. Error is relative to exact attention in float64, over heads and steps;
    times are medians with cold caches, in turns with the exact kernel. topk and oracle look at every key, so they have
    an error and no time. The tables have the settings that no other beats in both time and error.
    """
    to_stdout = json_file == STDIO
    console = Console(stderr=to_stdout)
    from magicpig.studies.bench.settings import settings

    lengths = synthetic_lengths(contexts)
    methods = settings(samplers)
    if any(not method.config.samples for method in methods):
        raise InputError("--samplers full has no error to compare: exact attention is in every run")
    check_sets(sets, lengths)
    with ExitStack() as files:
        json_out = files.enter_context(OutputFile(None if to_stdout else json_file))
        pictures = {
            suffix: files.enter_context(OutputFile(figure.with_suffix(suffix)))
            for suffix in (".png", ".svg")
            if figure is not None
        }
        import torch

        from magicpig.studies.bench import frontier as bench
        from magicpig.studies.bench.layer import Shape, check_context, verify_kernels
        from magicpig.studies.provenance import provenance

        shape = checked(Shape, heads, kv_heads, head_dim, 1, torch_dtype(dtype))
        for tokens in lengths:
            checked(check_context, tokens, [method.config for method in methods], shape)
        captures = load_sets(sets)
        if threads is not None:
            torch.set_num_threads(threads)
        points: list[Point] = []
        verify_kernels(shape)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            layers = sum(len(capture.layers) for capture in captures.values())
            task = progress.add_task("Measuring", total=len(methods) * (len(lengths) + layers))
            for path, capture in captures.items():
                for layer, data in capture.layers.items():
                    points += bench.measure(
                        f"{path.stem}, {short_length(data.tokens)}",
                        data,
                        methods,
                        layer=layer,
                        repeats=repeats,
                        on_point=lambda: progress.advance(task),
                    )
            for tokens in lengths:
                (data,) = shape.contexts(tokens, steps)
                points += bench.measure(
                    f"synthetic, {short_length(tokens)}",
                    data,
                    methods,
                    repeats=repeats,
                    on_point=lambda: progress.advance(task),
                )
        if not points:
            raise InputError("nothing to measure: every context is shorter than what is always read, or the budgets")
        rows = [asdict(point) for point in points]
        described = provenance() | {
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "dtype": dtype.value,
            "repeats": repeats,
            "steps": steps,
        }
        write_results(described, rows, json_out, to_stdout=to_stdout)
        if figure is not None:
            from magicpig.studies.bench.plot import plot_frontier
            from magicpig.studies.figures.style import png_and_svg, style

            with style():
                for suffix, content in png_and_svg(plot_frontier(rows)).items():
                    pictures[suffix].write(content)
    averaged = bench.over_layers(points)
    for source in dict.fromkeys(point.source for point in averaged):
        if found := bench.best([point for point in averaged if point.source == source]):
            console.print(_table(found))
    say_if_busy(console, points)
    say_if_slow_baseline(console, ((each.read_ms, each.exact_ms) for each in points))
    made_up = f"synthetic: {heads} query heads, {kv_heads} key/value heads, head dim {head_dim}, {dtype.value}; "
    console.print(
        f"[dim]ms per layer and step, medians, with cold caches, of captures means over their layers; "
        f"{made_up if lengths else ''}{described['isa']}, {described['threads']} threads, {described['machine']}"
    )


def _table(points: list[Point]) -> Table:
    first = points[0]
    title = first.source if first.layer is None else f"{first.source}, layer {first.layer}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("setting", no_wrap=True)
    for name in ("step", "vs exact", "rows", "B/key", "error", "p95"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in points:
        ratio = "" if each.exact_ms is None or each.step_ms is None else f"[bold]{each.exact_ms / each.step_ms:.1f}x"
        table.add_row(
            each.name,
            f"{each.step_ms:.2f}",
            ratio,
            f"{each.sampled_share:.2%}",
            f"{each.index_bytes_per_key:.0f}",
            f"{each.error:.3f}",
            f"{each.error_p95:.3f}",
        )
    return table
