"""`magicpig demo`: see it work, with nothing to download."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from magicpig.cli.errors import InputError
from magicpig.cli.files import read_text
from magicpig.cli.report import cache_as_dict, prefill_progress

if TYPE_CHECKING:
    from magicpig.demo import Demo


def demo(
    file: Annotated[
        Path | None, typer.Option(help="A UTF-8 text to read; this project's documentation by default.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How much to read; a token is one byte.")] = 32768,
    new_tokens: Annotated[int, typer.Option(min=3, help="How much to write.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object; all else goes to stderr.")] = False,
) -> None:
    """Let a small random model read a long document, and compare sampled with full attention.

    Shows speed, memory, the share of keys read and the error of attention, layer by layer. Takes a minute or two.
    """
    text = None if file is None else read_text(file)
    if text == "":
        raise InputError(f"{file} is empty")
    console = Console(stderr=as_json, highlight=False)
    with console.status("Building the model"):
        from magicpig import demo as demonstration

        source, default_text = demonstration.project_text()
        model = demonstration.build_model(demonstration.fast_dtype())
    with prefill_progress(console) as progress:
        reading = progress.add_task("Reading the document", total=tokens)
        result = demonstration.run(
            default_text if text is None else text,
            source if file is None else str(file),
            tokens=tokens,
            new_tokens=new_tokens,
            model=model,
            on_prefill=lambda count: progress.advance(reading, count),
        )
    if as_json:
        described = asdict(result) | {
            "config": result.config.model_dump(mode="json"),
            "report": cache_as_dict(result.report),
            "prefill_tokens_per_s": result.prefill_tokens_per_s,
        }
        print(json.dumps(described, indent=2))
    else:
        _show(result, console)


def _show(result: Demo, console: Console) -> None:
    report, mib = result.report, 2**20
    repeated = ", repeated because it is too short" if result.repeated else ""
    console.print(f"Read {result.tokens:,} bytes of {escape(result.document)}{repeated},")
    console.print(
        f"with a Llama of {result.parameters / 1e6:.1f} M random weights ({result.dtype}): "
        f"{result.prefill_s:.1f} s, {result.prefill_tokens_per_s:,.0f} tokens/s; "
        f"indexed in {result.index_s:.2f} s.\n"
    )

    speed = Table("", "full attention", f"sampled, K={result.config.K} L={result.config.L}", "")
    for column in speed.columns[1:]:
        column.justify = "right"
    speed.add_row(
        "one token",
        f"{result.full_ms:.1f} ms",
        f"{result.sampled_ms:.1f} ms",
        f"{result.full_ms / result.sampled_ms:.1f}x faster",
    )
    speed.add_row("tokens per second", f"{1e3 / result.full_ms:.1f}", f"{1e3 / result.sampled_ms:.1f}", "")
    speed.add_row(
        "read per token",
        f"{report.full_step_bytes / mib:.1f} MiB",
        f"{report.read_step_bytes / mib:.1f} MiB",
        f"{report.read_step_bytes / report.full_step_bytes:.1%}",
    )
    speed.add_row("keys and values", f"{report.kv_bytes / mib:.1f} MiB", f"{report.kv_bytes / mib:.1f} MiB", "")
    speed.add_row("index", "", f"{report.index_bytes / mib:.1f} MiB", "")
    console.print(speed)

    layers = Table("layer", "attention", "keys sampled", "at most", "output error", "at most")
    for column in layers.columns:
        column.justify = "right"
    for layer, error in zip(report.layers, result.errors, strict=True):
        mean, largest = layer.sampled_share_mean, layer.sampled_share_max
        layers.add_row(
            str(layer.layer),
            "exact" if mean is None else "sampled",
            "all" if mean is None else f"{mean:.2%}",
            "all" if largest is None else f"{largest:.2%}",
            f"{error.mean:.1e}",
            f"{error.max:.1e}",
        )
    console.print(layers)
    console.print(
        f"Sampled attention chose the same next token as full attention in {result.same_token} "
        f"of {result.new_tokens - 1} steps."
    )
    console.print(
        "[dim]The error is relative to exact attention given the same query. Random weights spread attention nearly "
        "evenly over all tokens, so it is what the size of the sample alone gives, about one over its square root; "
        "the text that was written means nothing."
    )
