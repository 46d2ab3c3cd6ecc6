"""`magicpig capture`: keys, values and queries of a model that reads a text, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from magicpig.cli.errors import InputError
from magicpig.cli.files import OutputFile, read_text
from magicpig.cli.options import (
    MOST_SAMPLES,
    MOST_SEED,
    MOST_STEPS,
    MOST_TOKENS,
    Dtype,
    ModelDtype,
    ModelOrPocket,
    PrefillChunk,
    checked,
    or_pocket,
    whole_numbers,
)
from magicpig.cli.report import prefill_progress
from magicpig.cli.settings import takes_opening
from magicpig.machine import versions

TEXT = "What the model reads"
TASK_LENGTH = 16384


@takes_opening
def capture(
    *,
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    model: ModelOrPocket = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file to read; - is standard input.", rich_help_panel=TEXT)
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Or a generated text, of this task; see `magicpig eval tasks`.", rich_help_panel=TEXT),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(
            help="Read this many tokens of the text, as 16384 or 16K; of a task, prompt and answer together. "
            "[default: all, of a task 16K]",
            rich_help_panel=TEXT,
        ),
    ] = None,
    index: Annotated[
        int, typer.Option(min=0, max=MOST_SAMPLES, help="Which sample of the task.", rich_help_panel=TEXT)
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of the task.", rich_help_panel=TEXT)] = 0,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MOST_TOKENS,
            help="Let the model write this many tokens behind the text, or fewer where it stops. "
            "[default: none, after a task as many as --steps]",
            rich_help_panel=TEXT,
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers to keep, separated by commas, or all. [default: four, evenly spread]")
    ] = None,
    kv_heads: Annotated[
        str | None, typer.Option(help="Key/value heads to keep, separated by commas. [default: all]")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Keep the queries of this many last tokens.")] = 8,
    dtype: ModelDtype = Dtype.auto,
    prefill_chunk: PrefillChunk = 1024,
    opening: dict[str, Any],
) -> None:
    """Keep what attention computes with while a local model reads a text.

    The text is read exactly. The file holds the keys and values of all tokens and the queries of the last ones,
    layer by layer; `magicpig.studies.capture.load_capture` reads it. After a task, these are the queries of the answer.
    """
    if (text is None) == (task is None):
        raise InputError("pass either --text or --task")
    from magicpig.studies.evaluation.matrix import parse_lengths
    from magicpig.studies.evaluation.tasks import find_task

    chosen = None if layers in (None, "all") else whole_numbers(layers, "--layers", " nor all")
    heads = None if kv_heads is None else whole_numbers(kv_heads, "--kv-heads")
    wanted = None if length is None else parse_lengths(length)[0]
    if task is not None:
        find_task(task)
    content = read_text(text) if text is not None else None
    if new_tokens is None:
        new_tokens = 0 if task is None else steps
    notes = Console(stderr=True)
    with OutputFile(out) as file:
        directory = or_pocket(model, notes)
        with notes.status("Loading the model"):
            from magicpig import generation
            from magicpig.studies.capture import Capture
            from magicpig.studies.capture.record import full_layers, record
            from magicpig.studies.evaluation.tasks import generate

            generation.silence_transformers()
            opened = generation.open_model(directory, **opening)
            if content is not None:
                ids = generation.encode(opened, content, most=wanted)
            else:
                sample = checked(generate, task, opened.tokenizer, wanted or TASK_LENGTH, index=index, seed=seed)
                ids = generation.encode(opened, sample.prompt, new_tokens=new_tokens)
            network = generation.load(opened, dtype=dtype.value)
        with prefill_progress(notes) as progress:
            reading = progress.add_task("Reading the text", total=len(ids))
            sets = record(
                network,
                ids,
                layers=full_layers(opened.config) if layers == "all" else chosen,
                kv_heads=heads,
                steps=steps,
                new_tokens=new_tokens,
                stop=generation.stop_tokens(opened, network),
                chunk=prefill_chunk,
                on_prefill=lambda tokens: progress.advance(reading, tokens),
            )
        about = {
            "model": opened.directory.resolve().name,
            "model_type": opened.config.model_type,
            "text": {"file": text.name}
            if text
            else {"task": task, "length": sample.length, "index": index, "seed": seed},
            "tokens_read": len(ids),
            "kv_heads": heads,
            "versions": versions(),
        }
        data = Capture(sets, about).to_bytes()
        file.write(data)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    each = next(iter(sets.values()))
    table.add_row("layers", ", ".join(str(layer) for layer in sets))
    table.add_row("tokens", f"{each.tokens:,}, queries of the last {each.steps}")
    table.add_row("heads", f"{each.heads} query heads, {each.kv_heads} key/value heads of {each.keys.shape[2]}")
    table.add_row("file", f"{out}, {len(data) / 1e6:,.1f} MB of {str(each.keys.dtype).removeprefix('torch.')}")
    notes.print(table)
