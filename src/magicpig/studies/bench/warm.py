"""What a warm document saves: the time to the first token of a first question, of a second, and of one after a restart.

The document is made of random words, and each question comes behind it. For the restart the engine ends and another one
starts, which has nothing but the files of the first.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from magicpig import generation
from magicpig.config import Config
from magicpig.engine.engine import Engine
from magicpig.engine.options import EngineOptions
from magicpig.engine.request import Delta, Request, SamplingParams
from magicpig.studies.evaluation.tasks import lexicon

QUESTION_WORDS = 16


@dataclass(frozen=True)
class Result:
    """Seconds to the first token. tokens: of the document; new: of a question. file_bytes: of the document's file.

    second, restarted: the least of several questions, each with words of its own. cached: tokens that these did not
    have to read.
    """

    tokens: int
    new: int
    first_s: float
    second_s: float
    restarted_s: float
    cached: int
    cached_restarted: int
    file_bytes: int

    @property
    def second_ratio(self) -> float:
        return self.first_s / self.second_s

    @property
    def restarted_ratio(self) -> float:
        return self.first_s / self.restarted_s


def measure(
    directory: Path, config: Config, tokens: int, *, repeats: int, on_done: Callable[[], None] = lambda: None
) -> Result:
    """A document of so many tokens; `repeats` second questions, and as many restarts."""
    opened = generation.open_model(directory)
    chance, words = random.Random(0), lexicon.english()

    def some(count: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < count:
            ids += opened.tokenizer(" ".join(chance.choices(words, k=count)), add_special_tokens=False)["input_ids"]
        return ids[:count]

    document = some(tokens)
    questions = iter([some(QUESTION_WORDS) for _ in range(2 * repeats + 1)])
    with tempfile.TemporaryDirectory() as folder:
        network = generation.load(opened)

        def engine() -> Engine:
            options = EngineOptions(max_length=tokens + 1000, cache_dir=Path(folder))
            return Engine(network, opened.tokenizer, config, options)

        def ask(engine: Engine) -> tuple[float, int]:
            seconds, cached = _first_token(engine, [*document, *next(questions)])
            on_done()
            return seconds, cached

        running = engine()
        first, _ = ask(running)
        second = [ask(running) for _ in range(repeats)]
        running.rest()
        running.close()
        restarted = []
        for _ in range(repeats):
            running = engine()
            restarted.append(ask(running))
            running.close()
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return Result(tokens, QUESTION_WORDS, first, min(second)[0], min(restarted)[0], second[0][1], restarted[0][1], size)


def _first_token(engine: Engine, prompt: Sequence[int]) -> tuple[float, int]:
    """Seconds to the first token of an answer of two, and how many tokens of the prompt were warm."""
    times: list[float] = []
    cached: list[int] = []

    def deliver(delta: Delta) -> None:
        if delta.tokens:
            times.append(time.perf_counter())
        if delta.report is not None:
            cached.append(delta.report.cached_tokens)

    start = time.perf_counter()
    engine.submit(Request(tuple(prompt), SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)), deliver)
    while engine.unfinished:
        if not engine.step():
            engine.wait()
    return times[0] - start, cached[0]
