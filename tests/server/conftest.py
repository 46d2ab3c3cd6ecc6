"""A live server with the pocket model on 127.0.0.1, shared by all tests of a module."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from magicpig import Config
from magicpig.engine.engine import Engine
from magicpig.engine.options import EngineOptions
from magicpig.server.app import ServerOptions, create_app
from magicpig.server.metrics import Metrics
from magicpig.server.run import Server
from magicpig.studies import pocket


@lru_cache(maxsize=1)
def _pocket() -> tuple[Any, Any]:
    folder = pocket.path()
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@dataclass
class Live:
    """A running server. engine: its own; server: uvicorn's."""

    url: str
    engine: Engine
    server: Server
    tokenizer: Any

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)


@pytest.fixture(scope="module", autouse=True)
def _quiet_and_alone() -> Iterator[None]:
    """Warnings of transformers off; one thread, since all is small."""
    verbosity, threads = logging.get_verbosity(), torch.get_num_threads()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    yield
    logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., Live]]:
    """`serve(options=..., engine=..., drain=...)`: a server with these, until the module's tests are done."""
    running: list[tuple[Live, threading.Thread]] = []

    def start(options: dict[str, Any] | None = None, engine: dict[str, Any] | None = None, drain: float = 5.0) -> Live:
        network, tokenizer = _pocket()
        for before, _ in running:
            before.engine.close()  # the network has one engine at a time
        metrics = Metrics()
        made = Engine(
            network, tokenizer, Config(exact_below=64, block=32, recent=16), EngineOptions(**engine or {}),
            observer=metrics,
        )  # fmt: skip
        made.start()
        app = create_app(made, ServerOptions(**{"names": ("pocket", "other-name"), **(options or {})}), metrics)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = Server(app, made, drain=drain, host="127.0.0.1", port=port, ws="none")
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        live = Live(f"http://127.0.0.1:{port}", made, server, tokenizer)
        running.append((live, thread))
        return live

    yield start
    for live, thread in running:
        live.server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def live(serve: Callable[..., Live]) -> Live:
    """With the default options."""
    return serve()
