"""Questions with known answers about two long documents, with full attention and with a sample of the keys.

One document hides numbers among sentences: a question needs one place of it. The other is full of words to be counted:
the question needs all of it. Each is read once; both attentions answer from the same cache. A chat model is asked about
numbers in a novel instead, in its own template.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from magicpig.config import EXACT, Config
from magicpig.generation import Model, load, stop_tokens
from magicpig.integrations.transformers import attach
from magicpig.kernels import library
from magicpig.studies.evaluation.answer import Answer, answers, read_document
from magicpig.studies.evaluation.matrix import Method
from magicpig.studies.evaluation.perplexity import TEXTS
from magicpig.studies.evaluation.run import make_prompt, template_tokens
from magicpig.studies.evaluation.tasks import Sample, Sources, generate, score, templates

METHODS = (Method("full attention", EXACT), Method("sampled", Config(exact_below=0)))
RUNS = [("question-dense", method) for method in METHODS]
NOVEL = next(path for path in TEXTS if path.stem == "pride")
CHAT_TOKENS = 24  # of an answer: a chat model goes on talking
SPEED_TOKENS = 33  # the first of them comes from reading the question

_NEEDLE = re.compile(
    re.escape(templates.needle("numbers", "KEY", "VALUE")).replace("KEY", "(.+?)").replace("VALUE", r"(\d+)")
)


@dataclass(frozen=True)
class Question:
    """expected: the right answers. said, scores: by method, as in `METHODS`; a score is 0 to 1."""

    text: str
    expected: tuple[str, ...]
    said: list[str]
    scores: list[float]


@dataclass(frozen=True)
class Document:
    """tokens: its length. read_s: seconds that reading it took."""

    about: str
    tokens: int
    read_s: float
    questions: list[Question]


@dataclass(frozen=True)
class Performance:
    """What a method took, over both documents.

    share_mean, share_max: of the keys, what a head of a sampled layer read in a step; None if it read all.
    index_s, index_bytes: of the larger index. tokens_per_s: in `SPEED_TOKENS` more tokens.
    """

    method: str
    config: Config
    share_mean: float | None
    share_max: float | None
    index_s: float
    index_bytes: int
    tokens_per_s: float


@dataclass(frozen=True)
class Demo:
    """What was seen. sampled_layers: those that do not read all keys anyway."""

    model: str
    parameters: int
    dtype: str
    layers: int
    sampled_layers: list[int]
    documents: list[Document]
    performance: list[Performance]


def run(
    model: Model,
    *,
    tokens: int,
    seed: int = 0,
    on_start: Callable[[str, int], None] = lambda about, tokens: None,
    on_read: Callable[[int], None] = lambda tokens: None,
) -> Demo:
    """Let an opened model read two documents and question it; `tokens` of prompt and answer each.

    on_start is called with what is about to be read and its tokens, on_read with the tokens of each chunk read.
    Raises TaskError if a document cannot have this length, ModelError if the model cannot read it.
    """
    chat = bool(model.tokenizer.chat_template)
    if chat:  # a model that was taught to talk, not to count
        prepared = {"numbers hidden in a novel": list(_needles(model, tokens, seed, Sources(NOVEL)))}
    else:
        prepared = {
            "numbers hidden among sentences": list(_needles(model, tokens, seed, Sources())),
            "words to be counted": [generate("fwe", model.tokenizer, tokens, index=0, seed=seed)],
        }
    network = attach(load(model, dtype=fast_dtype()), EXACT)
    documents: list[Document] = []
    timed: list[list[Answer]] = []
    for about, samples in prepared.items():
        document, probes = _question(model, network, about, samples, on_start, on_read)
        documents.append(document)
        timed.append(probes)
    layers = timed[0][1].cache.layers
    return Demo(
        model=model.directory.name,
        parameters=network.num_parameters(),
        dtype=str(network.dtype).removeprefix("torch."),
        layers=len(layers),
        sampled_layers=[layer.layer for layer in layers if layer.kind == "sampled"],
        documents=documents,
        performance=[_performance(*row) for row in zip(METHODS, zip(*timed, strict=True), strict=True)],
    )


def fast_dtype() -> str:
    """What the weights are stored in where the processor computes in bfloat16, which is slow when it is emulated."""
    return "auto" if library.isa() == "avx512bf16" else "float32"


def _question(
    model: Model,
    network: Any,
    about: str,
    samples: list[Sample],
    on_start: Callable[[str, int], None],
    on_read: Callable[[int], None],
) -> tuple[Document, list[Answer]]:
    """Ask all questions about one document. Returns, by method, some more tokens to tell the speed from."""
    chat = bool(model.tokenizer.chat_template)
    parts = [make_prompt(model, each, each.tokens_to_generate, chat=chat) for each in samples]
    context, last = parts[0][0], parts[-1][1]
    on_start(about, len(context))
    start = time.perf_counter()
    document = read_document(network, context, on_chunk=on_read)
    read_s = time.perf_counter() - start
    stop, questions = stop_tokens(model, network), []
    for sample, (_, question) in zip(samples, parts, strict=True):
        given = answers(network, document, question, RUNS, new_tokens=sample.tokens_to_generate, stop=stop)
        said = [model.tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip() for answer in given]
        text = sample.question.removesuffix(sample.answer_prefix).strip()
        scores = [score(sample.task, each, sample.answers) for each in said]
        questions.append(Question(text, sample.answers, said, scores))
    probes = list(answers(network, document, last, RUNS, new_tokens=SPEED_TOKENS, stop=()))
    return Document(about, len(context), read_s, questions), probes


def _needles(model: Model, tokens: int, seed: int, sources: Sources) -> Iterator[Sample]:
    """A document with four numbers, asked for one by one."""
    chat = bool(model.tokenizer.chat_template)
    reserve = template_tokens(model) if chat else 0
    sample = generate("niah_multikey_1", model.tokenizer, tokens, index=0, seed=seed, sources=sources, reserve=reserve)
    for key, value in _NEEDLE.findall(sample.context):
        _, question, prefix = templates.niah("numbers", [key], 1)
        asked = replace(sample, question=question + prefix, answer_prefix=prefix, answers=(value,))
        yield replace(asked, tokens_to_generate=CHAT_TOKENS) if chat else asked


def _performance(method: Method, probes: tuple[Answer, ...]) -> Performance:
    means = [probe.cache.sampled_share_mean for probe in probes]
    shares = [share for share in means if share is not None]
    return Performance(
        method=method.name,
        config=method.config,
        share_mean=sum(shares) / len(shares) if shares else None,
        share_max=max((probe.cache.sampled_share_max or 0.0 for probe in probes), default=None) if shares else None,
        index_s=max(probe.index_s for probe in probes),
        index_bytes=max(probe.cache.index_bytes for probe in probes),
        tokens_per_s=sum(len(probe.token_ids) - 1 for probe in probes) / sum(probe.decode_s for probe in probes),
    )
