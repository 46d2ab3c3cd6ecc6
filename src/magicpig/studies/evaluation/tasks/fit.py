"""Makes a prompt exactly as long as it should be, for any tokenizer, without encoding a long text many times.

A recipe builds its prompt from a number of units (sentences, needles, words) and a number of small paddings. The number
of units is searched with an estimate: the text cut at its white space, each piece encoded once. Whole texts are encoded
only to correct the estimate, two to five times.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from magicpig.studies.evaluation.tasks.templates import NOISE

_CHUNK = re.compile(r"\s*\S+|\s+")
_NOISE_PIECES = re.findall(r" ?[A-Za-z]+|\.", NOISE)
_ROUNDS = 6  # of correcting the estimate; two or three are usual


class Tokenizer(Protocol):
    """What is asked of a tokenizer; transformers' tokenizers are such."""

    def __call__(self, text: Any, *, add_special_tokens: bool = True, verbose: bool = True) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Draft:
    """A prompt in parts; it is their concatenation."""

    context: str
    question: str
    answer_prefix: str
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return self.context + self.question + self.answer_prefix


@dataclass(frozen=True)
class Recipe:
    """build(units, paddings) makes a prompt that grows with both, within these bounds."""

    build: Callable[[int, int], Draft]
    minimum: int = 1
    maximum: int | None = None
    paddings: int | None = None


class Meter:
    """Counts tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lengths: dict[str, int] = {}

    def exact(self, text: str) -> int:
        """The tokens of the text, with the special tokens that the tokenizer adds."""
        # Prompts may be longer than the tokenizer thinks its model can read.
        return len(self._tokenizer(text, verbose=False)["input_ids"])

    def estimate(self, text: str) -> int:
        """The tokens of the text's pieces, each encoded by itself."""
        chunks = _CHUNK.findall(text)
        new = list(set(chunks).difference(self._lengths))
        if new:
            encoded = self._tokenizer(new, add_special_tokens=False)["input_ids"]
            self._lengths.update(zip(new, map(len, encoded), strict=True))
        return sum(map(self._lengths.__getitem__, chunks))


def padded(lines: list[str], count: int) -> list[str]:
    """``lines``, the last one followed by the first ``count`` words and full stops of RULER's noise, repeated."""
    if not count:
        return lines
    times, rest = divmod(count, len(_NOISE_PIECES))
    return [*lines[:-1], " ".join([lines[-1], *[NOISE] * times, "".join(_NOISE_PIECES[:rest])]).strip()]


def fit(recipe: Recipe, meter: Meter, limit: int) -> tuple[Draft, int]:
    """The longest prompt of at most ``limit`` tokens, and its tokens.

    Even the smallest may be longer than ``limit``: then that one.
    """
    units = recipe.minimum
    draft = recipe.build(units, 0)
    tokens, estimate = meter.exact(draft.prompt), meter.estimate(draft.prompt)
    if tokens > limit:
        return draft, tokens

    slope = 1.0  # tokens for one estimated token
    for _ in range(_ROUNDS):
        before = units, tokens, estimate
        units = _most_units(recipe, meter, limit, offset=tokens - slope * estimate, slope=slope)
        if units == before[0]:
            break
        draft = recipe.build(units, 0)
        tokens, estimate = meter.exact(draft.prompt), meter.estimate(draft.prompt)
        if estimate != before[2]:
            slope = max(0.1, (tokens - before[1]) / (estimate - before[2]))
    while tokens > limit:
        units -= 1
        draft = recipe.build(units, 0)
        tokens = meter.exact(draft.prompt)

    drafts = {0: (draft, tokens)}

    def filled(count: int) -> int:
        if count not in drafts:
            draft = recipe.build(units, count)
            drafts[count] = draft, meter.exact(draft.prompt)
        return drafts[count][1]

    return drafts[_largest(filled, limit, 0, recipe.paddings, step=limit - tokens)]


def _most_units(recipe: Recipe, meter: Meter, limit: int, *, offset: float, slope: float) -> int:
    def cost(units: int) -> float:
        return offset + slope * meter.estimate(recipe.build(units, 0).prompt)

    return _largest(cost, limit, recipe.minimum, recipe.maximum, step=16)


def _largest(cost: Callable[[int], float], limit: int, low: int, high: int | None, *, step: int) -> int:
    """An n between ``low`` and ``high`` with cost(n) = limit, else the largest with cost(n) < limit; cost grows.

    By interpolation, after a first step of ``step``. cost(low) is at most ``limit``.
    """
    end = None if high is None else high + 1  # the first n known to be too many
    below = cost(low)
    slope = max(1, limit - below) / max(1, step)
    while round(below) != limit and (end is None or end - low > 1):
        guess = low + max(1, int((limit - below) / slope))
        if end is not None:
            guess = min(guess, end - 1)
        found = cost(guess)
        slope = max((found - below) / (guess - low), 1e-3)
        if found <= limit:
            low, below = guess, found
        else:
            end = guess
    return low
