"""`magicpig bench decode --device`: tokens per second of a model with an accelerator."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from magicpig.cli.errors import InputError
from magicpig.cli.files import STDIO, OutputFile
from magicpig.cli.options import Dtype, checked
from magicpig.cli.studies.bench_options import short_length, torch_dtype, write_results
from magicpig.config import Config

if TYPE_CHECKING:
    from magicpig.studies.bench.decode_device import Result
    from magicpig.studies.evaluation.matrix import Method

ON = "Device"
MOST_BATCH = 1024
MOST_GB = 1 << 20


def on_device(
    name: str,
    shape: str,
    layers: int | None,
    contexts: Sequence[int],
    batches: Sequence[int],
    compared: list[Method],
    *,
    dtype: Dtype,
    steps: int,
    vram_limit: float | None,
    json_file: Path | None,
    console: Console,
) -> None:
    """Each result is shown as soon as it is there; the file comes last."""
    configs: dict[str, Config] = {
        method.config.sampler: method.config.model_copy(update={"exact_below": 0}) for method in compared
    }
    if len(configs) < len(compared):
        raise InputError("--samplers names one twice; with --device each may come once")
    if name == "simulated":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks when it is imported
    to_stdout = json_file == STDIO
    with OutputFile(None if to_stdout else json_file) as file:
        from magicpig.generation import silence_transformers
        from magicpig.studies.bench import placements
        from magicpig.studies.bench.decode_device import DeviceDecoder

        opened = checked(placements.open_device, name)
        silence_transformers()
        decoder = checked(
            DeviceDecoder,
            shape,
            opened,
            layers=layers,
            dtype=torch_dtype(dtype),
            contexts=contexts,
            steps=steps,
            vram=None if vram_limit is None else int(vram_limit * 2**30),
        )
        results = []
        for tokens in contexts:
            for each in decoder.measure(tokens, batches, configs):
                results.append(each)
                console.print(_line(each), soft_wrap=True)
        about = {"shape": shape, "layers": layers, "dtype": dtype.value, "vram_limit": vram_limit}
        about |= {"device": opened.name, "keys": "synthetic; a batch shares one context in host memory"}
        described = placements.provenance() | about
        write_results(described, [asdict(each) for each in results], file, to_stdout=to_stdout)


def _line(each: Result) -> str:
    said = f"{short_length(each.context):>6} x {each.batch:<3} {each.variant:<13}"
    if each.step_ms is None:
        return f"{said} does not fit"
    over = "" if each.fits else "  over the limit"
    return f"{said} {each.step_ms:9.2f} ms  {each.tokens_per_s:8.1f} tokens/s{over}"
