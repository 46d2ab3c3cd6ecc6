"""The eight needle tasks (niah): facts hidden in a haystack, some of them asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from magicpig.studies.evaluation.tasks import filler, lexicon, templates
from magicpig.studies.evaluation.tasks.fit import Draft, Recipe, padded
from magicpig.studies.evaluation.tasks.request import Request

# Where RULER lets a needle stand in an essay, in percent of its sentences.
DEPTHS = tuple(round(100 * place / 39) for place in range(40))


@dataclass(frozen=True)
class Niah:
    """RULER's settings of a needle task: kinds of haystack, key, value; how many keys, values per key, keys asked."""

    haystack: Literal["repeat", "essay", "needle"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def recipe(self, request: Request) -> Recipe:
        taken: set[str] = set()
        rng = request.draw("needles")
        facts = [
            (_new(_KEYS[self.key], rng, taken), [_new(_VALUES[self.value], rng, taken) for _ in range(self.values)])
            for _ in range(self.keys)
        ]
        needles = [templates.needle(self.value, key, value) for key, values in facts for value in values]
        rng.shuffle(needles)
        asked = rng.sample(facts, self.queries)
        answers = tuple(value for _, values in asked for value in values)
        before, question, answer = templates.niah(self.value, [key for key, _ in asked], len(answers))

        stream = self._haystack(request, taken)
        units: list[str] = []

        def build(count: int, paddings: int) -> Draft:
            units.extend(islice(stream, max(0, count - len(units))))
            text = self._hide(needles, padded(units[:count], paddings), request.draw("places"))
            return Draft(before + text, question, answer, answers)

        return Recipe(build, minimum=len(needles))

    def _haystack(self, request: Request, taken: set[str]) -> Iterator[str]:
        rng, essay = request.draw("haystack"), request.sources.filler
        if self.haystack == "essay":
            yield from filler.sentences_of(essay, rng) if essay else filler.sentences(rng)
        while self.haystack == "repeat":
            yield templates.NOISE
        while self.haystack == "needle":
            key, value = (_new(make, rng, taken) for make in (_KEYS[self.key], _VALUES[self.value]))
            yield templates.needle(self.value, key, value)

    def _hide(self, needles: list[str], hay: list[str], rng: random.Random) -> str:
        if self.haystack == "essay":
            places = sorted(len(hay) * depth // 100 for depth in rng.sample(DEPTHS, len(needles)))
        else:
            places = sorted(rng.sample(range(len(hay)), len(needles)))
        text = list(hay)
        for place, needle in reversed(list(zip(places, needles, strict=True))):
            text.insert(place, needle)
        return (" " if self.haystack == "essay" else "\n").join(text)


_KEYS = {"words": lexicon.key, "uuids": lexicon.uuid4}
_VALUES = {"numbers": lexicon.number, "uuids": lexicon.uuid4}


def _new(make: Callable[[random.Random], str], rng: random.Random, taken: set[str]) -> str:
    while (made := make(rng)) in taken:
        pass
    taken.add(made)
    return made
