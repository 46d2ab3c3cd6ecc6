"""`magicpig eval`: how good are the answers of sampled attention?"""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from magicpig.cli.commands import CommandGroup
from magicpig.cli.errors import InputError
from magicpig.cli.files import OutputFile
from magicpig.cli.options import (
    MOST_SAMPLES,
    MOST_SEED,
    MOST_TOKENS,
    Dtype,
    ModelDtype,
    ModelOrPocket,
    or_pocket,
)
from magicpig.cli.settings import takes_opening, takes_settings
from magicpig.cli.studies.command import StudyCommand
from magicpig.cli.studies.progress import run_evaluation

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import JustifyMethod

    from magicpig.studies.evaluation.results import Results
    from magicpig.studies.evaluation.table import Table as ResultsTable

WHAT = "What is evaluated"
HOW = "How"
DATA = "Data"

MOST_JOBS = 1024
SAMPLERS = "full,window,topk:512,quest:512,oracle:512,lsh:K=10,L=150,lsh:K=9,L=120,sketch:256,sketch:512,sketch:1024"
_NAMES = 2  # columns of a results table that name a row

evaluate = typer.Typer(cls=CommandGroup, help="Evaluate answers: tasks with known answers, samplers side by side.")


class ChatTemplate(str, Enum):
    """Whether prompts are wrapped as a user's message; auto does so where the tokenizer has a template."""

    auto = "auto"
    on = "on"
    off = "off"


@evaluate.command(cls=StudyCommand)
@takes_settings("dense_layers", "exact_below", exact_below=0)
@takes_opening
def ruler(
    *,
    out: Annotated[Path, typer.Option(help="The results file, JSON lines. A run goes on where it was stopped.")],
    model: ModelOrPocket = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks and groups of them, separated by commas; see `magicpig eval tasks`.", rich_help_panel=WHAT
        ),
    ] = "generated",
    lengths: Annotated[
        str, typer.Option(help="Tokens of prompt and answer together, as 32768 or 32K.", rich_help_panel=WHAT)
    ] = "4K",
    samplers: Annotated[
        str,
        typer.Option(
            help="Samplers with their settings, for example full,lsh,lsh:K=9,L=120,topk:0.02,tuned.json: a bare number "
            "is the budget, rows per head and step or a share of the keys; a file is one of `magicpig tune`.",
            rich_help_panel=WHAT,
        ),
    ] = "full,sketch",
    protocol: Annotated[
        str,
        typer.Option(
            help="question-dense: the whole prompt is read exactly. question-sparse: only the document is, question "
            "and answer are sampled. Or both.",
            rich_help_panel=WHAT,
        ),
    ] = "question-dense",
    samples: Annotated[
        int,
        typer.Option(
            min=1, max=MOST_SAMPLES, help="Samples per task and length; a file of fewer goes on.", rich_help_panel=WHAT
        ),
    ] = 10,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of the tasks.", rich_help_panel=WHAT)] = 0,
    settings: dict[str, Any],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_TOKENS, help="Shorten answers below what the task allows.", rich_help_panel=HOW),
    ] = None,
    chat_template: Annotated[
        ChatTemplate, typer.Option(help="Wrap prompts as a user's message for a chat model.", rich_help_panel=HOW)
    ] = ChatTemplate.auto,
    dtype: Annotated[
        Dtype,
        typer.Option(help="What the model computes in; auto is what its weights are stored in.", rich_help_panel=HOW),
    ] = Dtype.auto,
    prefill_chunk: Annotated[
        int, typer.Option(min=64, max=MOST_TOKENS, help="Tokens read at a time.", rich_help_panel=HOW)
    ] = 1024,
    jobs: Annotated[
        int,
        typer.Option(min=1, max=MOST_JOBS, help="Processes that share samples and processors.", rich_help_panel=HOW),
    ] = 1,
    opening: dict[str, Any],
    filler: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 text to hide needles in, instead of made-up text.", rich_help_panel=DATA),
    ] = None,
    squad: Annotated[Path | None, typer.Option(help="SQuAD v2 questions, for qa_1.", rich_help_panel=DATA)] = None,
    hotpotqa: Annotated[Path | None, typer.Option(help="HotpotQA questions, for qa_2.", rich_help_panel=DATA)] = None,
) -> None:
    """Ask a local model the tasks of RULER (arXiv 2404.06654), with full and with sampled attention side by side.

    Each text is read once and shared by all samplers. Stop the run whenever you like; the same command goes on.
    """
    notes = Console(stderr=True, highlight=False)
    from magicpig.studies.evaluation import matrix as matrices
    from magicpig.studies.evaluation.tasks import Sources

    chosen = matrices.parse_tasks(tasks), matrices.parse_lengths(lengths)
    methods = matrices.parse_methods(samplers, **settings)
    protocols = matrices.parse_protocols(protocol)
    directory = or_pocket(model, notes)
    with notes.status("Looking into the model and the data"):
        from magicpig import generation
        from magicpig.studies.evaluation import run

        generation.silence_transformers()
        opened = generation.open_model(directory, **opening)
        templated = chat_template is ChatTemplate.auto and bool(opened.tokenizer.chat_template)
        matrix = matrices.Matrix(
            *chosen,
            methods,
            protocols,
            samples=samples,
            seed=seed,
            chat=templated or chat_template is ChatTemplate.on,
            new_tokens=max_new_tokens,
            sources=Sources(filler, squad, hotpotqa),
        )
    how = {"dtype": dtype.value, "chunk": prefill_chunk, "jobs": jobs}
    _show(run_evaluation(run.evaluate, opened, matrix, out, notes, **how))


@evaluate.command(cls=StudyCommand)
@takes_settings("dense_layers", "exact_below", exact_below=0)
@takes_opening
def perplexity(
    *,
    out: Annotated[Path, typer.Option(help="The results file, JSON lines. A run goes on where it was stopped.")],
    model: ModelOrPocket = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A UTF-8 text; may be given several times. [default: prose of two books, and code]",
            rich_help_panel=WHAT,
        ),
    ] = None,
    lengths: Annotated[
        str,
        typer.Option(help="Tokens of a text, those that are decoded included, as 4096 or 4K.", rich_help_panel=WHAT),
    ] = "4K",
    decoded: Annotated[
        int,
        typer.Option(min=1, max=MOST_TOKENS, help="Tokens at the end that are decoded.", rich_help_panel=WHAT),
    ] = 256,
    samplers: Annotated[
        str, typer.Option(help="Samplers with their settings, as of `eval ruler`.", rich_help_panel=WHAT)
    ] = SAMPLERS,
    settings: dict[str, Any],
    dtype: Annotated[
        Dtype,
        typer.Option(help="What the model computes in; bfloat16 has errors of its own.", rich_help_panel=HOW),
    ] = Dtype.float32,
    prefill_chunk: Annotated[
        int, typer.Option(min=64, max=MOST_TOKENS, help="Tokens read at a time.", rich_help_panel=HOW)
    ] = 1024,
    opening: dict[str, Any],
) -> None:
    """How much samplers change what a model says next, along real texts.

    Each text is read exactly, but for its end, of which every token is decoded by each sampler, given the true ones
    before it. What the next token then may be is compared with full attention.
    """
    notes = Console(stderr=True, highlight=False)
    from magicpig.studies.evaluation import matrix as matrices

    methods = matrices.parse_methods(samplers, **settings)
    parsed = matrices.parse_lengths(lengths)
    directory = or_pocket(model, notes)
    from magicpig.studies.evaluation import perplexity as study

    plan = study.Plan(tuple(text or study.TEXTS), parsed, methods, decoded)
    with notes.status("Looking into the model and the texts"):
        from magicpig import generation

        generation.silence_transformers()
        opened = generation.open_model(directory, **opening)
    how = {"dtype": dtype.value, "chunk": prefill_chunk}
    _show(run_evaluation(study.evaluate, opened, plan, out, notes, **how))


@evaluate.command(cls=StudyCommand)
@takes_opening
def recall(
    *,
    out: Annotated[Path, typer.Option(help="The results file, JSON lines. A run goes on where it was stopped.")],
    model: ModelOrPocket = None,
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text. [default: prose that comes along]", rich_help_panel=WHAT)
    ] = None,
    prompt: Annotated[
        int, typer.Option(min=2, max=MOST_TOKENS, help="Tokens that are read as a prompt.", rich_help_panel=WHAT)
    ] = 512,
    decoded: Annotated[
        int, typer.Option(min=64, max=MOST_TOKENS, help="Tokens behind it that are decoded.", rich_help_panel=WHAT)
    ] = 4352,
    needles: Annotated[int, typer.Option(min=1, max=100, help="Needles among these.", rich_help_panel=WHAT)] = 4,
    samples: Annotated[
        int, typer.Option(min=1, max=MOST_SAMPLES, help="Times, with other needles.", rich_help_panel=WHAT)
    ] = 1,
    samplers: Annotated[
        str, typer.Option(help="Samplers with their settings, as of `eval ruler`.", rich_help_panel=WHAT)
    ] = "full,window,lsh,sketch",
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of the needles.", rich_help_panel=WHAT)] = 0,
    dtype: ModelDtype = Dtype.auto,
    opening: dict[str, Any],
) -> None:
    """Whether a model finds again what stands in its own answer, far behind the prompt.

    A text is decoded token by token, as if the model had written it, with needles in it that are asked for at the end.
    """
    notes = Console(stderr=True, highlight=False)
    from magicpig.studies.evaluation import matrix as matrices

    methods = matrices.parse_methods(samplers, exact_below=0)
    directory = or_pocket(model, notes)
    from magicpig.studies.evaluation import perplexity
    from magicpig.studies.evaluation import recall as study

    plan = study.Plan(text or perplexity.TEXTS[-1], methods, prompt, decoded, needles, samples, seed)
    with notes.status("Looking into the model and the text"):
        from magicpig import generation

        generation.silence_transformers()
        opened = generation.open_model(directory, **opening)
    _show(run_evaluation(study.evaluate, opened, plan, out, notes, dtype=dtype.value))


@evaluate.command(cls=StudyCommand)
def show(
    file: Annotated[Path, typer.Argument(help="A results file, finished or not.")],
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print tables in Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every cell as one JSON object.")] = False,
) -> None:
    """Show what is in a results file: accuracy with its confidence interval, or how far next tokens are from exact."""
    from magicpig.studies.evaluation.results import read_results
    from magicpig.studies.evaluation.table import markdown

    if as_markdown and as_json:
        raise InputError("pass either --markdown or --json")
    results = read_results(file)
    if as_json:
        print(json.dumps({"header": results.header, "cells": _cells(results)}, indent=2))
    elif as_markdown:
        print("\n\n".join(markdown(table) for table in _tables(results)))
    else:
        _show(results)


@evaluate.command(cls=StudyCommand)
def tasks(
    model: Annotated[
        Path | None, typer.Option(help="Say how long texts must be at least for this model's tokenizer.")
    ] = None,
) -> None:
    """List the tasks and groups of tasks."""
    from magicpig.studies.evaluation.matrix import GROUPS
    from magicpig.studies.evaluation.tasks import TASKS, minimum_length

    tokenizer = None
    if model is not None:
        from magicpig.generation import open_model

        tokenizer = open_model(model).tokenizer
    table = Table("task", "asks for", "answer", "minimum", box=box.SIMPLE_HEAD, pad_edge=False)
    for task in TASKS.values():
        least = str(minimum_length(task.name, tokenizer)) if tokenizer and not task.source else ""
        asks = task.about + (f", from --{task.source}" if task.source else "")
        table.add_row(task.name, asks, str(task.tokens_to_generate), least)
    console = Console(highlight=False)
    console.print(table)
    console.print("in tokens: the answer; the least length of prompt and answer, with --model\n")
    for name, members in GROUPS.items():
        console.print(f"{name}: {', '.join(members)}")


@evaluate.command("lm-eval", cls=StudyCommand)
@takes_opening
def lm_eval(
    *,
    model: Annotated[Path | None, typer.Option(help="Directory of a transformers model.")] = None,
    tasks: Annotated[
        str, typer.Option(help="Our tasks and groups of them, and lm-evaluation-harness' own, separated by commas.")
    ] = "generated",
    sampler: Annotated[str, typer.Option(help="One sampler with its settings, as lsh:K=9,L=120.")] = "sketch",
    lengths: Annotated[str, typer.Option(help="Tokens of prompt and answer together, of our tasks.")] = "4K",
    samples: Annotated[
        int, typer.Option(min=1, max=MOST_SAMPLES, help="Samples per task and length, of our tasks.")
    ] = 100,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of our tasks.")] = 0,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST_SAMPLES, help="Ask only so many questions per task.")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, max=MOST_SAMPLES, help="Solved examples in front of each question.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Wrap prompts as a user's message for a chat model.")] = False,
    dtype: ModelDtype = Dtype.auto,
    opening: dict[str, Any],
    export: Annotated[
        Path | None, typer.Option(help="Only write our tasks to this directory, for lm_eval --include_path.")
    ] = None,
    filler: Annotated[Path | None, typer.Option(help="A UTF-8 text to hide needles in.", rich_help_panel=DATA)] = None,
    squad: Annotated[Path | None, typer.Option(help="SQuAD v2 questions, for qa_1.", rich_help_panel=DATA)] = None,
    hotpotqa: Annotated[Path | None, typer.Option(help="HotpotQA questions, for qa_2.", rich_help_panel=DATA)] = None,
    output: Annotated[Path | None, typer.Option(help="Write all results to this file, as JSON.")] = None,
) -> None:
    """Run lm-evaluation-harness on a local model with sampled attention, or export our tasks for it.

    Its own tasks may download their data. Needs the extra: pip install 'magicpig[eval]'.
    """
    if (model is None) == (export is None):
        raise InputError("pass either --model or --export")
    from magicpig.studies.evaluation import harness, matrix
    from magicpig.studies.evaluation.tasks import Sources

    method, *others = matrix.parse_methods(sampler)
    if others:
        raise InputError(f"--sampler {sampler!r} is more than one")
    ours: dict[str, Any] = {
        "lengths": matrix.parse_lengths(lengths),
        "samples": samples,
        "seed": seed,
        "sources": Sources(filler, squad, hotpotqa),
    }
    if export is not None:
        for name in harness.export(export, **ours):
            print(name)
        return
    assert model is not None
    from magicpig.generation import open_model

    with OutputFile(output) as file:
        results = harness.run(
            open_model(model, **opening),
            tasks,
            config=method.config,
            limit=limit,
            fewshot=fewshot,
            chat=chat,
            dtype=dtype.value,
            **ours,
        )
        file.write(json.dumps(results, indent=2, default=str) + "\n")
    table = Table("task", "metric", "value", "standard error", box=box.SIMPLE_HEAD, pad_edge=False)
    for task, found in results["results"].items():
        for metric, value in found.items():
            name = metric.partition(",")[0]
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = found.get(metric.replace(name, f"{name}_stderr", 1))
                table.add_row(task, name, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "")
    Console(highlight=False).print(table)


def _cells(results: Results) -> list[dict[str, Any]]:
    from magicpig.studies.evaluation.table import summarise

    return results.lines if _table_of(results) else [asdict(cell) for cell in summarise(results)]


def _tables(results: Results) -> list[ResultsTable]:
    from magicpig.studies.evaluation.table import summarise, tables

    table = _table_of(results)
    return tables(summarise(results)) if table is None else [table(results)]


def _table_of(results: Results) -> Callable[[Results], ResultsTable] | None:
    """What makes the one table of a benchmark; None for RULER, whose tables are made of cells."""
    from magicpig.studies.evaluation import perplexity, recall

    return next(
        (each.table for each in (perplexity, recall) if results.header.get("benchmark") == each.BENCHMARK), None
    )


def _show(results: Results) -> None:
    console = Console(highlight=False)
    if not results.lines:
        console.print("no sample is finished yet")
    for each in _tables(results) if results.lines else []:
        console.print(escape(each.title))
        for columns in _columns_that_fit(each, console.width):
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
            for column in columns:
                justify: JustifyMethod = "left" if column < _NAMES else "right"
                table.add_column(escape(each.head[column]), justify=justify, overflow="fold")
            for block in each.blocks:
                for row in block:
                    table.add_row(*(escape(row[column]) for column in columns))
                table.add_section()
            console.print(table)


def _columns_that_fit(table: ResultsTable, width: int) -> list[list[int]]:
    """The columns in groups that are not wider than `width`, where that can be; each begins with the names."""
    rows = [table.head, *(row for block in table.blocks for row in block)]
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(len(table.head))]
    names = list(range(_NAMES))
    groups: list[list[int]] = []
    for column in range(_NAMES, len(widths)):
        if not groups or sum(widths[each] for each in [*groups[-1], column]) > width:
            groups.append([*names])
        groups[-1].append(column)
    return groups
