"""`magicpig bench`: numbers that others can repeat."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from magicpig.cli.errors import InputError
from magicpig.cli.files import STDIO, OutputFile
from magicpig.cli.options import Dtype, checked
from magicpig.config import Config

if TYPE_CHECKING:
    from magicpig.bench.attention import Result

PINNED = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}


def pin_threads() -> None:
    """Bind each thread to a core: with two roaming threads, medians were four times worse than with one.

    OpenMP reads these variables when torch is imported, so it must not have been yet. What the user has set stays.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in PINNED):
        os.environ.update(PINNED)


def attention(
    context: Annotated[str, typer.Option(help="Tokens in the cache; several numbers separated by commas.")] = "32768",
    setting: Annotated[
        list[str] | None, typer.Option(help="K,L of the hash tables; may be given several times. [default: 10,150]")
    ] = None,
    sampler: Annotated[Literal["lsh", "full"], typer.Option(help="The sampler to measure; only lsh samples.")] = "lsh",
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key/value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Length of a query, key or value.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Requests decoded together.")] = 1,
    dtype: Annotated[Dtype, typer.Option(help="Of queries, keys and values.")] = Dtype.bfloat16,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds over all query steps.")] = 24,
    steps: Annotated[int, typer.Option(min=1, help="Different query steps in a round.")] = 8,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; as many as torch takes by default.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file; - is standard output.")
    ] = None,
) -> None:
    """Time one decode step of one attention layer: sampled, exact, torch's, and a plain read of the bytes.

    Interleaved in one process, caches cold, threads pinned to cores, medians. Checks the results first.
    """
    contexts = [_number(part, "--context") for part in context.split(",")]
    configs = [_config(text) for text in setting or ["10,150"]]
    if sampler == "full":
        raise InputError("--sampler full has no step to measure: exact attention is in every run")
    if dtype is Dtype.auto:
        raise InputError("--dtype auto is for models; choose float32, bfloat16 or float16")

    to_stdout = json_file == STDIO
    console = Console(stderr=to_stdout)
    with OutputFile(None if to_stdout else json_file) as file:
        import torch

        from magicpig.bench import attention as bench

        if threads is not None:
            torch.set_num_threads(threads)
        shape = checked(bench.Shape, heads, kv_heads, head_dim, batch, getattr(torch, dtype.value))
        for tokens in contexts:
            checked(bench.check_context, tokens, configs, shape)
        results = []
        try:
            bench.verify_kernels(shape)
            with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
                task = progress.add_task("Measuring", total=len(contexts) * len(configs) * repeats)
                for tokens in contexts:
                    results += bench.run(
                        tokens, configs, shape, repeats=repeats, steps=steps, on_round=lambda: progress.advance(task)
                    )
        except bench.WrongResultError as error:
            print(f"magicpig: no timing, the results are wrong: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        described = bench.describe(shape, configs[0], repeats, steps)
        answer = json.dumps(described | {"results": [asdict(result) for result in results]}, indent=2)
        if to_stdout:
            print(answer)
        file.write(answer + "\n")
    console.print(_table(results))
    console.print(
        f"[dim]ms per layer and step, medians of {repeats * steps} calls; {heads} query heads, {kv_heads} key/value "
        f"heads, head dim {head_dim}, batch {batch}, {dtype.value}; {described['isa']}, {described['threads']} "
        f"threads ({described['pool']} pool), {described['machine']}"
    )


def _table(results: list[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in ("context", "K,L", "step", "exact", "sdpa", "stream", "vs exact", "vs sdpa", "sampled", "error"):
        table.add_column(name, justify="right")
    for each in results:
        table.add_row(
            f"{each.context:,}",
            f"{each.K},{each.L}",
            f"{each.step_ms:.2f}",
            f"{each.exact_ms:.2f}",
            f"{each.sdpa_ms:.2f}",
            f"{each.stream_ms:.2f}",
            f"[bold]{each.ratio_exact:.1f}x",
            f"[bold]{each.ratio_sdpa:.1f}x",
            f"{each.sampled_share:.2%}",
            f"{each.error:.3f}",
        )
    return table


def _config(setting: str) -> Config:
    parts = setting.split(",")
    if len(parts) != 2:
        raise InputError(f"--setting {setting!r} is not two numbers K,L")
    K, L = (_number(part, "--setting") for part in parts)
    # However short the context, it is the sampled step that is to be measured.
    return checked(Config, K=K, L=L, exact_below=0)


def _number(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option}: {text!r} is not a whole number") from None
