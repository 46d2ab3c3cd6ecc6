"""What happens to every HTTP request before a route sees it: an id and a line in the log, a key, a limit of its size.

Plain ASGI: Starlette's `BaseHTTPMiddleware` would hide from routes that a client has hung up.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from magicpig.server.errors import ApiError

OPEN = frozenset(["/", "/health", "/version", "/docs", "/redoc", "/openapi.json"])  # without a key
_GOOD_ID = re.compile(r"[\w.:-]{1,100}")

logger = logging.getLogger("magicpig.server")


def respond(error: ApiError) -> JSONResponse:
    """An error as a client sees it."""
    return JSONResponse(error.body(), error.status, error.headers)


class RequestLog:
    """Gives each request an id, that of its X-Request-Id header if it has a good one, and logs how it ended."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        start, status = time.perf_counter(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            client = scope.get("client")
            logger.info(
                "%s %s %d",
                scope["method"],
                scope["path"],
                status,
                extra={
                    "request_id": request_id,
                    "client": client[0] if client else None,
                    "status": status,
                    "seconds": round(time.perf_counter() - start, 4),
                },
            )


class ApiKeys:
    """Refuses requests without one of the keys, but for `OPEN` and for what browsers ask before (OPTIONS)."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        # Of one length, so that comparing takes the same time whatever is sent.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or scope["path"] in OPEN or self._knows(Headers(scope=scope)):
            await self.app(scope, receive, send)
            return
        error = ApiError(
            401, "no API key, or one that is not known: 'Authorization: Bearer KEY'", told="invalid_api_key"
        )
        await respond(error)(scope, receive, send)

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        known = [hmac.compare_digest(digest, other) for other in self._digests]
        return scheme.lower() == "bearer" and any(known)


class BodyLimit:
    """Refuses bodies of more than `limit` bytes, whether they say so beforehand or not."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isascii() or not declared.isdigit() or int(declared) > self.limit:
            await respond(self._error())(scope, receive, send)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.limit:
                raise HTTPException(413, self._error().message)  # the only kind that FastAPI hands on from here
            return message

        await self.app(scope, limited, send)

    def _error(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.limit} bytes", told="body_too_large")


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the fields that a record has beside these."""

    FIELDS = ("request_id", "client", "status", "seconds")

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in self.FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
