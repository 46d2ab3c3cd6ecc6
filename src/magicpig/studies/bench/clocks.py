"""Where the time of a token goes: clocks around the functions that a generated token passes through.

weights     the model's own layers: a forward pass without what follows
attention   the native decode steps
index       hashing, sketching and storing what leaves the recent window
python      everything else of this package: the cache, checks, the way into the native step
generate    transformers' loop around the forward pass

A clock costs a third of a microsecond; there are five a layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from magicpig.integrations.transformers import NAME, MagicPigCache
from magicpig.integrations.transformers.attention import magicpig_attention
from magicpig.kernels import _native
from magicpig.machine import waited_ns
from magicpig.store import KVStore
from magicpig.studies.bench.quiet import has_waited

PARTS = ("weights", "attention", "index", "python", "generate")


class Clocks:
    """Seconds spent in each part, those of one not counted in another; and, as a streamer, token by token.

    tokens: one dictionary of seconds for every token after the first, which waits for the prompt. waited: whether a
    thread waited for a processor during that token (quiet.py).
    """

    def __init__(self) -> None:
        self.tokens: list[dict[str, float]] = []
        self.waited: list[bool] = []
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._inner = [0.0]  # of each clock that is running: the time of the clocks inside it
        self._puts = 0
        self._last = 0.0
        self._waits: int | None = None

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, on the clock of ``part``."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                self._spent[part] += elapsed - self._inner.pop()
                self._inner[-1] += elapsed

        return timed

    def put(self, value: Tensor) -> None:
        """Called by `generate` with the prompt, and then with each token."""
        del value
        now = time.perf_counter()
        if self._puts >= 2:
            rest = now - self._last - sum(self._spent.values())
            self.tokens.append(self._spent | {"generate": rest})
            self.waited.append(has_waited(self._waits, now - self._last))
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._puts += 1
        self._waits = waited_ns()
        self._last = time.perf_counter()

    def end(self) -> None:
        """Called by `generate` after the last token: the next is the first of another answer."""
        self._puts = 0

    @contextmanager
    def on(self, owner: Any, name: str, part: str) -> Iterator[None]:
        """Puts the clock of ``part`` on a function of a class or module, and takes it away again."""
        before = getattr(owner, name)
        setattr(owner, name, self.around(part, before))
        try:
            yield
        finally:
            setattr(owner, name, before)

    def spent(self, part: str) -> float:
        """Seconds in this part since the last token."""
        return self._spent[part]

    @contextmanager
    def running(self, model: PreTrainedModel) -> Iterator[None]:
        """Puts the clocks where they belong, and takes them away again."""
        with ExitStack() as undo:
            AttentionInterface.register(NAME, self.around("python", magicpig_attention))
            undo.callback(AttentionInterface.register, NAME, magicpig_attention)
            for owner, name, part in (
                (MagicPigCache, "update", "python"),
                (KVStore, "index_due", "index"),
                (KVStore, "make_room", "index"),
                (_native, "decode_step", "attention"),
            ):
                undo.enter_context(self.on(owner, name, part))
            model.__dict__["forward"] = self.around("weights", model.forward)
            undo.callback(model.__dict__.pop, "forward")
            yield
