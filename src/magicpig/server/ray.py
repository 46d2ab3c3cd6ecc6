"""Replicas of the server on Ray Serve: each has the whole model, and the same ASGI app as one server alone.

Before them stands a front, which reads a request, has Ray choose a replica by how the prompt begins, and hands on what
that one answers. A replica that ends is started again by Ray; whom it was answering is told.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, HTTPOptions, RequestRouterConfig
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from magicpig.engine.engine import Engine
from magicpig.engine.options import EngineOptions
from magicpig.server.affinity import Affinity, prompt_keys, wanted_replicas
from magicpig.server.answers import event
from magicpig.server.app import ServerOptions, create_app
from magicpig.server.errors import ApiError
from magicpig.server.metrics import Metrics
from magicpig.server.middleware import respond

OBJECT_STORE = 128 << 20  # bytes; answers are small
EVENTS = b"text/event-stream"
logger = logging.getLogger("magicpig.server")

MakeEngine = Callable[[EngineOptions, Metrics], Engine]


@dataclass(frozen=True)
class ReplicaOptions:
    """low, high: between so many replicas there are at any time. drain: seconds that each has to end.

    host, port, ssl_certfile, ssl_keyfile: where the front listens, and how.
    """

    low: int
    high: int
    drain: float
    host: str
    port: int
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None


class PrefixRouter(FIFOMixin, RequestRouter):
    """Sends a prompt to the replica that has read most of it, and any other to the less busy of two."""

    def initialize_state(self, **_: Any) -> None:
        self._affinity: Affinity[Any] = Affinity()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas: a later one is asked when those before are full."""
        found = None if pending_request is None else self._affinity.find(pending_request.args[0])
        warm = [one for one in candidate_replicas if one.replica_id == found]
        others = [one for one in candidate_replicas if one.replica_id != found]
        return [rank for rank in (warm, others) if rank]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        self._affinity.remember(pending_request.args[0], replica_id)


class Replica:
    """One engine and its app. make: loads the model and makes the engine; is called in the replica's own process."""

    def __init__(self, make: MakeEngine, engine_options: EngineOptions, options: ServerOptions) -> None:
        metrics = Metrics()
        self._engine = make(engine_options, metrics)
        self._engine.start()
        self._app = create_app(self._engine, options, metrics)

    async def answer(self, keys: tuple[bytes, ...], scope: MutableMapping[str, Any], body: bytes) -> AsyncIterator[Any]:
        """What the app answers: (status, headers), then pieces of the body. keys: for the router."""
        messages: asyncio.Queue[MutableMapping[str, Any] | None] = asyncio.Queue()
        gone, asked = asyncio.Event(), [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> MutableMapping[str, Any]:
            if asked:
                return asked.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self._app(scope, receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    yield message["status"], message["headers"]
                elif message.get("body"):
                    yield message["body"]
        finally:
            gone.set()
            task.cancel()

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if not self._engine.alive:
            raise RuntimeError("the engine has ended")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """How busy the replica is, for `scale`."""
        scheduler = self._engine.scheduler
        limits = scheduler.limits
        places = (len(scheduler.running) + len(scheduler.waiting)) / limits.running
        return {"load": max(places, scheduler.reserved / limits.memory)}

    def __del__(self) -> None:
        if (engine := getattr(self, "_engine", None)) is not None:
            engine.close()


class Front:
    """What clients talk to. replicas: a handle of `Replica`. most: bytes of a request."""

    def __init__(self, replicas: Any, most: int) -> None:
        self._replicas, self._most = replicas.options(method_name="answer", stream=True), most

    async def __call__(self, http: Request) -> Response:
        body = b""
        async for piece in http.stream():
            body += piece
            if len(body) > self._most:
                return respond(ApiError(413, f"the body is larger than {self._most} bytes", told="body_too_large"))
        kept = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
        scope = {name: http.scope[name] for name in kept if name in http.scope}
        scope |= {"client": http.scope.get("client"), "server": http.scope.get("server")}
        messages = self._replicas.remote(prompt_keys(body), scope, body)
        try:
            status, headers = await anext(messages)
            headers = [(name, value) for name, value in headers if name != b"x-request-id"]  # Ray sends it, too
            streams = any(name == b"content-type" and value.startswith(EVENTS) for name, value in headers)
            whole = None if streams else b"".join([piece async for piece in messages])
        except RayActorError:
            return respond(_ended())
        if whole is None:
            response: Response = StreamingResponse(_events(messages), status)
        else:
            response = Response(whole, status)
        response.raw_headers = headers
        return response


async def _events(messages: Any) -> AsyncIterator[bytes]:
    try:
        async for piece in messages:
            yield piece
    except RayActorError:
        yield event(_ended().body())
        yield b"data: [DONE]\n\n"
    finally:
        messages.cancel()  # of a client that has hung up


def _ended() -> ApiError:
    return ApiError(503, "the replica that computed this answer has ended; ask again", told="replica_ended")


def scale(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """The number of replicas that Ray shall have."""
    loads = list((context.aggregated_metrics or {}).get("load", {}).values())
    return wanted_replicas(loads, context.current_num_replicas), {}


def run(make: MakeEngine, engine: EngineOptions, server: ServerOptions, options: ReplicaOptions) -> None:
    """Serves until a signal comes: on the cluster of RAY_ADDRESS, or on one of its own on this machine."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    # On a busy machine what listens may need more than the five seconds after which Ray ends it.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True)
    else:
        ray.init(
            num_cpus=max(options.high, os.cpu_count() or 1),
            object_store_memory=OBJECT_STORE,
            include_dashboard=False,
            log_to_driver=True,
        )
    ended = threading.Event()
    for ends in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ends, lambda *_: ended.set())
    limits = engine.limits(options.high)
    scaling: dict[str, Any] = {"num_replicas": options.low}
    if options.high > options.low:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=options.low,
                max_replicas=options.high,
                initial_replicas=options.low,
                policy=AutoscalingPolicy(policy_function=scale),
            )
        }
    cores = max(1, (os.cpu_count() or 1) // options.high)
    replicas = (
        serve.deployment(Replica)
        .options(
            **scaling,
            ray_actor_options={"num_cpus": cores},
            max_ongoing_requests=limits.running + limits.waiting,
            graceful_shutdown_timeout_s=options.drain,
            health_check_period_s=2,
            request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        )
        .bind(make, replace(engine, memory=limits.memory), server)
    )
    front = (
        serve.deployment(Front)
        .options(num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=options.high * 1024)
        .bind(replicas, server.max_body)
    )
    serve.start(
        http_options=HTTPOptions(
            host=options.host,
            port=options.port,
            root_path=server.root_path,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
        )
    )
    try:
        serve.run(front, name="magicpig", route_prefix="/")
        logger.info("%d replicas answer on port %d", options.low, options.port)
        ended.wait()
    finally:
        serve.shutdown()
        ray.shutdown()
