"""What requests are answered, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Protocol

from magicpig.engine.request import Delta, Request


class TakesRequests(Protocol):
    """An engine."""

    def submit(self, request: Request, deliver: Callable[[Delta], None]) -> None:
        """See `Engine.submit`."""

    def cancel(self, request_id: str) -> None:
        """See `Engine.cancel`."""


class Stream:
    """The deltas of some requests, for asyncio. Raises what `Engine.submit` raises, when it is made; then none runs."""

    def __init__(self, engine: TakesRequests, requests: Sequence[Request]) -> None:
        self._engine, self.requests = engine, requests
        self._deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._open = sum(request.sampling.n for request in requests)
        loop = asyncio.get_running_loop()

        def deliver(index: int, delta: Delta) -> None:
            loop.call_soon_threadsafe(self._deltas.put_nowait, (index, delta))

        try:
            for index, request in enumerate(requests):
                engine.submit(request, partial(deliver, index))
        except BaseException:
            self.close()
            raise

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Which request, and what was added to its answers; until all have ended."""
        while self._open:
            index, delta = await self._deltas.get()
            self._open -= delta.finish is not None
            yield index, delta

    def close(self) -> None:
        """Cancels what has not ended."""
        if self._open:
            for request in self.requests:
                self._engine.cancel(request.id)
