"""Forward passes of an attached network over a cache that the caller keeps: filling it, reading, greedy steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from magicpig.errors import NotFiniteError
from magicpig.integrations.transformers import MagicPigCache
from magicpig.integrations.transformers.compat import cache_argument
from magicpig.model_dir import ModelError


@torch.inference_mode()
def fill(
    network: Any,
    ids: list[int],
    cache: MagicPigCache,
    *,
    chunk: int = 1024,
    on_chunk: Callable[[int], None] = lambda tokens: None,
) -> None:
    """Feed ``ids``, at least one, to an attached network, ``chunk`` at a time, for what ``cache`` then holds of them.

    on_chunk is called with the number of tokens of each chunk.
    """
    with cache.filling():
        tokens = torch.tensor([ids], device=network.device, dtype=torch.int64)
        for piece in tokens.split(even_chunk(len(ids), chunk), 1):
            _forward(network, piece, cache)
            on_chunk(piece.shape[1])


@torch.inference_mode()
def read(
    network: Any,
    ids: list[int],
    cache: MagicPigCache,
    *,
    chunk: int = 1024,
    on_chunk: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """As `fill`, for the logits of the next token, (vocabulary,); ``cache`` says how it attends."""
    last = len(ids) - even_chunk(len(ids), chunk)
    if last > 0:
        fill(network, ids[:last], cache, chunk=chunk, on_chunk=on_chunk)
    logits = _forward(network, torch.tensor([ids[max(0, last) :]], device=network.device, dtype=torch.int64), cache)
    on_chunk(len(ids) - max(0, last))
    return logits


def greedy(
    network: Any, logits: Tensor, cache: MagicPigCache, *, max_new_tokens: int, stop: Collection[int]
) -> list[int]:
    """The likeliest token of ``logits`` and those that follow it, up to ``max_new_tokens`` or the first in ``stop``."""
    ids = [int(logits.argmax())]
    while len(ids) < max_new_tokens and ids[-1] not in stop:
        ids.append(int(read(network, ids[-1:], cache).argmax()))
    return ids


def _forward(network: Any, ids: Tensor, cache: MagicPigCache) -> Tensor:
    only_last = {"logits_to_keep": 1} if network._supports_logits_to_keep() else {}
    with finite(network):
        logits: Tensor = network(ids, **cache_argument(cache), **only_last).logits[0, -1]
    return logits


def even_chunk(tokens: int, chunk: int) -> int:
    """A chunk size near ``chunk`` that leaves no small rest: a few tokens alone would be taken for decoding."""
    return math.ceil(tokens / math.ceil(tokens / chunk))


@contextmanager
def finite(network: Any) -> Iterator[None]:
    """Blame the model where the store refuses what it computes."""
    try:
        yield
    except NotFiniteError as error:
        raise ModelError(
            f"the model computes {error}; its weights or its dtype {network.dtype} may be at fault"
        ) from error
