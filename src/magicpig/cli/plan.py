"""`magicpig plan`: what fits where, and how fast each placement would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from magicpig.cli.errors import InputError
from magicpig.cli.options import checked
from magicpig.cli.settings import takes_config
from magicpig.config import Config

if TYPE_CHECKING:
    from magicpig.placement.foretell import Foretold

GIB = 2**30
MOST_GB = 1 << 20


@takes_config
def plan(
    context: typer.Context,
    model: Annotated[Path, typer.Option(help="A model directory, or the config.json of one.", show_default=False)],
    tokens: Annotated[int, typer.Option("--context", min=1, max=1 << 40, help="Tokens of a sequence.")] = 98304,
    batch: Annotated[int, typer.Option(min=1, max=1 << 20, help="Sequences at a time.")] = 1,
    vram: Annotated[float, typer.Option(min=0.001, max=MOST_GB, help="GiB of memory of the GPU.")] = 24.0,
    ram: Annotated[float, typer.Option(min=0.001, max=MOST_GB, help="GiB of memory of the host.")] = 128.0,
    gpu_speed: Annotated[float, typer.Option(min=1, max=1e6, help="GB/s that the GPU reads its memory with.")] = 2000.0,
    link_speed: Annotated[float, typer.Option(min=0.1, max=1e6, help="GB/s between host and GPU, each way.")] = 50.0,
    host_speed: Annotated[float, typer.Option(min=0.1, max=1e6, help="GB/s that the host reads in order.")] = 100.0,
    row_speed: Annotated[float, typer.Option(min=0.1, max=1e6, help="GB/s that the host reads single rows.")] = 40.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    *,
    config: Config,
) -> None:
    """Say what fits on a machine with a GPU, and how fast a token would be with each placement.

    Nothing is measured: memory is counted, and time follows from bytes, speeds and the schedule that steps run by,
    whose timeline is drawn. Weights are counted as bfloat16.
    """
    file = model / "config.json" if model.is_dir() else model
    if not file.is_file():
        raise InputError(f"--model {model}: neither a model directory nor a config.json")
    from magicpig.integrations.transformers.shapes import sizes_of_file
    from magicpig.placement.foretell import Speeds, choose, foretell

    speeds = Speeds(gpu_speed * 1e9, link=link_speed * 1e9, host=host_speed * 1e9, rows=row_speed * 1e9)
    sizes = sizes_of_file(file, config)
    found = checked(
        foretell, sizes, config, context=tokens, batch=batch, vram=int(vram * GIB), ram=int(ram * GIB), speeds=speeds
    )
    _, why = checked(choose, found)
    if as_json:
        print(json.dumps({"choice": why, "placements": [_record(each) for each in found]}, indent=2))
        return
    console = Console(highlight=False)
    table = Table(box=None, header_style="bold")
    for name in ("placement", "GPU memory", "host memory", "fits", "largest batch", "ms a token", "tokens/s"):
        table.add_column(name, justify="left" if name == "placement" else "right")
    for each in found:
        table.add_row(
            each.place,
            f"{each.vram / GIB:.1f} GiB",
            f"{each.ram / GIB:.1f} GiB",
            "yes" if each.fits else "no",
            str(each.most),
            f"{1000 * each.step_s:.1f}",
            f"{each.tokens_per_s:.0f}",
        )
    console.print(table)
    console.print("exact: attention over everything on the GPU, to compare with", soft_wrap=True)
    console.print(f"\nauto would take {why}", soft_wrap=True)
    best = next(each for each in found if why.startswith(f"{each.place}:"))
    layers = len(sizes.layers)
    begin, end = best.step_s * (layers // 2) / layers, best.step_s * min(layers, layers // 2 + 3) / layers
    console.print(f"\n{1000 * (end - begin):.2f} ms in the middle of a step of {best.place}:", soft_wrap=True)
    print(best.device.picture(begin, end, width=100))


def _record(each: Foretold) -> dict[str, Any]:
    where = ("compute", "down", "host", "up")
    return {
        "placement": each.place,
        "gpu_bytes": each.vram,
        "host_bytes": each.ram,
        "fits": each.fits,
        "largest_batch": each.most,
        "step_ms": 1000 * each.step_s,
        "tokens_per_s": each.tokens_per_s,
        "idle_ms": {name: 1000 * each.device.idle(name) for name in where},
    }
