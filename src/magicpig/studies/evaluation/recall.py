"""Whether a model finds again what stands in its own answer, far behind the prompt.

The answer is a text that is decoded token by token, as if the model had written it, with needles in it. So every key of
a needle was indexed while decoding, as it left the recent window, and none of it by the prefill. Then each needle is
asked for. Samplers that index the prompt alone cannot pass.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from magicpig.config import EXACT
from magicpig.generation import Model, greedy, load, read, stop_tokens
from magicpig.integrations.transformers import MagicPigCache, attach
from magicpig.studies.evaluation.answer import read_document
from magicpig.studies.evaluation.matrix import MatrixError, Method
from magicpig.studies.evaluation.perplexity import beginning
from magicpig.studies.evaluation.results import Results, ResultsError, ResultsFile, read_results
from magicpig.studies.evaluation.run import identity
from magicpig.studies.evaluation.table import Table, wilson
from magicpig.studies.evaluation.tasks import lexicon, templates
from magicpig.studies.provenance import provenance
from magicpig.wording import counted

BENCHMARK = "recall"
PIECE = 64  # tokens that are decoded in one forward pass, one after the other all the same
ANSWER = 16  # tokens
DIGITS = 7


@dataclass(frozen=True)
class Plan:
    """What is decoded and asked.

    text: a UTF-8 file. prompt: its tokens that are read as a prompt. decoded: those behind them that are decoded, with
    ``needles`` evenly spread among them. samples: of other needles in the same text.
    """

    text: Path
    methods: tuple[Method, ...]
    prompt: int = 512
    decoded: int = 4352
    needles: int = 4
    samples: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Needle:
    """A sentence with a number, where it begins behind the prompt, and the question for it."""

    sentence: str
    question: str
    number: str
    at: int


def evaluate(
    model: Model,
    plan: Plan,
    path: Path,
    *,
    dtype: str = "auto",
    chunk: int = 1024,
    on_start: Callable[[int, int], None] = lambda done, total: None,
    on_step: Callable[[str, int], None] = lambda step, work: None,
) -> Results:
    """Run what is missing in the results file at ``path``, and return all that is in it: a line per needle.

    dtype, chunk, on_start, on_step: as in `run.evaluate`. Raises MatrixError for a text that is too short,
    ResultsError, ModelError, MemoryError.
    """
    ids = beginning(model, plan.text, plan.prompt + plan.decoded)
    whole = plan.prompt + plan.decoded + plan.needles * 40 + 64 + ANSWER  # a needle and a question are shorter
    if model.limit is not None and whole > model.limit:
        raise MatrixError(f"{plan.prompt} + {plan.decoded} tokens and needles are beyond the limit of {model.limit}")
    cells = [(sample, method) for sample in range(plan.samples) for method in plan.methods]
    with ResultsFile(path, _settings(model, plan, dtype, chunk), provenance(), group=plan.needles) as file:
        on_start(file.done * plan.decoded, len(cells) * plan.decoded)
        network: Any = None
        for sample, method in cells[file.done :]:
            if network is None:
                network = attach(load(model, dtype=dtype), EXACT)
            lines = ask(
                model,
                network,
                ids,
                plan,
                method,
                sample,
                chunk=chunk,
                on_step=lambda count, name=method.name: on_step(name, count),  # type: ignore[misc]
            )
            file.append(lines)
    return read_results(path)


@torch.inference_mode()
def ask(
    model: Model,
    network: Any,
    ids: Sequence[int],
    plan: Plan,
    method: Method,
    sample: int,
    *,
    chunk: int = 1024,
    on_step: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """The lines of one sampler, one for each needle, for an attached network. ids: of the text."""
    needles = make_needles(plan, sample)
    stop = stop_tokens(model, network)
    cache = read_document(network, list(ids[: plan.prompt]), chunk=chunk).fork(method.config)
    written = list(ids[plan.prompt : plan.prompt + plan.decoded])
    for needle in reversed(needles):  # so that the places of those before stay what they are
        tokens = model.tokenizer(f"\n{needle.sentence}\n", add_special_tokens=False)["input_ids"]
        written[needle.at : needle.at] = tokens
    for begin in range(0, len(written), PIECE):
        piece = written[begin : begin + PIECE]
        _decode(network, piece, cache)
        on_step(len(piece))
    lines = []
    for needle in needles:
        asked = cache.fork()
        question = model.tokenizer(needle.question, add_special_tokens=False)["input_ids"]
        logits = _decode(network, question, asked)
        answer = greedy(network, logits, asked, max_new_tokens=ANSWER, stop=stop)
        text = model.tokenizer.decode(answer, skip_special_tokens=True)
        report = asked.report()
        lines.append(
            {
                "sampler": method.name,
                "sample": sample,
                "at": needle.at,
                "behind": len(written) - needle.at,
                "decoded": len(written),
                "number": needle.number,
                "prediction": text,
                "score": float(needle.number in text),
                "share_mean": report.sampled_share_mean,
                "indexed": max(layer.indexed for layer in report.layers),
            }
        )
    return lines


def make_needles(plan: Plan, sample: int) -> list[Needle]:
    """The needles of a sample, the first of them first: evenly spread, none in the last tenth."""
    rng = random.Random(f"{plan.seed} {BENCHMARK} {sample}")
    words = rng.sample(lexicon.nouns(), plan.needles)
    found = []
    for i, word in enumerate(words):
        number = "".join(rng.choice("123456789") for _ in range(DIGITS))
        _, question, prefix = templates.niah("numbers", [word], 1)
        at = round(plan.decoded * 0.9 * (i + 0.5) / plan.needles)
        found.append(Needle(templates.needle("numbers", word, number), question + prefix, number, at))
    return found


def _decode(network: Any, ids: list[int], cache: MagicPigCache) -> torch.Tensor:
    with cache.decoding():
        return read(network, ids, cache, chunk=len(ids))


def _settings(model: Model, plan: Plan, dtype: str, chunk: int) -> dict[str, Any]:
    return {
        "benchmark": BENCHMARK,
        "settings": {
            "text": plan.text.name,
            "samplers": {method.name: method.config.model_dump(mode="json") for method in plan.methods},
            "prompt": plan.prompt,
            "decoded": plan.decoded,
            "needles": plan.needles,
            "samples": plan.samples,
            "seed": plan.seed,
            "dtype": dtype,
            "chunk": chunk,
        },
        "model": identity(model),
    }


def table(results: Results) -> Table:
    """A row per sampler. Raises ResultsError for lines that no run writes."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for number, line in enumerate(results.lines, 1):
        whole = isinstance(line.get("sampler"), str) and line.get("score") in (0, 1) and "share_mean" in line
        if not (whole and isinstance(line.get("decoded"), int)):
            raise ResultsError(f"line {number} of the results is damaged")
        grouped.setdefault(line["sampler"], []).append(line)
    rows = []
    for sampler, lines in grouped.items():
        found, share = sum(line["score"] for line in lines), lines[0]["share_mean"]
        low, high = wilson(found / len(lines), len(lines))
        read_ = "all" if share is None else f"{share:.1%}"
        rows.append([sampler, read_, f"{found:.0f} of {len(lines)}", f"{100 * low:.0f}-{100 * high:.0f} %"])
    tokens = max((line["decoded"] for line in results.lines), default=0)
    title = f"needles found again in {counted(tokens, 'token')} that were decoded"
    return Table(title, ["sampler", "keys read", "found", "95 % interval"], [rows])
