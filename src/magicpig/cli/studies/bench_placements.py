"""`magicpig bench placements`: a step of one layer on the processor, with a GPU, and without sampling."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from magicpig.cli.files import STDIO, OutputFile
from magicpig.cli.options import MOST_REPEATS, MOST_TOKENS, checked, whole_numbers
from magicpig.cli.settings import takes_settings
from magicpig.cli.studies.bench_options import MOST_HEADS, Contexts, JsonFile, short_length, write_results
from magicpig.config import Config


@takes_settings("budget", "bits")
def placements(
    *,
    device: Annotated[str, typer.Option(help="cuda, cuda:1 and so on, or simulated, which times nothing.")] = "cuda",
    context: Contexts = "32K",
    batch: Annotated[str, typer.Option(help="Requests decoded together; several numbers separated by commas.")] = "1",
    settings: dict[str, Any],
    heads: Annotated[int, typer.Option(min=1, max=MOST_HEADS, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, max=MOST_HEADS, help="Key/value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Length of a query, key or value.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, max=MOST_REPEATS, help="Steps that are timed.")] = 20,
    json_file: JsonFile = None,
) -> None:
    """Time one decode step of one attention layer in every placement, and attention over everything on the GPU.

    Compares outputs and samples with those of the processor first.
    """
    from magicpig.studies.evaluation.matrix import parse_lengths

    contexts, batches = parse_lengths(context, "--context"), whole_numbers(batch, "--batch")
    config = checked(Config, exact_below=0, **{name: x for name, x in settings.items() if x is not None})
    to_stdout = json_file == STDIO
    console = Console(stderr=to_stdout, highlight=False)
    if device == "simulated":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks when it is imported
    with OutputFile(None if to_stdout else json_file) as file:
        import torch

        from magicpig.studies.bench import placements as bench
        from magicpig.studies.bench.layer import Shape

        opened = checked(bench.open_device, device)
        shape = checked(Shape, heads, kv_heads, head_dim, max(batches), torch.bfloat16)
        results = []
        for each in bench.run(opened, contexts, batches, shape, config, repeats=repeats):
            results.append(each)
            same = "" if each.same_samples is None else f"  same samples: {'yes' if each.same_samples else 'no'}"
            console.print(
                f"{short_length(each.context):>6} x {each.batch:<3} {each.variant:<13} {each.step_ms:9.3f} ms  error "
                f"{each.error:.3f}  {each.device_bytes / 2**20:8.1f} MiB on the device{same}",
                soft_wrap=True,
            )
        described = bench.provenance() | {"device": opened.name, "shape": asdict(shape) | {"dtype": "bfloat16"}}
        write_results(described, [asdict(each) for each in results], file, to_stdout=to_stdout)
