"""Text around which needles are hidden and that means nothing: made sentence by sentence, or the user's own."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from magicpig.studies.evaluation.tasks import lexicon
from magicpig.studies.evaluation.tasks.request import TaskError

# n noun, a adjective, v verb; the other words stand as they are.
_PATTERNS = (
    "The {a} {n} was near the {n}, and nobody could {v} it.",
    "Every {n} has a {a} {n} of its own.",
    "In the morning they would {v} the {n} and {v} the {n}.",
    "It is hard to {v} without a {a} {n}.",
    "She wanted to {v} the {n} before the {n} was {a}.",
    "He did not {v}, because the {n} was too {a}.",
    "Some people {v} when they see a {n}; others {v} at once.",
    "There was once a {n} that looked like a {a} {n}.",
    "We learned to {v} with the {n} of a {a} {n}.",
    "Most of the {n} came from the {n}, but the {n} did not.",
    "If you {v} a {n} long enough, it will become {a}.",
    "The {n} and the {n} were both {a} and {a}.",
    "They never {v} after the {n}, even when the {n} is {a}.",
    "What the {n} needs is more {n} and less {n}.",
    "I used to think that a {n} could {v} every {a} {n}.",
    "Between the {n} and the {n} there is a {a} {n}.",
    "You should {v} the {a} {n} while it is still {a}.",
    "A {a} {n} is worth more than a {a} {n}.",
    "Nothing about the {n} was as {a} as its {n}.",
    "One day the {n} will {v}, and then the {n} will {v} too.",
    "People who {v} often forget the {a} {n} under the {n}.",
    "When the {n} began to {v}, the {n} turned {a}.",
    "The best {n} is the one you can {v} by yourself.",
    "Perhaps it was only a {n}, but it seemed {a} to me.",
)
TEXTS = (*(re.sub(r"\{.\}", "", pattern) for pattern in _PATTERNS), "An an")

# A reader who looks for "special magic numbers" should find needles only.
_NEEDLE_WORDS = {"special", "magic", "magical", "number"}


def sentences(rng: random.Random) -> Iterator[str]:
    """Endless sentences of common build and random words."""
    words = _words()
    while True:
        text = re.sub(r"\{(.)\}", lambda match: rng.choice(words[match[1]]), rng.choice(_PATTERNS))
        yield re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def sentences_of(path: Path, rng: random.Random) -> Iterator[str]:
    """The sentences of a text file from a random one on, again and again. Raises TaskError, also for an empty file."""
    read = _split(path)
    start = rng.randrange(len(read))
    while True:
        yield from read[start:]
        start = 0


@cache
def _words() -> dict[str, tuple[str, ...]]:
    lists = {"n": lexicon.nouns(), "a": lexicon.adjectives(), "v": lexicon.verbs()}
    return {kind: tuple(word for word in words if word not in _NEEDLE_WORDS) for kind, words in lists.items()}


@cache
def _split(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TaskError(f"filler={str(path)!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TaskError(f"filler={str(path)!r} is not UTF-8 text (byte {error.start})") from None
    read = tuple(sentence for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if sentence)
    if not read:
        raise TaskError(f"filler={str(path)!r} has no text")
    return read
