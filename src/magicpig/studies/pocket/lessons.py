"""What the pocket model learns from: the tasks of the evaluation, and denser forms of them.

A task has one question and so a handful of answer tokens to learn from in thousands. Here most texts are followed by
many questions, as long as the first one stands exactly where the evaluation puts it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from transformers import PreTrainedTokenizerFast

from magicpig.studies.evaluation import tasks
from magicpig.studies.evaluation.tasks import filler, lexicon, templates

KINDS = ("niah", "vt", "cwe", "fwe")
_SEED = 1_000_003  # far from any seed an evaluation would use
_WHOLE = 1024  # from this length on some lessons are the tasks themselves
# Not the two that ask for four values at once: nothing in the model tells which of them have been said.
_TASKS = {
    "niah": tuple(name for name in tasks.TASKS if name.startswith(("niah_single", "niah_multikey"))),
    "vt": ("vt",),
    "cwe": ("cwe",),
    "fwe": ("fwe",),
}


@dataclass(frozen=True)
class Target:
    """After the token at position `at` any of `right` may come."""

    at: int
    right: tuple[int, ...]


@dataclass
class Lesson:
    """ids: the tokens. targets: what is to be learnt of them, in order. asked: where the first question begins."""

    ids: list[int]
    targets: list[Target] = field(default_factory=list)
    asked: int | None = None


class Writer:
    """Puts lessons together, one after the other; remembers how words are encoded."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._encode = lru_cache(maxsize=1 << 16)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))
        self.tokenizer = tokenizer

    def begin(self, length: int) -> None:
        """Starts a lesson that is not longer than `length` tokens."""
        self.length = length
        self.lesson = Lesson([self.tokenizer.bos_token_id])

    @property
    def room(self) -> int:
        return self.length - len(self.lesson.ids)

    def tokens(self, text: str) -> int:
        return len(self._encode(text))

    def say(self, text: str) -> None:
        self.lesson.ids += self._encode(text)

    def ask(self, text: str) -> None:
        """A question; what was said before the first one is the text it is about."""
        if self.lesson.asked is None:
            self.lesson.asked = len(self.lesson.ids)
        self.say(text)

    def answer(self, text: str) -> None:
        """The same, to be learnt, with the end of the answer."""
        for token in self._encode(text):
            self._expect((token,), token)
        self._end()

    def answer_in_any_order(self, words: Sequence[str]) -> None:
        """A numbered list of single-token words; at every place any of those that are left is right."""
        left = [self._encode(word)[0] for word in words]
        for place in range(len(words)):
            for token in self._encode(f"{place + 1}."):
                self._expect((token,), token)
            self._expect(tuple(left), left.pop(0))
        self._end()

    def sample(self, sample: tasks.Sample) -> None:
        """A text of the evaluation with its question, to be answered."""
        self.say(sample.context)
        self.ask(sample.question)
        if sample.task == "cwe":
            self.answer_in_any_order(sample.answers)
        else:
            self.answer(" ".join(sample.answers))

    def _end(self) -> None:
        token = self.tokenizer.eos_token_id
        self._expect((token,), token)

    def _expect(self, right: tuple[int, ...], token: int) -> None:
        self.lesson.targets.append(Target(len(self.lesson.ids) - 1, right))
        self.lesson.ids.append(token)

    def finished(self) -> Lesson:
        """The lesson, cut to length."""
        ids = self.lesson.ids[: self.length]
        targets = [target for target in self.lesson.targets if target.at < len(ids) - 1]
        return Lesson(ids, targets, self.lesson.asked)


def lesson(kind: str, writer: Writer, length: int, rng: random.Random) -> Lesson:
    """A lesson of one of `KINDS`, as long as `length` tokens allow."""
    writer.begin(length)
    if length >= _WHOLE and rng.random() < 0.5:
        _whole_task(rng.choice(_TASKS[kind]), writer, rng)
    else:
        {"niah": _niah, "vt": _vt, "cwe": _cwe, "fwe": _fwe}[kind](writer, rng)
    return writer.finished()


def _whole_task(name: str, writer: Writer, rng: random.Random) -> None:
    index = rng.randrange(1 << 40)
    sample = tasks.generate(name, writer.tokenizer, writer.length, index=index, seed=_SEED)
    writer.sample(sample)


def _niah(writer: Writer, rng: random.Random) -> None:
    """Facts in a haystack, and as many questions about them as fit into a part of the text."""
    kind = rng.choice(("numbers", "numbers", "uuids"))
    value = {"numbers": lexicon.number, "uuids": lexicon.uuid4}[kind]
    haystack = rng.choice(("repeat", "essay", "needle", "needle"))
    key = lexicon.uuid4 if kind == "uuids" and haystack == "needle" and rng.random() < 0.5 else lexicon.key
    before, question, prefix = templates.niah(kind, [key(rng)], 1)
    writer.say(before)
    per_question = writer.tokens(question + prefix + value(rng)) + 1
    questions = max(1, int(min(0.45 * writer.length, 1200)) // per_question)
    room = writer.room - questions * per_question
    facts: dict[str, str] = {}
    lines: list[str] = []
    wanted = rng.choice((1, 2, 4, 8, 16))
    sentences = filler.sentences(rng)
    while True:
        if haystack == "needle" or len(facts) < wanted:
            new, held = key(rng), value(rng)
            line = templates.needle(kind, new, held)
        else:
            new, line = "", templates.NOISE if haystack == "repeat" else next(sentences)
        room -= writer.tokens(line)
        if room < 0 and facts:
            break
        if new:
            facts[new] = held
        lines.append(line)
    rng.shuffle(lines)
    for line in lines:
        writer.say(line)
    for _ in range(4 * questions):
        asked = rng.choice(list(facts))
        _, question, prefix = templates.niah(kind, [asked], 1)
        answer = facts[asked]
        text = question + prefix
        if writer.tokens(text) + writer.tokens(answer) + 1 > writer.room:
            break
        writer.ask(text)
        writer.answer(answer)


def _vt(writer: Writer, rng: random.Random) -> None:
    """Chains of five variables in noise, and a question about each."""
    writer.say(templates.VT.context.format(context=""))
    line, ask = 7, 60
    chains = max(1, min(rng.choice((1, 1, 1, 2, 4)), (writer.room - 20) // (5 * line + ask)))
    pool = rng.sample(lexicon.variables(), 5 * chains)
    values = [str(value) for value in rng.sample(range(10000, 99999), chains)]
    names = [pool[5 * chain : 5 * chain + 5] for chain in range(chains)]
    noise = max(0, writer.room - chains * (5 * line + ask)) // writer.tokens(templates.NOISE)
    lines = [(rng.random(), templates.NOISE) for _ in range(noise)]
    for chain in range(chains):
        places = sorted(rng.random() for _ in range(5))
        lines += zip(places, templates.assignments(names[chain], values[chain]), strict=True)
    for _, text in sorted(lines):
        writer.say(text)
    for chain in rng.sample(range(chains), chains):
        text = templates.VT.question.format(query=values[chain])
        text += templates.VT.answer.format(query=values[chain], count=5)
        if writer.tokens(text) + 6 > writer.room:
            break
        writer.ask(text)
        writer.answer(" ".join(names[chain]))


def _cwe(writer: Writer, rng: random.Random) -> None:
    """A list in which some words are more common; fewer of them, and less common ones, when it is short."""
    ask = templates.CWE.question + templates.CWE.answer
    writer.say(templates.CWE.context.format(context=""))
    entries = (writer.room - writer.tokens(ask) - 35) * 10 // 36
    often, seldom = rng.choice(((6, 1), (10, 3), (30, 3), (8, 2), (5, 1)))
    while entries < 2 * often * 3 and often > 3:
        often, seldom = often // 2, max(1, seldom // 2)
    common = max(2, min(10, int(entries * rng.uniform(0.1, 0.6)) // often))
    rare = max(1, (entries - common * often) // seldom)
    words = rng.sample(lexicon.english(), min(common + rare, len(lexicon.english())))
    text = words[:common] * often + words[common:] * seldom
    rng.shuffle(text)
    writer.say(templates.numbered(text))
    writer.ask(ask)
    writer.answer_in_any_order(words[:common])


def _fwe(writer: Writer, rng: random.Random) -> None:
    """Coded words with falling counts, also a little less steep than in the task."""
    ask = templates.FWE.question + templates.FWE.answer
    writer.say(templates.FWE.context.format(context=""))
    total = writer.room - writer.tokens(ask) - 4
    count = max(6, rng.choice((writer.length // 50, writer.length // 20, 8, 12)))
    alpha = 2.0 if rng.random() < 0.7 else rng.uniform(1.5, 2.0)
    shares = [rank**-alpha for rank in range(1, count + 1)]
    words = [templates.DOTS, *rng.sample(lexicon.coded_words(), count - 1)]
    text = [word for word, share in zip(words, shares, strict=True) for _ in range(int(total * share / sum(shares)))]
    rng.shuffle(text)
    writer.say(" ".join(text))
    writer.ask(ask)
    writer.answer(" ".join(words[1:4]))
