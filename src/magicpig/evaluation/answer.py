"""One prompt, answered by several samplers under both protocols. Its context is read once; what differs is forked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from magicpig.config import Config
from magicpig.evaluation.matrix import Method
from magicpig.generation import greedy, read
from magicpig.integrations.transformers import CacheReport, MagicPigCache

EXACT = Config(sampler="full")


@dataclass(frozen=True)
class Answer:
    """token_ids: what was generated, the token that ended it included. cache: what was held and read for it."""

    token_ids: list[int]
    cache: CacheReport


def answers(
    network: Any,
    context: list[int],
    question: list[int],
    runs: Iterable[tuple[str, Method]],
    *,
    new_tokens: int,
    stop: Collection[int],
    chunk: int = 1024,
    on_context: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Answer]:
    """The greedy answer of an attached network in each run, a protocol and a method. Nothing depends on other runs.

    question-dense: context and question are read exactly, and every token after the first is sampled (as in MagicPIG,
    arXiv 2410.16179). question-sparse: the context is read exactly and indexed; question and answer are sampled.
    on_context is called with the tokens of each chunk of the context as it is read.
    """
    document = MagicPigCache(network.config, EXACT)
    read(network, context, document, chunk=chunk, on_chunk=on_context)
    asked: tuple[MagicPigCache, Tensor] | None = None
    exact: Answer | None = None
    for protocol, method in runs:
        sampled = method.config.sampler != "full"
        if not sampled and exact is not None:
            yield exact  # reading everything is the same under both protocols
            continue
        if sampled and protocol == "question-sparse":
            cache = document.fork(_decoding(method.config, len(question)))
            cache.settle()
            logits = read(network, question, cache, chunk=len(question))
        else:
            if asked is None:
                whole = document.fork()
                asked = whole, read(network, question, whole, chunk=chunk)
            cache, logits = asked[0].fork(method.config), asked[1]
        answer = Answer(greedy(network, logits, cache, max_new_tokens=new_tokens, stop=stop), cache.report())
        exact = exact if sampled else answer
        yield answer


def _decoding(config: Config, tokens: int) -> Config:
    """The same settings, but a forward of this many tokens is sampled."""
    return Config(**config.model_dump() | {"decode_tokens": max(tokens, config.decode_tokens)})
