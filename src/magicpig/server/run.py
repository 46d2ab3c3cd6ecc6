"""From options to a server that listens, and to one that has ended in order."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from magicpig.engine.engine import Engine

logger = logging.getLogger("magicpig.server")


class Server(uvicorn.Server):
    """At the first signal to end, new requests are refused (503) and those that run get `drain` seconds to finish.

    Those that do not are told so, in their answer, before their connections are closed. A second signal ends at once.
    ends_with_engine: an engine that has failed ends the server, so that whoever started it starts it again; without, it
    goes on and tells what has happened.
    """

    def __init__(
        self, app: FastAPI, engine: Engine, *, drain: float, ends_with_engine: bool = False, **options: object
    ) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, **options))  # type: ignore[arg-type]
        self._engine, self._drain, self._ends_with_engine = engine, drain, ends_with_engine
        self._closer: threading.Thread | None = None

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; whether to end now."""
        return await super().on_tick(counter) or (self._ends_with_engine and not self._engine.alive)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Instead of uvicorn's, which would raise the signal again in the end."""
        if self._closer is not None:
            self.should_exit = self.force_exit = True
        else:
            name = signal.Signals(sig).name
            logger.info("%s: %d requests may finish in %.0f s", name, self._engine.unfinished, self._drain)
            self._closer = threading.Thread(target=self._close, daemon=True)
            self._closer.start()

    def _close(self) -> None:
        left = self._engine.close(drain=self._drain)
        if left:
            logger.warning("%d requests were not finished", left)
        self.should_exit = True
