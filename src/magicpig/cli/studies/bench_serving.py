"""`magicpig bench serving`: an endpoint under load."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from magicpig.cli.errors import InputError
from magicpig.cli.files import STDIO, OutputFile
from magicpig.cli.options import MOST_SEED, MOST_TOKENS, checked, whole_numbers
from magicpig.cli.studies.bench_options import JsonFile, write_results

if TYPE_CHECKING:
    from magicpig.studies.bench.serving import Result

KEY_VARIABLE = "MAGICPIG_API_KEY"


def serving(
    url: Annotated[str, typer.Option(help="Of the endpoint, up to and with /v1.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str | None, typer.Option(help="Its name there, for servers that need one.")] = None,
    requests: Annotated[int, typer.Option(min=1, max=100_000, help="How many to send.")] = 32,
    concurrency: Annotated[
        str, typer.Option(help="The most under way at a time; several, with commas between them, one after the other.")
    ] = "1,8",
    rate: Annotated[
        float | None,
        typer.Option(min=1e-6, max=1e6, help="Arrivals a second, at random times.", show_default="all at once"),
    ] = None,
    words: Annotated[str, typer.Option(help="The fewest and the most words of a prompt.")] = "10,4000",
    max_tokens: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Of each answer.")] = 64,
    hang_up: Annotated[
        float, typer.Option(min=0, max=1, help="Share of clients that leave after the first piece of text.")
    ] = 0.0,
    samplers: Annotated[
        str | None,
        typer.Option(
            help="Samplers to compare, as full,sketch:256,lsh:K=9,L=120: sent as magicpig's own field.",
            show_default="the server's",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of prompts and arrivals.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Send ragged prompts to any server with OpenAI's interface, and measure what its clients would see.

    An API key is taken from the environment variable MAGICPIG_API_KEY.
    """
    levels = whole_numbers(concurrency, "--concurrency")
    bounds = whole_numbers(words, "--words")
    if len(bounds) != 2:
        raise InputError(f"--words {words} must be two numbers")
    from magicpig.studies.bench.serving import Load, drive
    from magicpig.studies.evaluation.matrix import parse_methods

    names = [None] if samplers is None else [method.name for method in parse_methods(samplers)]
    to_stdout = json_file == STDIO
    console = Console(stderr=to_stdout)
    results: list[tuple[str, Result]] = []
    with OutputFile(None if to_stdout else json_file) as file:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            for name in names:
                extra: dict[str, Any] = {} if name is None else {"magicpig": {"sampler": name}}
                for level in levels:
                    load = checked(
                        Load,
                        requests=requests,
                        rate=math.inf if rate is None else rate,
                        concurrency=level,
                        words=(bounds[0], bounds[1]),
                        max_tokens=max_tokens,
                        hang_up=hang_up,
                        extra=extra,
                        seed=seed,
                    )
                    task = progress.add_task(f"{name or 'as the server does'}, {level} at a time", total=requests)
                    result = drive(
                        url,
                        load,
                        model=model,
                        api_key=os.environ.get(KEY_VARIABLE),
                        on_done=lambda _, task=task: progress.advance(task),  # type: ignore[misc]
                    )
                    results.append((name or "-", result))
        console.print(_table(results))
        write_results(
            {"url": url, "model": model, "requests": requests, "rate": rate, "words": bounds, "seed": seed},
            [
                {"sampler": name, "concurrency": result.load.concurrency, **result.summary()}
                | {"outcomes": [asdict(outcome) for outcome in result.outcomes]}
                for name, result in results
            ],
            file,
            to_stdout=to_stdout,
        )
    if all(outcome.error is not None for _, result in results for outcome in result.outcomes):
        raise InputError(f"nothing was answered by {url}: {results[0][1].outcomes[0].error}")


def _table(results: list[tuple[str, Result]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("sampler", "at a time", "errors", "new tokens/s"):
        table.add_column(name, justify="left" if name == "sampler" else "right")
    for name in ("first token, s", "next token, ms", "whole answer, s"):
        table.add_column(f"{name}\nmedian   95 %", justify="right")
    for name, result in results:
        found = result.summary()
        table.add_row(
            name,
            str(result.load.concurrency),
            str(found["errors"]),
            f"{found['new_tokens_per_s']:,.1f}",
            _pair(found, "first_token_s", 1),
            _pair(found, "next_token_s", 1000),
            _pair(found, "total_s", 1),
        )
    return table


def _pair(found: dict[str, float | int | None], name: str, unit: int) -> str:
    values = [found[f"{name}_{share}"] for share in ("p50", "p95")]
    return "  ".join("-" if value is None else f"{value * unit:,.2f}" for value in values)
