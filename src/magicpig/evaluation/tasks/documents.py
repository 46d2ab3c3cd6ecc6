"""Question answering among many documents (qa_1, qa_2), from files of the user."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from magicpig.evaluation.tasks import templates
from magicpig.evaluation.tasks.fit import Draft, Recipe, padding

LONGEST = 2000  # words of noise that may stand where one more document does not fit


@dataclass(frozen=True)
class Question:
    """gold, near: documents that have to be shown, and those to be shown before any other."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    near: tuple[str, ...] = ()


def squad(draw: Callable[[str], random.Random], index: int, path: Path) -> Recipe:
    """qa_1, from SQuAD 2.0 (arXiv 1806.03822): the paragraph with the answer among others. Raises ValueError."""
    return _recipe(_load("squad", path, _read_squad), draw, index)


def hotpotqa(draw: Callable[[str], random.Random], index: int, path: Path) -> Recipe:
    """qa_2, from HotpotQA (arXiv 1809.09600): the question's ten paragraphs among others. Raises ValueError."""
    return _recipe(_load("hotpotqa", path, _read_hotpotqa), draw, index)


def _recipe(questions: tuple[Question, ...], draw: Callable[[str], random.Random], index: int) -> Recipe:
    order = list(range(len(questions)))
    draw("questions").shuffle(order)
    asked = questions[order[index % len(order)]]
    rng = draw("documents")
    near = [document for document in asked.near if document not in asked.gold]
    rng.shuffle(near)
    known = {*asked.gold, *near}
    others = [document for document in _documents(questions) if document not in known]
    rng.shuffle(others)
    documents = [*asked.gold, *near, *others]

    def build(count: int, paddings: int) -> Draft:
        shown = documents[:count]
        draw("order").shuffle(shown)
        parts = [f"Document {place}:\n{document}" for place, document in enumerate(shown, 1)]
        if paddings:
            parts.append(padding(paddings))
        return Draft(
            templates.QA.context.format(context="\n\n".join(parts)),
            templates.QA.question.format(query=asked.text),
            templates.QA.answer,
            asked.answers,
        )

    return Recipe(build, minimum=len(asked.gold), maximum=len(documents), paddings=LONGEST)


@cache
def _documents(questions: tuple[Question, ...]) -> tuple[str, ...]:
    return tuple(sorted({document for question in questions for document in (*question.gold, *question.near)}))


@cache
def _load(option: str, path: Path, read: Callable[[Any], list[Question]]) -> tuple[Question, ...]:
    try:
        questions = read(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{option}={str(path)!r} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"{option}={str(path)!r} is not JSON") from None
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{option}={str(path)!r} has another form than the data set's own files") from None
    if not questions:
        raise ValueError(f"{option}={str(path)!r} has no question with an answer")
    return tuple(questions)


def _read_squad(data: Any) -> list[Question]:
    return [
        Question(
            question["question"],
            tuple(answer["text"] for answer in question["answers"]),
            gold=(paragraph["context"],),
            near=tuple(other["context"] for other in article["paragraphs"]),
        )
        for article in data["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
        if not question["is_impossible"]
    ]


def _read_hotpotqa(data: Any) -> list[Question]:
    return [
        Question(
            item["question"],
            (item["answer"],),
            gold=tuple(dict.fromkeys(f"{title}\n{''.join(sentences)}" for title, sentences in item["context"])),
        )
        for item in data
    ]
