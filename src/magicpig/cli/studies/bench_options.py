"""What the benchmarks' options and results have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from magicpig.cli.errors import InputError
from magicpig.cli.files import OutputFile, check_readable
from magicpig.cli.options import MOST_THREADS, MOST_TOKENS, Dtype, Weights, checked

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import PreTrainedConfig

    from magicpig.studies.bench.decode import Decoder
    from magicpig.studies.bench.llama_cpp import LlamaCpp
    from magicpig.studies.capture import Capture
    from magicpig.studies.evaluation.matrix import Method

MOST_HEADS = 65_536

Contexts = Annotated[str, typer.Option(help="Tokens in the cache, as 32768 or 32K; several separated by commas.")]
Samplers = Annotated[
    str,
    typer.Option(
        help="Samplers separated by commas, each with settings behind a colon if it has any: lsh:K=9,L=120,sketch:256,"
        "kv_dtype=int8."
    ),
]
Sets = Annotated[
    list[Path] | None, typer.Option("--set", help="A file of `magicpig capture`; may be given several times.")
]
SyntheticContexts = Annotated[
    str, typer.Option(help="Lengths of synthetic contexts, as 131072 or 128K, separated by commas; or none.")
]
SyntheticHeads = Annotated[int, typer.Option(min=1, max=MOST_HEADS, help="Query heads of synthetic contexts.")]
SyntheticKvHeads = Annotated[int, typer.Option(min=1, max=MOST_HEADS, help="Key/value heads of synthetic contexts.")]
SyntheticHeadDim = Annotated[
    int, typer.Option(min=1, max=MOST_TOKENS, help="Length of a query, key or value of synthetic contexts.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=MOST_THREADS, help="Threads; as many as torch takes by default.")
]
LlamaKinds = Annotated[
    str | None,
    typer.Option(
        help="Also llama.cpp, where llama-cpp-python is installed, with weights in q8_0, bf16 or both with a comma."
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the results to this file; - is standard output.")]


def methods(samplers: str, allowed: tuple[str, ...], **settings: Any) -> list[Method]:
    """The samplers asked for, with ``settings`` where they have none of their own. Raises InputError, MatrixError."""
    from magicpig.studies.evaluation.matrix import parse_methods

    # However short the context, it is the sampled step that is to be measured.
    found = parse_methods(samplers, exact_below=0, **settings)
    for method in found:
        if method.config.sampler not in allowed or method.config.layers:
            raise InputError(f"--samplers {method.name!r} cannot be measured here; allowed: {', '.join(allowed)}")
    return list(found)


def synthetic_lengths(contexts: str) -> tuple[int, ...]:
    """Lengths separated by commas, or none. Raises MatrixError."""
    from magicpig.studies.evaluation.matrix import parse_lengths

    return () if contexts == "none" else parse_lengths(contexts, "--contexts")


def check_sets(sets: Sequence[Path] | None, lengths: Sequence[int]) -> None:
    """Raise InputError if neither contexts of these lengths nor captured ones are to be measured, or one is no file."""
    if not lengths and not sets:
        raise InputError("--contexts none leaves nothing to measure; give --set")
    for path in sets or []:
        check_readable(path)


def load_sets(sets: Sequence[Path] | None) -> dict[Path, Capture]:
    """The captured attention in these files. Raises CaptureError."""
    from magicpig.studies.capture import load_capture

    return {path: load_capture(path) for path in sets or []}


def write_results(
    described: Mapping[str, Any], results: Sequence[Mapping[str, Any]], file: OutputFile, *, to_stdout: bool
) -> None:
    """One JSON object: what was measured how, and the results."""
    answer = json.dumps({**described, "results": list(results)}, indent=2)
    if to_stdout:
        print(answer)
    file.write(answer + "\n")


class Counted(Protocol):
    """A result that says how many calls it is made of."""

    @property
    def calls(self) -> int: ...
    @property
    def quiet_calls(self) -> int: ...


def say_if_busy(console: Console, results: Iterable[Counted]) -> None:
    """Tell who reads the times if other programs got in between."""
    from magicpig.studies.bench.quiet import Quiet

    every = list(results)
    if note := str(Quiet(sum(each.calls for each in every), sum(each.quiet_calls for each in every))):
        console.print(f"[yellow]{note}")


def say_if_slow_baseline(console: Console, baselines: Iterable[tuple[float | None, float | None]]) -> None:
    """Tell who reads ratios to exact attention if it is slow itself: pairs of read_ms and exact_ms, where there are."""
    from magicpig.studies.bench.baseline import flattery

    if note := flattery((read, exact) for read, exact in baselines if read is not None and exact is not None):
        console.print(f"[yellow]{note}")


def llama_kinds(kinds: str | None) -> tuple[str, ...]:
    """What weights llama.cpp is measured with. Raises InputError for others, and where it is not installed."""
    from magicpig.studies.bench.llama_cpp import KINDS, missing

    if kinds is None:
        return ()
    found = tuple(dict.fromkeys(kinds.split(",")))
    if unknown := [kind for kind in found if kind not in KINDS]:
        raise InputError(f"--llama-cpp {unknown[0]!r} is not one of {', '.join(KINDS)}")
    if lacking := missing():
        raise InputError(f"--llama-cpp takes packages that are not installed: pip install {' '.join(lacking)}")
    return found


@contextmanager
def opened_llamas(
    kinds: Sequence[str], config: PreTrainedConfig, *, longest: int, batch: int = 1
) -> Iterator[list[LlamaCpp]]:
    """llama.cpp with weights of each kind, in files that go with it. Raises InputError for what cannot be."""
    import tempfile

    import torch

    from magicpig.studies.bench.llama_cpp import LlamaCpp

    with ExitStack() as open_ones:
        folder = Path(open_ones.enter_context(tempfile.TemporaryDirectory(prefix="magicpig-llama-cpp-")))
        threads = torch.get_num_threads()
        yield [
            open_ones.enter_context(
                checked(LlamaCpp, config, kind, folder, longest=longest, batch=batch, threads=threads)
            )
            for kind in kinds
        ]


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """The type of that name. Raises InputError for the one that only a model decides."""
    import torch

    if dtype is Dtype.auto:
        raise InputError("--dtype auto is for models; choose float32, bfloat16 or float16")
    found: torch.dtype = getattr(torch, dtype.value)
    return found


def made_up_model(
    shape: str,
    layers: int | None,
    dtype: Dtype,
    weights: Weights,
    *,
    contexts: Sequence[int],
    steps: int,
    threads: int | None,
) -> Decoder:
    """A model of that shape with random weights, for contexts up to the longest and `steps` tokens behind each.

    It runs on `threads` threads. Raises InputError for what cannot be.
    """
    import torch

    from magicpig.generation import silence_transformers
    from magicpig.studies.bench.decode import Decoder

    silence_transformers()
    made: Decoder = checked(
        Decoder,
        shape,
        layers=layers,
        dtype=torch_dtype(dtype),
        longest=max(contexts),
        steps=steps,
        weights=weights.value,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    return made


def made_of(decoder: Decoder, dtype: Dtype, described: Mapping[str, Any]) -> str:
    """The model of `made_up_model` and where it ran, for below a table. described: as `decode.describe` says."""
    return (
        f"{described['shape']}, {decoder.layers} layers, random weights, {dtype.value}, weights {decoder.weights}; "
        f"{described['isa']}, {described['threads']} threads ({described['pool']} pool), {described['machine']}"
    )


def short_length(tokens: int) -> str:
    """32768 as 32K, as it may be typed."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens % unit == 0:
            return f"{tokens // unit}{name}"
    return str(tokens)
