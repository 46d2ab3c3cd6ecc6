"""What is to be evaluated: tasks x lengths x samples, by which samplers, under which protocols. Runs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from magicpig.config import MOST_TOKENS, SAMPLERS, Config, did_you_mean, parse_sampler
from magicpig.config_file import load_config
from magicpig.errors import ArgumentError
from magicpig.studies.evaluation.tasks import TASKS, Sources
from magicpig.wording import shown

PROTOCOLS = ("question-dense", "question-sparse")
GROUPS = {
    "all": tuple(TASKS),
    "generated": tuple(task for task in TASKS if not task.startswith("qa")),  # those that need no files
    "niah": tuple(task for task in TASKS if task.startswith("niah")),
    "aggregation": ("cwe", "fwe"),
    "qa": tuple(task for task in TASKS if task.startswith("qa")),
}


class MatrixError(ArgumentError):
    """Something that cannot be evaluated. One line, naming it and what is allowed."""

    code = "invalid_matrix"


@dataclass(frozen=True)
class Method:
    """A sampler with its settings, under the name it was asked for by."""

    name: str
    config: Config


@dataclass(frozen=True)
class Matrix:
    """Everything that decides about the results, but for the model.

    lengths: in tokens, prompt and answer together. samples: per task and length. seed: of the tasks.
    new_tokens: at most so many are generated, also where a task would allow for more.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    methods: tuple[Method, ...]
    protocols: tuple[str, ...] = PROTOCOLS
    samples: int = 10
    seed: int = 0
    chat: bool = False
    new_tokens: int | None = None
    sources: Sources = field(default_factory=Sources)

    def cells(self) -> Iterator[tuple[str, int, int]]:
        """(task, length, index) of every sample, in the order of the results: each once, then each once more.

        So the results of few samples are the beginning of the results of many.
        """
        for index in range(self.samples):
            for length in self.lengths:
                for task in self.tasks:
                    yield task, length, index

    def runs(self) -> Iterator[tuple[str, Method]]:
        """(protocol, method) of every answer to one sample, in the order of the results."""
        for protocol in self.protocols:
            for method in self.methods:
                yield protocol, method


def parse_tasks(text: str) -> tuple[str, ...]:
    """Names of tasks and groups, separated by commas, as the tasks they stand for, in RULER's order."""
    wanted: set[str] = set()
    for name in _names(text, "--tasks"):
        if name not in GROUPS and name not in TASKS:
            raise _unknown("task", name, [*TASKS, *GROUPS])
        wanted.update(GROUPS.get(name, (name,)))
    return tuple(task for task in TASKS if task in wanted)


def parse_lengths(text: str, option: str = "--lengths") -> tuple[int, ...]:
    """Numbers of tokens, separated by commas, as "32768", "32K" or "1M" (of 1024 and 1024 K), shortest first."""
    lengths = set()
    for part in _names(text, option):
        unit = {"K": 1 << 10, "M": 1 << 20}.get(part[-1:].upper(), 1)
        digits = part if unit == 1 else part[:-1]
        if not digits.isascii() or not digits.isdigit() or not digits.strip("0"):
            raise MatrixError(f"length {shown(part)} is not a number of tokens such as 32768 or 32K")
        length = int(digits[:20]) * unit
        if len(digits) > 20 or length > MOST_TOKENS:
            raise MatrixError(f"length {shown(part)} is beyond what any machine holds")
        lengths.add(length)
    return tuple(sorted(lengths))


def parse_protocols(text: str) -> tuple[str, ...]:
    """The name of a protocol, or "both"."""
    if text == "both":
        return PROTOCOLS
    if text not in PROTOCOLS:
        raise _unknown("protocol", text, [*PROTOCOLS, "both"])
    return (text,)


def parse_methods(text: str, **defaults: Any) -> tuple[Method, ...]:
    """Samplers separated by commas, each with settings of `Config` behind a colon if it has any.

    "full,lsh,lsh:K=9,L=120,topk:0.02": a part with an equals sign belongs to the sampler before it, and a bare number
    is the budget. A name that ends in .json is a file of settings (config_file.py). ``defaults`` are settings that hold
    where a sampler has none of its own.
    Raises MatrixError, and ConfigFileError for such a file.
    """
    named: list[list[str]] = []
    for part in _names(text, "--samplers"):
        if "=" in part and ":" not in part and named:
            named[-1].append(part)
        else:
            named.append([part])
    methods: list[Method] = []
    for parts in named:
        method = _method(",".join(parts), defaults)
        for other in methods:
            if other.config == method.config or other.name == method.name:
                raise MatrixError(f"samplers {other.name!r} and {method.name!r} are the same")
        methods.append(method)
    return tuple(methods)


def _method(name: str, defaults: dict[str, Any]) -> Method:
    if name.endswith(".json"):
        # By its name alone: results do not depend on where it lies.
        return _with_settings(Path(name).name, {**defaults, **load_config(name).model_dump(exclude_unset=True)})
    try:
        given = parse_sampler(name)
    except ArgumentError as error:
        raise MatrixError(str(error)) from None
    if given["sampler"] not in SAMPLERS:
        raise _unknown("sampler", given["sampler"], SAMPLERS)
    return _with_settings(name, {**defaults, **given})


def _with_settings(name: str, settings: dict[str, Any]) -> Method:
    try:
        return Method(name, Config(**settings))
    except ValueError as error:
        raise MatrixError(f"sampler {shown(name)}: {error}") from None


def _names(text: str, option: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise MatrixError(f"{option} {shown(text)} has an empty name")
    return names


def _unknown(kind: str, name: str, allowed: Sequence[str]) -> MatrixError:
    return MatrixError(f"unknown {kind} {shown(name)}; {did_you_mean(name, allowed)}")
