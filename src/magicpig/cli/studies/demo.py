"""`magicpig demo`: see it work, with nothing to download."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from magicpig.cli.options import MOST_SEED, MOST_TOKENS, or_pocket
from magicpig.cli.report import prefill_progress
from magicpig.wording import counted, printable

if TYPE_CHECKING:
    from magicpig.studies.demo import Demo

LENGTH = 32768  # tokens
SHOWN = 40  # characters of an answer


def demo(
    model: Annotated[
        Path | None, typer.Option(help="Directory of a transformers model; the one in this package by default.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_TOKENS,
            help="Length of each document, question and answer included.",
            show_default="32768, or what the model can read",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of the documents.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; all else goes to stderr.")] = False,
) -> None:
    """Ask a small model about two long documents, with full attention and with a sample of the keys side by side.

    Shows the answers, right or wrong, the share of keys that was read, and the speed. Takes a minute or two.
    """
    console = Console(stderr=as_json, highlight=False)
    directory = or_pocket(model)
    with console.status("Writing the documents"):
        from magicpig import generation
        from magicpig.studies import demo as demonstration

        generation.silence_transformers()
        opened = generation.open_model(directory)
    with prefill_progress(console) as progress:
        bar = progress.add_task("Writing the documents", total=None)
        result = demonstration.run(
            opened,
            tokens=min(LENGTH, opened.limit or LENGTH) if tokens is None else tokens,
            seed=seed,
            on_start=lambda about, count: progress.reset(bar, description=f"Reading {about}", total=count),
            on_read=lambda count: progress.advance(bar, count),
        )
    if as_json:
        described = asdict(result)
        for method in described["performance"]:
            method["config"] = method["config"].model_dump(mode="json")
        print(json.dumps(described, indent=2))
    else:
        _show(result, console)


def _show(result: Demo, console: Console) -> None:
    names = [method.method for method in result.performance]
    console.print(f"{escape(printable(result.model))}: {result.parameters / 1e6:.1f} M weights, {result.dtype}\n")
    for number, document in enumerate(result.documents, 1):
        console.print(
            f"Document {number}: {document.about}; {counted(document.tokens, 'token')}, "
            f"read in {document.read_s:.1f} s, {document.tokens / document.read_s:,.0f} tokens/s"
        )
        table = Table("question", "right answer", *names, box=box.SIMPLE_HEAD, pad_edge=False)
        for question in document.questions:
            given = [_marked(*each) for each in zip(question.said, question.scores, strict=True)]
            # The last sentence; those before it say how to answer.
            asked = question.text.rpartition(". ")[2]
            table.add_row(escape(asked), escape(", ".join(question.expected)), *given)
        console.print(table)

    mib = 2**20
    questions = [question for document in result.documents for question in document.questions]
    table = Table("", *names, box=box.SIMPLE_HEAD, pad_edge=False)
    right = [sum(question.scores[method] == 1 for question in questions) for method in range(len(names))]
    table.add_row("right answers", *(f"{count} of {len(questions)}" for count in right))
    table.add_row(
        "keys read per step",
        *(
            "all" if m.share_mean is None else f"{m.share_mean:.1%}, at most {m.share_max:.1%}"
            for m in result.performance
        ),
    )
    table.add_row("tokens per second", *(f"{method.tokens_per_s:.1f}" for method in result.performance))
    table.add_row(
        "index",
        *(f"{m.index_bytes / mib:.1f} MiB in {m.index_s:.1f} s" if m.index_bytes else "" for m in result.performance),
    )
    console.print(table)
    budget = result.performance[-1].config.budget
    layers = f"layers {', '.join(map(str, result.sampled_layers)) or 'none'} of {result.layers}; the rest read all keys"
    if len(result.sampled_layers) == result.layers:
        layers = f"all {result.layers} layers"
    console.print(f"[dim]Sampled: {budget:g} keys a step by a sketch, {layers}.")


def _marked(said: str, score: float) -> str:
    text = printable(said)
    text = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
    sign = "[green]right[/]" if score == 1 else "[red]wrong[/]" if score == 0 else f"[yellow]{score:.0%} right[/]"
    return f"{sign}: {escape(text)}"
