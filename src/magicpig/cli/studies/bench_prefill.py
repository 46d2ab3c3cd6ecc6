"""`magicpig bench prefill`: tokens per second of reading a prompt."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from magicpig.cli.files import STDIO, OutputFile
from magicpig.cli.options import MOST_REPEATS, MOST_TOKENS, Dtype, KeptWeights, Weights, checked
from magicpig.cli.studies.bench_options import (
    Contexts,
    JsonFile,
    LlamaKinds,
    Threads,
    llama_kinds,
    made_of,
    made_up_model,
    opened_llamas,
    say_if_busy,
    short_length,
    write_results,
)
from magicpig.model_dir import MOST_PARTS
from magicpig.studies.bench.shapes import SHAPES

if TYPE_CHECKING:
    from magicpig.studies.bench.llama_cpp import ReadResult
    from magicpig.studies.bench.prefill import Result


def prefill(
    *,
    shape: Annotated[str, typer.Option(help=f"A model's sizes: {', '.join(SHAPES)}.")] = "llama-3.2-1b",
    layers: Annotated[
        int | None, typer.Option(min=1, max=MOST_PARTS, help="Its first so many layers. [default: all]")
    ] = None,
    context: Contexts = "1K,8K,32K",
    tokens: Annotated[int, typer.Option(min=2, max=MOST_TOKENS, help="New tokens that are read at a time.")] = 1024,
    dtype: Annotated[Dtype, typer.Option(help="Of weights, keys and values.")] = Dtype.bfloat16,
    weights: KeptWeights = Weights.auto,
    repeats: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="Passes at each depth.")] = 3,
    threads: Threads = None,
    llama_cpp: LlamaKinds = None,
    json_file: JsonFile = None,
) -> None:
    """Tokens per second of reading a prompt of a model's shape, at several depths of it.

    Weights are random and what was read before is made up, so there is nothing to download. The rate of attention is
    told beside that of a plain product of matrices, which it cannot exceed. Medians, threads pinned to cores. With
    --llama-cpp, llama.cpp reads as many tokens at the same depths.
    """
    to_stdout = json_file == STDIO
    console = Console(stderr=to_stdout)
    from magicpig.studies.bench.shapes import settings as shape_settings
    from magicpig.studies.evaluation.matrix import parse_lengths

    checked(shape_settings, shape, layers)
    contexts = parse_lengths(context, "--context")
    kinds = llama_kinds(llama_cpp)
    with OutputFile(None if to_stdout else json_file) as file:
        from magicpig.studies.bench.decode import describe
        from magicpig.studies.bench.llama_cpp import measure_reading
        from magicpig.studies.bench.prefill import measure

        decoder = made_up_model(shape, layers, dtype, weights, contexts=contexts, steps=tokens, threads=threads)
        results, others = [], []
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("Reading", total=None)
            for depth in contexts:
                results.append(
                    checked(measure, decoder, depth, tokens, repeats=repeats, on_round=lambda: progress.advance(task))
                )
            if kinds:
                longest = max(contexts) + tokens
                with opened_llamas(kinds, decoder.model_config, longest=longest) as llamas:
                    for depth, llama in product(contexts, llamas):
                        others.append(
                            checked(
                                measure_reading,
                                llama,
                                depth,
                                tokens,
                                repeats=repeats,
                                on_round=lambda: progress.advance(task),
                            )
                        )
        described = describe(decoder, shape, repeats)
        if others:
            described["llama_cpp"] = [asdict(each) for each in others]
        write_results(described, [asdict(result) for result in results], file, to_stdout=to_stdout)
    console.print(_table(results, others))
    say_if_busy(console, [*results, *others])
    console.print(
        f"[dim]medians of {repeats} passes of {tokens} tokens; rates in 10^9 operations a second; "
        + made_of(decoder, dtype, described)
    )


def _table(results: list[Result], others: list[ReadResult]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in ("depth", "tokens/s", "ms a pass", "attention", "its rate", "a product's"):
        table.add_column(name if name == "depth" else f"  {name}", justify="right", no_wrap=True)
    for each in results:
        table.add_row(
            short_length(each.context),
            f"[bold]{each.tokens_per_s:,.1f}",
            f"{each.pass_ms:,.0f}",
            f"{each.attention_ms:,.0f}",
            f"{each.attention_gflops:,.0f}",
            f"{each.product_gflops:,.0f}",
        )
    for other in others:
        table.add_row(
            short_length(other.context), f"[bold]{other.tokens_per_s:,.1f}", f"{other.pass_ms:,.0f}", other.name
        )
    return table
