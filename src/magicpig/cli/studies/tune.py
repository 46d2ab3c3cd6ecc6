"""`magicpig tune`: the settings that a model needs on a text, measured on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from magicpig.cli.errors import InputError
from magicpig.cli.files import OutputFile, read_text
from magicpig.cli.options import (
    MOST_REPEATS,
    MOST_STEPS,
    Dtype,
    ModelDtype,
    ModelOrPocket,
    PrefillChunk,
    checked,
    or_pocket,
)
from magicpig.cli.settings import takes_opening
from magicpig.cli.studies.bench_options import methods
from magicpig.cli.studies.progress import work_progress
from magicpig.config import NATIVE, Config

if TYPE_CHECKING:
    from magicpig.studies.tune import Tuning

SHORTEST = Config().exact_below
PLOTS = (".png", ".svg")
P95 = 2.0  # times the mean, unless the user says


@takes_opening
def tune(
    *,
    text: Annotated[Path, typer.Option(help="A UTF-8 text file to read; - is standard input.")],
    epsilon: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Relative error of a layer's output that is allowed, mean over heads and steps."
        ),
    ] = 0.05,
    p95: Annotated[
        float | None, typer.Option(min=0, max=1, help="The same at the 95th percentile. [default: twice the mean]")
    ] = None,
    model: ModelOrPocket = None,
    length: Annotated[
        str | None, typer.Option(help="Read this many tokens of the text, as 16384 or 16K. [default: all]")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The file of settings to write; a plot of the same name lies beside it.")
    ] = Path("tuned.json"),
    samplers: Annotated[
        str | None,
        typer.Option(
            help="Settings to try, separated by commas, as lsh:K=9,L=120,sketch:256,bits=3. [default: about 25 of both]"
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=2, max=MOST_STEPS, help="Decode this many last tokens again with each setting.")
    ] = 16,
    repeats: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="Time them this often.")] = 1,
    dtype: ModelDtype = Dtype.auto,
    prefill_chunk: PrefillChunk = 1024,
    opening: dict[str, Any],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with all that was measured; all else goes to stderr.")
    ] = False,
) -> None:
    """Find, layer by layer, the fastest settings that keep a model's attention within an error on your text.

    The model reads the text exactly. Then every setting decodes the last tokens again in every layer: half of them
    choose, the others check. `attach(model, "tuned.json")` and `magicpig generate --config tuned.json` take the result.
    """
    from magicpig.studies.evaluation.matrix import parse_lengths

    wanted = None if length is None else parse_lengths(length, "--length")[0]
    asked = None if samplers is None else [method.config for method in methods(samplers, NATIVE)]
    if any(config.kv_dtype != "model" for config in asked or ()):
        raise InputError("--samplers: kv_dtype cannot be tuned, rows are kept in the model's own dtype")
    content = read_text(text)
    plots = {suffix: OutputFile(out.with_suffix(suffix)) for suffix in PLOTS}
    if out.suffix in plots:
        raise InputError(f"--out {out}: the plot will have this name; let the file of settings end in .json")
    notes = Console(stderr=as_json, highlight=False)
    with OutputFile(out) as file, plots[".png"], plots[".svg"]:
        directory = or_pocket(model)
        with notes.status("Loading the model"):
            from magicpig import generation
            from magicpig.config_file import to_text
            from magicpig.studies.evaluation.run import identity
            from magicpig.studies.figures.style import png_and_svg, style
            from magicpig.studies.provenance import provenance
            from magicpig.studies.tune import Goal, candidates, report
            from magicpig.studies.tune.plot import plot_tuning
            from magicpig.studies.tune.run import tune as find

            generation.silence_transformers()
            goal = checked(Goal, epsilon, P95 * epsilon if p95 is None else p95)
            opened = generation.open_model(directory, **opening)
            ids = generation.encode(opened, content, most=wanted)
            _check_tokens(len(ids), wanted, steps)
            configs = candidates(epsilon, len(ids)) if asked is None else asked
            network = generation.load(opened, dtype=dtype.value)
        with work_progress(notes) as progress:
            bar = progress.add_task("Reading the text", total=len(ids))

            def on_setting(layer: int, done: int, total: int) -> None:
                if done == 0:
                    progress.reset(bar, total=total)
                progress.update(bar, description=f"Layer {layer}", completed=done)

            tuning = find(
                network,
                ids,
                configs,
                goal,
                steps=steps,
                repeats=repeats,
                chunk=prefill_chunk,
                on_prefill=lambda tokens: progress.advance(bar, tokens),
                on_setting=on_setting,
            )
        about = {
            "made_by": "magicpig tune",
            "model": identity(opened),
            "text": {"file": text.name, "tokens": len(ids)},
            "dtype": str(network.dtype).removeprefix("torch."),
            "steps": steps,
            **report.summary(tuning),
            **provenance(),
        }
        with style():
            pictures = png_and_svg(plot_tuning(tuning))
        for suffix, plot in plots.items():
            plot.write(pictures[suffix])
        file.write(to_text(tuning.config, about))
    if as_json:
        settings = tuning.config.nondefault()
        print(json.dumps({"settings": settings, "about": about, "measured": report.all_rows(tuning.layers)}, indent=2))
    notes.print(_table(about["layers"], tuning))
    for line in _summary(about, out):
        notes.print(line)


def _check_tokens(tokens: int, wanted: int | None, steps: int) -> None:
    if wanted is not None and tokens < wanted:
        raise InputError(f"--length {wanted}: the text has {tokens} tokens")
    if tokens - steps < SHORTEST:
        raise InputError(
            f"the text has {tokens} tokens; with fewer than {SHORTEST} (exact_below) before the last {steps}, every "
            "key is read and there is nothing to tune"
        )


def _table(rows: list[dict[str, Any]], tuning: Tuning) -> Table:
    from magicpig.studies.tune.report import name

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    table.add_column(" setting")
    for heading in ("error", "worst", "p95", "said", "true", "rows", "ms", "full"):
        table.add_column(f" {heading}", justify="right", no_wrap=True)
    for row, choice in zip(rows, tuning.layers, strict=True):
        error = _percent(row["mean"])
        table.add_row(
            str(row["layer"]),
            f" {name(choice.chosen.config)}",
            error if tuning.goal.is_met(choice.chosen.held_out) else f"[red]{error}[/]",
            _percent(max(row["heads"])),
            _percent(row["p95"]),
            _percent(row["predicted"]),
            _percent(row["foreseen"]),
            _percent(row["share"]),
            f"{row['ms']:.2f}",
            f"{row['full_ms']:.2f}",
        )
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g}%"


def _summary(about: dict[str, Any], out: Path) -> list[str]:
    from magicpig.studies.tune.measure import CALIBRATED

    ms, goal, reached = about["ms_per_token"], about["goal"], about["reached"]
    return [
        "[dim]error, worst: of the output, mean over all heads and of the worst one; said: what the samples predict; "
        f"true: how often the error is at most {CALIBRATED:g} times that; rows: read, of those that need not be; ms, "
        "full: of a step so, and with full attention. Errors are those of steps that nothing was chosen by.[/]",
        f"Attention of all layers: full {ms['full']:.2f} ms per token, one setting for all {ms['one_setting']:.2f} ms, "
        f"tuned {ms['tuned']:.2f} ms.",
        f"Error: mean {_percent(reached['mean'])}, 95th percentile {_percent(reached['p95'])}; wanted "
        f"{_percent(goal['mean'])} and {_percent(goal['p95'])}.",
        f"Settings in {out}, a plot in {out.with_suffix('.png')}.",
    ]
