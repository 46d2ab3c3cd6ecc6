"""`magicpig figures`: what attention does with a long text, and what sampling makes of it, as pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from magicpig.cli.errors import InputError
from magicpig.cli.files import OutputFile
from magicpig.cli.options import (
    MOST_SAMPLES,
    MOST_SEED,
    MOST_STEPS,
    Dtype,
    ModelDtype,
    ModelOrPocket,
    or_pocket,
)
from magicpig.cli.settings import takes_opening, takes_settings
from magicpig.cli.studies.progress import run_evaluation, work_progress
from magicpig.wording import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from magicpig.generation import Model
    from magicpig.studies.evaluation.matrix import Matrix
    from magicpig.studies.evaluation.results import Results

NAMES = ("1", "2", "3", "centring")
ACCURACY = "Accuracy: figure 1 and centring"
ATTENTION = "Attention: figures 2 and 3"
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Look:
    """At what figures 2 and 3 look: texts, or so many samples of each task; all layers, or a few; queries per text."""

    samples: int
    texts: tuple[Path, ...]
    all_layers: bool
    steps: int


@takes_settings("dense_layers")
@takes_opening
def figures(
    *,
    out: Annotated[Path, typer.Option(help="Directory for the pictures and numbers; made if it is missing.")],
    model: ModelOrPocket = None,
    only: Annotated[str, typer.Option(help="Which figures, separated by commas.")] = ",".join(NAMES),
    length: Annotated[str, typer.Option(help="Tokens of prompt and answer together, as 16384 or 16K.")] = "16K",
    tasks: Annotated[
        str, typer.Option(help="Tasks of figures 1 to 3; see `magicpig eval tasks`.")
    ] = "niah_multikey_1,cwe,fwe",
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of the tasks.")] = 0,
    samples: Annotated[
        int, typer.Option(min=1, max=MOST_SAMPLES, help="Samples per task.", rich_help_panel=ACCURACY)
    ] = 20,
    samplers: Annotated[
        str | None, typer.Option(help="Samplers to compare in figures 1 and 3, without settings. [default: all]")
    ] = None,
    needles: Annotated[str, typer.Option(help="Tasks of the centring ablation.", rich_help_panel=ACCURACY)] = (
        "niah_multikey_1"
    ),
    protocol: Annotated[
        str,
        typer.Option(help="question-dense or question-sparse; see `magicpig eval ruler`.", rich_help_panel=ACCURACY),
    ] = "question-dense",
    settings: dict[str, Any],
    texts: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="Texts per task.", rich_help_panel=ATTENTION)] = 2,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Read this UTF-8 text, not tasks; may be given several times.", rich_help_panel=ATTENTION),
    ] = None,
    all_layers: Annotated[
        bool,
        typer.Option("--all-layers", help="Look at every layer, not at four evenly spread.", rich_help_panel=ATTENTION),
    ] = False,
    steps: Annotated[int, typer.Option(min=1, max=MOST_STEPS, help="Queries per text.", rich_help_panel=ATTENTION)] = 8,
    dtype: ModelDtype = Dtype.auto,
    opening: dict[str, Any],
) -> None:
    """Plot what the method rests on, measured on a local model: PNG, SVG and the numbers behind them as JSON lines.

    1: accuracy against the share of keys read. 2: where attention goes, and where keys and queries lie. 3: error of the
    attention output against the share of keys read. centring: needles found with and without centred keys.
    Stop it whenever you like; the same command goes on with the accuracies where it was.
    """
    wanted = [name.strip() for name in only.split(",")]
    for name in wanted:
        if name not in NAMES:
            raise InputError(f"--only {name!r}: there is no such figure; allowed: {', '.join(NAMES)}")
    notes = Console(stderr=True, highlight=False)
    from magicpig.studies.evaluation import matrix as matrices
    from magicpig.studies.figures import accuracy

    shared = {"exact_below": 0, **settings}
    methods = accuracy.methods(None if samplers is None else samplers.split(","), **shared)
    common: dict[str, Any] = {
        "lengths": matrices.parse_lengths(length)[:1],
        "protocols": matrices.parse_protocols(protocol)[:1],
        "samples": samples,
        "seed": seed,
    }
    compared = matrices.Matrix(matrices.parse_tasks(tasks), methods=methods, **common)
    ablation = matrices.Matrix(matrices.parse_tasks(needles), methods=accuracy.centring_methods(**shared), **common)
    if all(not method.config.samples for method in methods):
        raise InputError("--samplers: there is nothing to compare with full attention")
    directory = or_pocket(model)
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
    with OutputFile(out / "figure"):  # can anything be written there?
        pass
    with notes.status("Looking into the model"):
        from magicpig import generation

        generation.silence_transformers()
        opened = generation.open_model(directory, **opening)
        chat = bool(opened.tokenizer.chat_template)
        compared, ablation = replace(compared, chat=chat), replace(ablation, chat=chat)
    from magicpig.studies.evaluation.run import evaluate
    from magicpig.studies.figures import plot

    if "1" in wanted:
        results = run_evaluation(evaluate, opened, compared, out / "figure1-results.jsonl", notes, dtype=dtype.value)
        rows = accuracy.accuracy_rows(results, compared)
        _write(out, "figure1", _origin(results), rows, plot.plot_accuracy)
    if "2" in wanted or "3" in wanted:
        look = Look(texts, tuple(text or ()), all_layers, steps)
        _attention(opened, compared, out, wanted, dtype, look, notes)
    if "centring" in wanted:
        results = run_evaluation(evaluate, opened, ablation, out / "centring-results.jsonl", notes, dtype=dtype.value)
        _write(out, "centring", _origin(results), accuracy.centring_rows(results, ablation), plot.plot_centring)
    notes.print(f"{counted(len(wanted), 'figure')} in {escape(str(out))}")


def _attention(
    model: Model,
    compared: Matrix,
    out: Path,
    wanted: Sequence[str],
    dtype: Dtype,
    look: Look,
    notes: Console,
) -> None:
    """Figures 2 and 3, which look at the same captured attention."""
    from magicpig.generation import load
    from magicpig.studies.capture.record import full_layers
    from magicpig.studies.evaluation.run import identity
    from magicpig.studies.figures import plot
    from magicpig.studies.figures.texts import measure_attention
    from magicpig.studies.provenance import provenance

    methods = [method for method in compared.methods if method.config.samples] if "3" in wanted else []
    with work_progress(notes) as progress:
        bar = progress.add_task("Loading the model", total=len(look.texts) or look.samples * len(compared.tasks))
        mass, cosines, errors = measure_attention(
            model,
            load(model, dtype=dtype.value),
            tasks=compared.tasks,
            length=compared.lengths[0],
            samples=look.samples,
            steps=look.steps,
            methods=methods,
            texts=look.texts,
            layers=full_layers(model.config) if look.all_layers else None,
            seed=compared.seed,
            on_step=lambda step, done: progress.update(bar, description=escape(step), completed=done),
        )
    settings = {
        "tasks": () if look.texts else compared.tasks,
        "length": compared.lengths[0],
        "texts": [path.name for path in look.texts] or look.samples,
        "all_layers": look.all_layers,
        "steps": look.steps,
        "seed": compared.seed,
        "dtype": dtype.value,
        "methods": {method.name: method.config.model_dump(mode="json") for method in methods},
    }
    origin = {"model": identity(model), "settings": settings, "made": provenance()}
    if "2" in wanted:
        rows = [{"about": "mass"} | row for row in mass] + [{"about": "cosines"} | row for row in cosines]
        _write(out, "figure2", origin, rows, lambda _: plot.plot_anatomy(mass, cosines))
    if "3" in wanted:
        _write(out, "figure3", origin, errors, plot.plot_errors)


def _origin(results: Results) -> dict[str, Any]:
    return {name: results.header[name] for name in ("model", "settings", "made")}


def _write(out: Path, name: str, origin: dict[str, Any], rows: Rows, plot: Callable[[Rows], Figure]) -> None:
    """The picture in two formats and its numbers, under a line that says where they come from; nothing has a date."""
    from magicpig.studies.figures.style import png_and_svg, style

    made = {key: value for key, value in origin["made"].items() if key != "date"}
    lines = [json.dumps(line) for line in ({"figure": name} | origin | {"made": made}, *rows)]
    with style():
        files: dict[str, str | bytes] = {".jsonl": "\n".join(lines) + "\n", **png_and_svg(plot(rows))}
    for suffix, content in files.items():
        with OutputFile(out / (name + suffix)) as file:
            file.write(content)
