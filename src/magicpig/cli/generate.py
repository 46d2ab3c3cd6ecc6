"""`magicpig generate`: a local model reads a prompt and answers."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from magicpig.cli.errors import InputError
from magicpig.cli.files import STDIO, OutputFile, read_text
from magicpig.cli.options import (
    MOST_TOKENS,
    Dtype,
    Mode,
    ModelDtype,
    ModelOrPocket,
    PrefillChunk,
    check_device,
    checked,
    or_pocket,
)
from magicpig.cli.report import cache_as_dict, prefill_progress
from magicpig.cli.settings import takes_config, takes_opening, takes_where
from magicpig.config import Config
from magicpig.machine import versions
from magicpig.where import Where
from magicpig.wording import counted, printable

if TYPE_CHECKING:
    from magicpig.generation import Generation

MOST_TEMPERATURE = 1000.0  # every token is as likely as any other long before


PROMPT = "Prompt"
ANSWER = "Answer"
RESULT = "Output"


@takes_config
@takes_where
@takes_opening
def generate(
    context: typer.Context,
    *,
    model: ModelOrPocket = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.", rich_help_panel=PROMPT)] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 text file with the prompt; - is standard input.", rich_help_panel=PROMPT),
    ] = None,
    jsonl: Annotated[
        Path | None,
        typer.Option(
            help='Many prompts: a JSON object a line, {"prompt": ...} or {"messages": ...}, and settings of its own, '
            "called as the server calls them. Goes on where it was stopped.",
            rich_help_panel=PROMPT,
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option(help="Wrap the prompt as a user's message for a chat model.", rich_help_panel=PROMPT)
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="What a chat model is told first; says --chat.", rich_help_panel=PROMPT)
    ] = None,
    truncate: Annotated[
        bool,
        typer.Option("--truncate", help="Leave out the middle of a prompt that is too long.", rich_help_panel=PROMPT),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Stop after this many tokens.", rich_help_panel=ANSWER)
    ] = 128,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_TOKENS,
            help="Tokens of prompt and answer that the model may have. [default: what its configuration says]",
            rich_help_panel=ANSWER,
        ),
    ] = None,
    mode: Annotated[
        Mode,
        typer.Option(
            help="sampled: attend by samples. lossless: only draft by them, and answer what full attention answers.",
            rich_help_panel=ANSWER,
        ),
    ] = Mode.sampled,
    temperature: Annotated[
        float,
        typer.Option(
            min=0,
            max=MOST_TEMPERATURE,
            help="0 always takes the likeliest token; more draws, by --seed.",
            rich_help_panel=ANSWER,
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(min=0, max=1, help="Draw from the likeliest tokens with this mass.", rich_help_panel=ANSWER),
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Stop before this text; may be given several times.", rich_help_panel=ANSWER),
    ] = None,
    config: Config,
    where: Where,
    dtype: ModelDtype = Dtype.auto,
    prefill_chunk: PrefillChunk = 1024,
    opening: dict[str, Any],
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object; all else goes to stderr.", rich_help_panel=RESULT),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--out",
            help="Also write the text, or with --json the object, to a file; with --jsonl the answers.",
            rich_help_panel=RESULT,
        ),
    ] = None,
) -> None:
    """Let a local model read a long prompt and answer it.

    The prompt is read exactly. While answering, every step attends to the first tokens, the newest tokens and a
    sample of those between, weighted so that the estimate is right on average. Settings are also taken from the
    environment, as MAGICPIG_BUDGET=256.
    """
    if [prompt, prompt_file, jsonl].count(None) != 2:
        raise InputError("pass either --prompt or --prompt-file, or --jsonl")
    if jsonl is not None and (output is None or as_json or output == STDIO):
        raise InputError("--jsonl needs a file for the answers: --out FILE, and no --json")
    text = read_text(prompt_file) if prompt_file is not None else prompt or ""
    if not text and jsonl is None:
        raise InputError("the prompt is empty")
    # How Python keeps bytes it cannot decode.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError("--prompt is not valid UTF-8")
    if stop is not None and not all(stop):
        raise InputError("--stop is empty")
    if mode is Mode.lossless and jsonl is not None:
        raise InputError("--mode lossless answers one prompt; leave it or --jsonl out")
    if mode is Mode.lossless and not config.samples:
        raise InputError(f"--mode lossless drafts by sampling, but --sampler {config.sampler} reads every key")

    if mode is Mode.lossless and where.device != "cpu":
        raise InputError(f"--mode lossless is exact to the bit on the CPU alone; leave --device {where.device} out")
    check_device(where)

    notes = Console(stderr=True)
    opening = opening | {"max_length": max_length}
    if jsonl is not None and output is not None:
        from magicpig.cli.generate_lines import answer_file

        asked = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": config.seed,
            "stop": tuple(stop or ()),
        }
        answer_file(
            jsonl,
            output,
            or_pocket(model, notes),
            config,
            notes,
            asked=asked,
            opening=opening,
            dtype=dtype.value,
            system=system,
            chat=chat,
            where=where,
        )
        return
    told: list[str] = []
    with OutputFile(output) as file:
        directory = or_pocket(model, notes)
        with notes.status("Loading the model"):
            from magicpig import generation
            from magicpig.integrations.transformers import MagicPigCache

            generation.silence_transformers()
            opened = generation.open_model(directory, **opening)
            checked(MagicPigCache, opened.config, config)  # has the model these layers?
            if mode is Mode.lossless:
                checked(generation.check_lossless, config, opened.config)
            ids = generation.encode(
                opened,
                text,
                chat=chat or system is not None,
                system=system,
                new_tokens=max_new_tokens,
                truncate=truncate,
                on_note=told.append,
            )
            network = generation.load(opened, dtype=dtype.value, device=where.device)

        stream = _Stream(sys.stderr if as_json else sys.stdout)
        progress = prefill_progress(notes)
        reading = progress.add_task("Reading the prompt", total=len(ids))

        def on_prefill(tokens: int) -> None:
            progress.advance(reading, tokens)
            if progress.finished:
                progress.stop()

        with progress, stream:
            result = generation.generate(
                network,
                opened.tokenizer,
                ids,
                config,
                max_new_tokens=max_new_tokens,
                mode=mode.value,
                temperature=temperature,
                top_p=top_p,
                stop=stop or (),
                chunk=prefill_chunk,
                max_length=max_length,
                device=where.device,
                placement=where.placement,
                on_prefill=on_prefill,
                on_text=stream.write,
                on_note=told.append,
            )
        settings = (
            config.model_dump(mode="json")
            | where.model_dump()
            | {
                "dtype": str(network.dtype).removeprefix("torch."),
                "max_new_tokens": max_new_tokens,
                "mode": mode.value,
                "temperature": temperature,
                "top_p": top_p,
                "prefill_chunk": prefill_chunk,
                "chat": chat or system is not None,
                "system": system,
                "stop": stop or [],
                "rope_scaling": opening["rope_scaling"],
                "weights": opening["weights"],
                "adapter": None if opening["adapter"] is None else opening["adapter"].name,
            }
        )
        answer = json.dumps(_as_dict(result, settings), indent=2)
        if as_json:
            print(answer)
        file.write(answer + "\n" if as_json else result.text)
    for note in told:
        notes.print(printable(note), markup=False)
    notes.print(_summary(result))


class _Stream:
    """Text as it comes, on a line of its own even if the work is interrupted."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.mid_line = False

    def write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
        self.mid_line = not text.endswith("\n")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self.mid_line:
            self.write("\n")


def _as_dict(result: Generation, settings: dict[str, Any]) -> dict[str, Any]:
    from magicpig.kernels import library

    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.token_ids),
        "prefill_s": result.prefill_s,
        "prefill_tokens_per_s": result.prefill_tokens_per_s,
        "first_step_s": result.first_step_s,
        "decode_s": result.decode_s,
        "decode_steps": result.decode_steps,
        "decode_tokens_per_s": result.decode_tokens_per_s,
        "drafts": None if result.drafts is None else {**asdict(result.drafts), "acceptance": result.drafts.acceptance},
        "cache": cache_as_dict(result.cache),
        "settings": settings,
        "isa": library.isa(),
        "threads": library.threads(),
        "versions": versions(),
    }


def _summary(result: Generation) -> Table:
    cache, mib = result.cache, 2**20
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(
        "prompt",
        f"{counted(result.prompt_tokens, 'token')} in {result.prefill_s:.2f} s, "
        f"{result.prefill_tokens_per_s:,.1f} tokens/s",
    )
    indexing = " (builds the index)" if cache.index_bytes else ""
    answer = counted(len(result.token_ids), "token")
    if result.first_step_s is not None:
        answer += f", first step {result.first_step_s:.2f} s{indexing}"
    if result.decode_tokens_per_s is not None:
        answer += f", then {result.decode_tokens_per_s:,.1f} tokens/s"
    table.add_row("answer", answer)
    if result.drafts is not None:
        share = result.drafts.acceptance
        judged = "" if share is None else f", {share:.1%} accepted"
        drafted = counted(result.drafts.drafted, "token")
        table.add_row("drafted", f"{drafted}{judged}; exact passes: {result.drafts.passes:,}")
    mean, largest = cache.sampled_share_mean, cache.sampled_share_max
    if mean is None or largest is None:
        table.add_row("keys sampled", "none: every key was read")
    else:
        table.add_row("keys sampled", f"{mean:.2%} on average, at most {largest:.2%}")
    if cache.predicted_error_mean is not None:
        table.add_row(
            "predicted error",
            f"{cache.predicted_error_mean:.1%} on average, {cache.predicted_error_p95:.1%} at the 95th percentile of "
            f"the worst layer, at most {cache.predicted_error_max:.1%}",
        )
    if cache.predicted_error_unknown:
        table.add_row("", f"not known in {cache.predicted_error_unknown:.1%} of the heads and steps: nothing was drawn")
    if cache.epsilon is not None:
        all_read = f"; all keys were read in {cache.all_read:.1%} of the heads and steps" if cache.all_read else ""
        table.add_row("", f"at most {cache.epsilon:.1%} was asked for{all_read}")
    index = f", {cache.index_bytes / mib:,.1f} MiB of index" if cache.index_bytes else ""
    table.add_row("memory", f"{cache.kv_bytes / mib:,.1f} MiB of keys and values{index}")
    table.add_row(
        "read per step",
        f"{cache.read_step_bytes / mib:,.1f} MiB, full attention reads {cache.full_step_bytes / mib:,.1f} MiB",
    )
    return table
