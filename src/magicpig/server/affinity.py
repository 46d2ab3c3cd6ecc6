"""Which of several replicas has a document warm, guessed from what each was asked before. Knows nothing of Ray.

A prompt is cut into pieces of some hundred characters. The key of a piece stands for all the text up to its end, so
that two prompts that begin alike have their first keys in common.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import count
from typing import Any, Generic, TypeVar

PIECE = 512  # characters
MOST_PIECES = 1024  # the rest of a prompt does not matter
MOST_KEYS = 1 << 18
ENOUGH = 0.5  # of a prompt: less in common may be what all prompts begin with

R = TypeVar("R")


def prompt_keys(body: bytes) -> tuple[bytes, ...]:
    """The keys of the prompt in a request's body; none for one that is short, or that cannot be read."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        return ()
    if not isinstance(asked, dict):
        return ()
    text = "".join(_texts(asked.get("messages", asked.get("prompt"))))[: PIECE * MOST_PIECES]
    keys, key = [], b""
    for end in range(PIECE, len(text) + 1, PIECE):
        piece = text[end - PIECE : end].encode("utf-8", "surrogatepass")
        key = blake2b(piece, digest_size=8, key=key).digest()
        keys.append(key)
    return tuple(keys)


def _texts(prompt: Any) -> Iterator[str]:
    """Of a text, a list of token ids, or messages, in order; of several prompts the first."""
    if isinstance(prompt, str):
        yield prompt
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping):
        for message in prompt:
            if isinstance(message, Mapping):
                yield f"\n{message.get('role')}\n"
                yield from _texts(message.get("content", message.get("text")))
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        yield from _texts(prompt[0])
    elif isinstance(prompt, list):
        yield " ".join(str(token) for token in prompt)


class Affinity(Generic[R]):
    """Who was asked what, the least recently used being forgotten."""

    def __init__(self, most: int = MOST_KEYS) -> None:
        self._most = most
        self._replicas: OrderedDict[bytes, R] = OrderedDict()

    def find(self, keys: Sequence[bytes]) -> R | None:
        """The replica that was asked for the longest beginning of a prompt, if that is `ENOUGH` of it."""
        for i in range(len(keys) - 1, -1, -1):
            if (i + 1) / len(keys) < ENOUGH:
                return None
            if keys[i] in self._replicas:
                return self._replicas[keys[i]]
        return None

    def remember(self, keys: Sequence[bytes], replica: R) -> None:
        """A replica is asked for this prompt."""
        for key in keys:
            self._replicas[key] = replica
            self._replicas.move_to_end(key)
        while len(self._replicas) > self._most:
            self._replicas.popitem(last=False)


def wanted_replicas(loads: Sequence[float], current: int) -> int:
    """How many replicas the load asks for: so many that each has about `BUSY` of what it can take.

    loads: of each replica that has said so, 1 where all of its places or all of its memory is taken, and more where
    requests wait. current: how many there are; those that have said nothing count as the others on average.
    """
    if not loads:
        return current
    total = sum(loads) / len(loads) * current
    return next(n for n in count(1) if total <= BUSY * n)


BUSY = 0.7
