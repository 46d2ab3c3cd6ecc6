"""Questions about one document, answered by several samplers. What they share is read once; what differs is forked."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from magicpig.config import EXACT
from magicpig.generation import fill, greedy, read
from magicpig.integrations.transformers import CacheReport, MagicPigCache
from magicpig.studies.evaluation.matrix import Method


@dataclass(frozen=True)
class Answer:
    """What was generated, and what it took.

    token_ids: the token that ended it included. cache: what was held and read. index_s: seconds of indexing.
    decode_s: seconds of all decode steps, one for each token but the first.
    """

    token_ids: list[int]
    cache: CacheReport
    index_s: float
    decode_s: float


def read_document(
    network: Any, tokens: list[int], *, chunk: int = 1024, on_chunk: Callable[[int], None] = lambda tokens: None
) -> MagicPigCache:
    """A cache in which an attached network has read ``tokens`` exactly. chunk, on_chunk: as in `generation.fill`."""
    document = MagicPigCache(network.config, EXACT)
    fill(network, tokens, document, chunk=chunk, on_chunk=on_chunk)
    return document


def answers(
    network: Any,
    document: MagicPigCache,
    question: list[int],
    runs: Iterable[tuple[str, Method]],
    *,
    new_tokens: int,
    stop: Collection[int],
) -> Iterator[Answer]:
    """The greedy answer of each run, a protocol and a method. It does not depend on other runs or questions.

    question-dense: the question is read exactly as the document was, and every token after the first is sampled (as in
    MagicPIG, arXiv 2410.16179). question-sparse: the document is indexed, then question and answer are sampled.
    """
    asked: tuple[MagicPigCache, Tensor] | None = None
    exact: Answer | None = None
    for protocol, method in runs:
        sampled = method.config.samples
        if not sampled and exact is not None:
            yield exact  # reading everything is the same under both protocols
            continue
        if sampled and protocol == "question-sparse":
            cache = document.fork(method.config)
            index_s = _settle(cache)
            with cache.decoding():
                logits = read(network, question, cache, chunk=len(question))
        else:
            if asked is None:
                dense = document.fork()
                with dense.prefilling():
                    asked = dense, read(network, question, dense)
            cache, logits = asked[0].fork(method.config), asked[1]
            index_s = _settle(cache)
        start = time.perf_counter()
        token_ids = greedy(network, logits, cache, max_new_tokens=new_tokens, stop=stop)
        answer = Answer(token_ids, cache.report(), index_s, time.perf_counter() - start)
        exact = exact if sampled else answer
        yield answer


def _settle(cache: MagicPigCache) -> float:
    start = time.perf_counter()
    cache.settle()
    return time.perf_counter() - start
