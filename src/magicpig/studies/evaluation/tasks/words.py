"""Variable tracking (vt) and the two counting tasks (cwe, fwe)."""

from __future__ import annotations

import math
import random

from magicpig.studies.evaluation.tasks import lexicon, templates
from magicpig.studies.evaluation.tasks.fit import Draft, Recipe, padded
from magicpig.studies.evaluation.tasks.request import Request

HOPS = 4
EXAMPLE_NOISE = 10  # repetitions of the noise in vt's solved example: what fits into RULER's 500 tokens
COMMON = 10
SHORT = 4096  # below this length RULER's cwe repeats its words less often
RANKS = 12  # of coded words at least: a shorter text has no room for them anyway
ZETA_2 = 1.6449340668482264


def vt(request: Request) -> Recipe:
    """One chain of five variables in repeated noise, after a solved example."""
    rng = request.draw("chains")
    first, value = map(str, rng.sample(range(10000, 99999), 2))
    example_names = rng.sample(lexicon.example_variables(), HOPS + 1)
    names = rng.sample(lexicon.variables(), HOPS + 1)
    solved = _chain_prompt(example_names, first, [templates.NOISE] * EXAMPLE_NOISE, rng)
    example = f"{solved.prompt} {' '.join(solved.answers)}\n\n\n\n"

    def build(count: int, paddings: int) -> Draft:
        noise = padded([templates.NOISE] * count, paddings)
        draft = _chain_prompt(names, value, noise, request.draw("places"))
        return Draft(example + draft.context, draft.question, draft.answer_prefix, draft.answers)

    return Recipe(build, minimum=HOPS + 2)


def _chain_prompt(names: list[str], value: str, noise: list[str], rng: random.Random) -> Draft:
    lines = [f"{line}\n" for line in noise]
    places = sorted(rng.sample(range(len(lines)), len(names)))
    for place, line in reversed(list(zip(places, templates.assignments(names, value), strict=True))):
        lines.insert(place, line)
    return Draft(
        templates.VT.context.format(context=" ".join(lines)),
        templates.VT.question.format(query=value),
        templates.VT.answer.format(query=value, count=len(names)),
        tuple(names),
    )


def cwe(request: Request) -> Recipe:
    """A numbered list in which ten words are more common than all others, after a solved example."""
    common, rare, size, example_common, example_rare = (
        (6, 1, 20, 3, 1) if request.length < SHORT else (30, 3, 40, 10, 3)
    )
    rng = request.draw("words")
    words = rng.sample(lexicon.english(), len(lexicon.english()))
    shown, asked, others = words[:size], words[size : size + COMMON], words[size + COMMON :]
    solved = _list_prompt(shown[:COMMON] * example_common + shown[COMMON:] * example_rare, shown[:COMMON], rng)
    example = f"{solved.prompt}{templates.numbered(solved.answers)}\n"
    # Where all words are used, they come again, as long as they stay rarer than the ten.
    others *= common // rare // 2

    def build(count: int, paddings: int) -> Draft:
        entries = asked * common + others[:count] * rare + others[count : count + 1] * paddings
        draft = _list_prompt(entries, asked, request.draw("order"))
        return Draft(example + draft.context, draft.question, draft.answer_prefix, draft.answers)

    return Recipe(build, maximum=len(others), paddings=rare)


def _list_prompt(entries: list[str], common: list[str], rng: random.Random) -> Draft:
    rng.shuffle(entries)
    return Draft(
        templates.CWE.context.format(context=templates.numbered(entries)),
        templates.CWE.question,
        templates.CWE.answer,
        tuple(common),
    )


def fwe(request: Request) -> Recipe:
    """Coded words whose counts fall with the square of their rank; the most frequent one is dots."""
    count = min(max(request.length // 50, RANKS), lexicon.CODED_WORDS)
    vocabulary = [templates.DOTS, *request.draw("words").sample(lexicon.coded_words(), count - 1)]
    shares = [1 / (ZETA_2 * rank**2) for rank in range(1, count + 1)]

    def build(total: int, paddings: int) -> Draft:
        text = [word for word, share in zip(vocabulary, shares, strict=True) for _ in range(int(total * share))]
        text += [templates.DOTS] * paddings
        request.draw("order").shuffle(text)
        return Draft(
            templates.FWE.context.format(context=" ".join(text)),
            templates.FWE.question,
            templates.FWE.answer,
            tuple(vocabulary[1:4]),
        )

    # From here on the last answer is more frequent than what follows it.
    return Recipe(build, minimum=math.ceil(1 / (shares[3] - shares[4])))
