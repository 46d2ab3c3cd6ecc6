"""Question answering among many documents (qa_1, qa_2), from files of the user."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from magicpig import strict_json
from magicpig.studies.evaluation.tasks import templates
from magicpig.studies.evaluation.tasks.fit import Draft, Recipe, padded
from magicpig.studies.evaluation.tasks.request import Request, TaskError

FILES = {"squad": "dev-v2.0.json of SQuAD", "hotpotqa": "hotpot_dev_distractor_v1.json of HotpotQA"}
LONGEST = 2000  # words of noise that may stand where one more document does not fit


@dataclass(frozen=True)
class Question:
    """gold, near: documents that have to be shown, and those to be shown before any other."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    near: tuple[str, ...] = ()


@dataclass(frozen=True)
class Collection:
    """Questions, and all their documents, sorted."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]


def squad(request: Request) -> Recipe:
    """qa_1: the paragraph with the answer among others. Raises TaskError for a file that cannot be used."""
    return _recipe(request, _load(request, "squad", _read_squad))


def hotpotqa(request: Request) -> Recipe:
    """qa_2: the question's ten paragraphs among others. Raises TaskError for a file that cannot be used."""
    return _recipe(request, _load(request, "hotpotqa", _read_hotpotqa))


def _recipe(request: Request, collection: Collection) -> Recipe:
    order = list(range(len(collection.questions)))
    # One order for all lengths: sample 3 asks the same at 4K and at 64K.
    random.Random(f"{request.seed} {request.task}").shuffle(order)
    asked = collection.questions[order[request.index % len(order)]]

    rng = request.draw("documents")
    near = [document for document in asked.near if document not in asked.gold]
    rng.shuffle(near)
    known = {*asked.gold, *near}
    others = [document for document in collection.documents if document not in known]
    rng.shuffle(others)
    documents = [*asked.gold, *near, *others]

    def build(count: int, paddings: int) -> Draft:
        shown = documents[:count]
        request.draw("order").shuffle(shown)
        parts = [f"Document {place}:\n{document}" for place, document in enumerate(shown, 1)]
        return Draft(
            templates.QA.context.format(context="\n\n".join(padded(parts, paddings))),
            templates.QA.question.format(query=asked.text),
            templates.QA.answer,
            asked.answers,
        )

    return Recipe(build, minimum=len(asked.gold), maximum=len(documents), paddings=LONGEST)


def _load(request: Request, option: Literal["squad", "hotpotqa"], read: Callable[[Any], list[Question]]) -> Collection:
    path: Path | None = getattr(request.sources, option)
    if path is None:
        raise TaskError(f"task {request.task} needs the file {FILES[option]}: {option} is not given")
    return _collect(option, path, read)


@cache
def _collect(option: str, path: Path, read: Callable[[Any], list[Question]]) -> Collection:
    try:
        questions = read(strict_json.parse(path.read_bytes(), lenient=True))
        if not all(isinstance(text, str) for each in questions for text in (each.text, *each.answers, *each.gold)):
            raise TypeError
    except OSError as error:
        raise TaskError(f"{option}={str(path)!r} cannot be read: {error.strerror}") from None
    except strict_json.JsonError:
        raise TaskError(f"{option}={str(path)!r} is not JSON") from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise TaskError(f"{option}={str(path)!r} is not in the form of {FILES[option]}") from None
    if not questions:
        raise TaskError(f"{option}={str(path)!r} has no question with an answer")
    documents = {document for question in questions for document in (*question.gold, *question.near)}
    return Collection(tuple(questions), tuple(sorted(documents)))


def _read_squad(data: Any) -> list[Question]:
    questions = []
    for article in data["data"]:
        near = tuple(paragraph["context"] for paragraph in article["paragraphs"])
        for paragraph in article["paragraphs"]:
            for item in paragraph["qas"]:
                if not item["is_impossible"]:
                    answers = tuple(dict.fromkeys(answer["text"] for answer in item["answers"]))
                    questions.append(Question(item["question"], answers, (paragraph["context"],), near))
    return questions


def _read_hotpotqa(data: Any) -> list[Question]:
    questions = []
    for item in data:
        gold = dict.fromkeys(f"{title}\n{''.join(sentences)}" for title, sentences in item["context"])
        questions.append(Question(item["question"], (item["answer"],), tuple(gold)))
    return questions
