"""`magicpig bench attention`: one decode step of one layer."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from magicpig.cli.files import STDIO, OutputFile
from magicpig.cli.options import MOST_REPEATS, MOST_STEPS, MOST_TOKENS, Dtype, checked
from magicpig.cli.settings import takes_settings
from magicpig.cli.studies.bench_options import (
    MOST_HEADS,
    Contexts,
    JsonFile,
    Samplers,
    Threads,
    methods,
    say_if_busy,
    say_if_slow_baseline,
    short_length,
    torch_dtype,
    write_results,
)
from magicpig.config import NATIVE

if TYPE_CHECKING:
    from magicpig.studies.bench.attention import Result


@takes_settings("budget", "candidates", "bits")
def attention(
    *,
    context: Contexts = "32K",
    samplers: Samplers = "lsh,sketch",
    settings: dict[str, Any],
    heads: Annotated[int, typer.Option(min=1, max=MOST_HEADS, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, max=MOST_HEADS, help="Key/value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Length of a query, key or value.")] = 128,
    batch: Annotated[int, typer.Option(min=1, max=MOST_HEADS, help="Requests decoded together.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Of queries, keys and values.")] = Dtype.bfloat16,
    repeats: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="Rounds over all query steps.")] = 24,
    steps: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Different query steps in a round.")] = 8,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Time one decode step of one attention layer: sampled, exact, torch's, and a plain read of the bytes.

    Interleaved in one process, caches cold, threads pinned to cores, medians. Checks the results first.
    """
    to_stdout = json_file == STDIO
    console = Console(stderr=to_stdout)
    from magicpig.studies.evaluation.matrix import parse_lengths

    contexts = parse_lengths(context, "--context")
    configs = [method.config for method in methods(samplers, NATIVE, **settings)]
    with OutputFile(None if to_stdout else json_file) as file:
        import torch

        from magicpig.studies.bench import attention as bench
        from magicpig.studies.bench.layer import Shape, check_context, verify_kernels

        shape = checked(Shape, heads, kv_heads, head_dim, batch, torch_dtype(dtype))
        for tokens in contexts:
            checked(check_context, tokens, configs, shape)
        if threads is not None:
            torch.set_num_threads(threads)
        results = []
        verify_kernels(shape)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("Measuring", total=len(contexts) * len(configs) * repeats)
            for tokens in contexts:
                results += bench.run(
                    tokens, configs, shape, repeats=repeats, steps=steps, on_round=lambda: progress.advance(task)
                )
        described = bench.describe(shape, configs[0], repeats, steps)
        write_results(described, [asdict(result) for result in results], file, to_stdout=to_stdout)
    console.print(_table(results))
    say_if_busy(console, results)
    say_if_slow_baseline(console, ((each.stream_ms, each.exact_ms) for each in results))
    console.print(
        f"[dim]ms per layer and step, medians of {repeats * steps} calls; {heads} query heads, {kv_heads} key/value "
        f"heads, head dim {head_dim}, batch {batch}, {dtype.value}; {described['isa']}, {described['threads']} "
        f"threads ({described['pool']} pool), {described['machine']}"
    )


def _table(results: list[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("keys", justify="right", no_wrap=True)
    table.add_column("sampler", no_wrap=True)
    for name in ("step", "exact", "sdpa", "read", "vs\nexact", "vs\nsdpa", "rows", "B/key", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in results:
        name = f"lsh {each.K},{each.L}" if each.K is not None else f"sketch {each.budget:g} {each.bits}bit"
        table.add_row(
            short_length(each.context),
            name + ("" if each.kv_dtype == "model" else f" {each.kv_dtype}"),
            f"{each.step_ms:.2f}",
            f"{each.exact_ms:.2f}",
            f"{each.sdpa_ms:.2f}",
            f"{each.stream_ms:.2f}",
            f"[bold]{each.ratio_exact:.1f}x",
            f"[bold]{each.ratio_sdpa:.1f}x",
            f"{each.sampled_share:.2%}",
            f"{each.index_bytes_per_key:.0f}",
            f"{each.error:.3f}",
        )
    return table
