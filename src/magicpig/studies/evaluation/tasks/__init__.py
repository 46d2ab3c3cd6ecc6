"""The 13 tasks of RULER (arXiv 2404.06654): generated, seeded, and exactly as long as asked for.

`docs/evaluation.md` compares them with RULER's, field by field.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from magicpig.studies.evaluation.tasks import documents, templates, words
from magicpig.studies.evaluation.tasks.fit import Meter, Recipe, Tokenizer, fit
from magicpig.studies.evaluation.tasks.needles import Niah
from magicpig.studies.evaluation.tasks.request import Request, Sources, TaskError
from magicpig.studies.evaluation.tasks.score import match_all, match_any

__all__ = [
    "TASKS",
    "Sample",
    "Sources",
    "Task",
    "TaskError",
    "check_minimum",
    "find_task",
    "generate",
    "minimum_length",
    "score",
]

SLACK = 32  # tokens by which a prompt may be too short, where the tokenizer allows no better


@dataclass(frozen=True)
class Sample:
    """One question about one long text.

    length: tokens as RULER counts them, prompt_tokens + tokens_to_generate (+ what was reserved).
    context, question: concatenated, the prompt. The question starts with a line break and ends with answer_prefix.
    prompt_tokens: tokens of the prompt, the special ones that the tokenizer adds among them.
    """

    task: str
    index: int
    length: int
    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]
    prompt_tokens: int
    tokens_to_generate: int

    @property
    def prompt(self) -> str:
        return self.context + self.question


@dataclass(frozen=True)
class Task:
    """about: one line on what is asked. source: the field of `Sources` without which there are no samples."""

    name: str
    about: str
    tokens_to_generate: int
    recipe: Callable[[Request], Recipe]
    score: Callable[[str, Sequence[str]], float] = match_all
    source: str | None = None


def _niah(name: str, about: str, niah: Niah) -> Task:
    return Task(name, about, templates.NIAH.tokens_to_generate, niah.recipe)


def _qa(name: str, about: str, recipe: Callable[[Request], Recipe], source: str) -> Task:
    return Task(name, about, templates.QA.tokens_to_generate, recipe, match_any, source)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _niah("niah_single_1", "one number in repeated noise", Niah("repeat")),
        _niah("niah_single_2", "one number in an essay", Niah("essay")),
        _niah("niah_single_3", "one uuid in an essay", Niah("essay", value="uuids")),
        _niah("niah_multikey_1", "one of four numbers in an essay", Niah("essay", keys=4)),
        _niah("niah_multikey_2", "one number among as many as fit", Niah("needle")),
        _niah("niah_multikey_3", "one uuid among as many as fit", Niah("needle", "uuids", "uuids")),
        _niah("niah_multivalue", "four numbers of one key in an essay", Niah("essay", values=4)),
        _niah("niah_multiquery", "four numbers of four keys in an essay", Niah("essay", keys=4, queries=4)),
        Task("vt", "five variables that hold one value", templates.VT.tokens_to_generate, words.vt),
        Task("cwe", "the ten most common words of a list", templates.CWE.tokens_to_generate, words.cwe),
        Task("fwe", "the three most frequent coded words", templates.FWE.tokens_to_generate, words.fwe),
        _qa("qa_1", "a question about one of many paragraphs", documents.squad, "squad"),
        _qa("qa_2", "a question about two of many paragraphs", documents.hotpotqa, "hotpotqa"),
    )
}
"""The tasks by name, in RULER's order."""


def generate(
    task: str,
    tokenizer: Tokenizer,
    length: int,
    *,
    index: int,
    seed: int = 0,
    sources: Sources = Sources(),  # noqa: B008
    reserve: int = 0,
) -> Sample:
    """Sample ``index`` of a task: the same for the same arguments, whatever was generated before.

    length: tokens of the prompt, of the answer and of ``reserve`` (what a chat template adds). The prompt fills it
        exactly where the tokenizer allows it, else it is a few tokens shorter.
    Raises TaskError for an unknown task, a length below the task's minimum or beyond its material, and an index, file
    or reserve that cannot be used.
    """
    chosen = find_task(task)
    for name, value in (("index", index), ("reserve", reserve)):
        if value < 0:
            raise TaskError(f"{name}={value} is negative")
    limit = length - chosen.tokens_to_generate - reserve
    draft, tokens = fit(chosen.recipe(Request(task, length, index, seed, sources)), Meter(tokenizer), limit)
    if tokens > limit:
        raise _too_short(task, length, length - limit + tokens)
    if tokens < limit - SLACK:
        raise TaskError(f"length={length} is beyond what task {task} has text for, {length - limit + tokens} tokens")
    return Sample(
        task,
        index,
        length,
        draft.context,
        draft.question + draft.answer_prefix,
        draft.answer_prefix,
        draft.answers,
        tokens,
        chosen.tokens_to_generate,
    )


def minimum_length(task: str, tokenizer: Tokenizer, *, sources: Sources = Sources()) -> int:  # noqa: B008
    """The least length of sample 0 of a task. Other samples' can differ by some tokens, of qa tasks by many."""
    chosen = find_task(task)
    recipe = chosen.recipe(Request(task, length=0, index=0, sources=sources))
    return Meter(tokenizer).exact(recipe.build(recipe.minimum, 0).prompt) + chosen.tokens_to_generate


def check_minimum(
    task: str,
    tokenizer: Tokenizer,
    length: int,
    *,
    samples: int,
    seed: int = 0,
    sources: Sources = Sources(),  # noqa: B008
    reserve: int = 0,
) -> None:
    """Raise TaskError if one of the first ``samples`` samples is longer than ``length`` at its shortest.

    Takes as long as counting the tokens of that many short prompts; where the first one has half of the length to
    spare, the others are not looked at: they differ from it by some words.
    """
    chosen, meter = find_task(task), Meter(tokenizer)
    for index in range(samples):
        recipe = chosen.recipe(Request(task, length, index, seed, sources))
        least = meter.exact(recipe.build(recipe.minimum, 0).prompt) + chosen.tokens_to_generate + reserve
        if least > length:
            raise _too_short(task, length, least)
        if 2 * least <= length:
            break


def score(task: str, prediction: str, answers: Sequence[str]) -> float:
    """RULER's score of a prediction, 0 to 1: the share of the answers in it; for qa whether there is one."""
    return find_task(task).score(prediction, answers)


def find_task(name: str) -> Task:
    """The task of that name. Raises TaskError."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(TASKS)}"
        raise TaskError(f"task={name!r} is unknown; {hint}")
    return TASKS[name]


def _too_short(task: str, length: int, least: int) -> TaskError:
    return TaskError(f"length={length} is below the minimum of task {task}, {least} tokens")
