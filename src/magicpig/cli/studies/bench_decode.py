"""`magicpig bench decode`: tokens per second of a model."""

from __future__ import annotations

from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from magicpig.cli.errors import InputError
from magicpig.cli.files import STDIO, OutputFile
from magicpig.cli.options import MOST_REPEATS, MOST_STEPS, Dtype, KeptWeights, Weights, checked, whole_numbers
from magicpig.cli.settings import takes_settings
from magicpig.cli.studies.bench_decode_device import MOST_BATCH, MOST_GB, ON, on_device
from magicpig.cli.studies.bench_options import (
    Contexts,
    JsonFile,
    LlamaKinds,
    Samplers,
    Threads,
    llama_kinds,
    made_of,
    made_up_model,
    methods,
    opened_llamas,
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
    from magicpig.studies.bench.llama_cpp import Result as LlamaResult


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
    llama_cpp: LlamaKinds = None,
    device: Annotated[
        str, typer.Option(help="cpu; or cuda, cuda:1 and so on; or simulated, which times nothing.", rich_help_panel=ON)
    ] = "cpu",
    batch: Annotated[str, typer.Option(help="Requests decoded together; several numbers with commas.")] = "1",
    vram_limit: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=MOST_GB, help="GiB of the GPU's memory to do with. [default: all]", rich_help_panel=ON
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Tokens per second of a model's shape behind a long context, by samplers in turns.

    Weights are random and keys and values made up, so there is nothing to download and no prompt to wait for. The time
    of a token is split into the model's own layers, attention, indexing, the Python of this package, and transformers'
    loop around it. Medians, threads pinned to cores. With --llama-cpp, llama.cpp takes its turns among the samplers.

    With --device a step of the engine is timed instead, for all placements, beside full attention in the memory of the
    GPU, copied there layer by layer, and on the CPU.
    """
    to_stdout = json_file == STDIO
    batches = whole_numbers(batch, "--batch")
    if min(batches) < 1 or max(batches) > MOST_BATCH:
        raise InputError(f"--batch {batch}: must be from 1 to {MOST_BATCH}")
    if device == "cpu" and vram_limit is not None:
        raise InputError("--vram-limit goes with --device cuda")
    if device != "cpu" and (weights is not Weights.auto or threads is not None or llama_cpp is not None):
        raise InputError(f"--weights, --threads and --llama-cpp go without --device {device}")
    console = Console(stderr=to_stdout)
    from magicpig.studies.bench.shapes import settings as shape_settings
    from magicpig.studies.evaluation.matrix import parse_lengths

    checked(shape_settings, shape, layers)
    contexts = parse_lengths(context, "--context")
    compared = methods(samplers, (EXACT.sampler, *NATIVE), **settings)
    if device != "cpu":
        on_device(
            device,
            shape,
            layers,
            contexts,
            batches,
            compared,
            dtype=dtype,
            steps=steps * repeats,
            vram_limit=vram_limit,
            json_file=json_file,
            console=console,
        )
        return
    kinds = llama_kinds(llama_cpp)
    with OutputFile(None if to_stdout else json_file) as file:
        from magicpig.studies.bench.decode import describe
        from magicpig.studies.bench.llama_cpp import Turns

        decoder = made_up_model(shape, layers, dtype, weights, contexts=contexts, steps=steps, threads=threads)
        for tokens in contexts:
            checked(decoder.check, tokens, compared, max(batches))
        results, others = [], []
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("Generating", total=None)
            for tokens, together in product(contexts, batches):
                with opened_llamas(kinds, decoder.model_config, longest=tokens + steps + 2, batch=together) as llamas:
                    turns = [checked(Turns, llama, tokens, steps) for llama in llamas]
                    results += decoder.measure(
                        tokens,
                        compared,
                        repeats=repeats,
                        batch=together,
                        beside=turns,
                        on_round=lambda: progress.advance(task),
                    )
                    others += [each.result() for each in turns]
        described = describe(decoder, shape, repeats)
        if others:
            described["llama_cpp"] = [asdict(each) for each in others]
        write_results(described, [asdict(result) for result in results], file, to_stdout=to_stdout)
    console.print(_table(results, others))
    say_if_busy(console, [*results, *others])
    say_if_slow_baseline(console, ((each.read_ms, each.attention_ms) for each in results))
    console.print(
        f"[dim]ms per token, medians of {repeats * steps} tokens; ours: Python of this package, per layer in "
        f"microseconds; loop: transformers' around the forward pass; " + made_of(decoder, dtype, described)
    )


def _table(results: list[Result], others: list[LlamaResult]) -> Table:
    batches = len({each.batch for each in results}) > 1
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("keys", justify="right", no_wrap=True)
    if batches:
        table.add_column(" batch", justify="right", no_wrap=True)
    table.add_column(" sampler", no_wrap=True)
    for name in ("tokens/s", "vs full", "token", "weights", "attention", "index", "loop", "ours", "us/layer"):
        table.add_column(name, justify="right", no_wrap=" " not in name)
    rows: list[tuple[tuple[int, int], list[str]]] = []
    for each in results:
        row = [
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
        ]
        rows.append(((each.context, each.batch), row))
    for other in others:
        row = [f" {other.name}", f"[bold]{other.tokens_per_s:.2f}", "", f"{other.token_ms:.1f}"]
        rows.append(((other.context, other.batch), row))
    order = list(dict.fromkeys(place for place, _ in rows))
    for (context, batch), row in sorted(rows, key=lambda each: order.index(each[0])):
        table.add_row(short_length(context), *([str(batch)] if batches else []), *row)
    return table
