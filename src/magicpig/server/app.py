"""The routes of the server. Each turns JSON into requests for the engine, and hands what comes back to `answers.py`."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from magicpig import __version__
from magicpig.engine.engine import Engine
from magicpig.engine.request import Request as EngineRequest
from magicpig.engine.request import SamplingParams
from magicpig.engine.template import chat_prompt
from magicpig.errors import MagicPigError
from magicpig.server.answers import Answers
from magicpig.server.documents import pdf_text
from magicpig.server.errors import ApiError, as_api_error
from magicpig.server.metrics import Metrics
from magicpig.server.middleware import ApiKeys, BodyLimit, RequestLog, respond
from magicpig.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

PAGE = Path(__file__).with_name("page.html")
# The page is one file, and asks nobody but this server.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
T = TypeVar("T")
logger = logging.getLogger("magicpig.server")


@dataclass(frozen=True)
class ServerOptions:
    """names: of the model, the first is told to clients. api_keys: of which one must be sent, if there are any.

    cors_origins: pages that may ask from a browser, "*" for all. max_body: bytes. root_path: where a proxy puts it.
    """

    names: tuple[str, ...]
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    cors_origins: tuple[str, ...] = ()
    max_body: int = 32 << 20
    root_path: str = ""


class Service:
    """What the routes share: the engine, the metrics that observe it, and a tokenizer of their own."""

    def __init__(self, engine: Engine, options: ServerOptions, metrics: Metrics) -> None:
        self.engine, self.options, self.metrics = engine, options, metrics
        self._tokenizer = copy.deepcopy(engine.tokenizer)  # the engine decodes with its own meanwhile
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self.options.names[0]

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for a model that is not here."""
        if name is not None and name not in self.options.names:
            raise ApiError(404, f"The model '{name}' does not exist", told="model_not_found", param="model")

    async def with_tokenizer(self, work: Callable[[Any], T]) -> T:
        """Long texts take seconds; other requests are served meanwhile."""

        def locked() -> T:
            with self._lock:
                return work(self._tokenizer)

        return await asyncio.to_thread(locked)

    async def encode(self, prompts: Sequence[str | list[int]]) -> list[tuple[int, ...]]:
        """Token ids of texts; lists of ids are kept as they are."""

        def work(tokenizer: Any) -> list[tuple[int, ...]]:
            return [
                tuple(tokenizer(prompt, verbose=False)["input_ids"] if isinstance(prompt, str) else prompt)
                for prompt in prompts
            ]

        return await self.with_tokenizer(work)

    async def encode_chat(self, body: ChatRequest | TokenizeRequest) -> tuple[int, ...]:
        messages = [message.as_dict() for message in body.messages or ()]
        variables = dict(body.chat_template_kwargs or {}) if isinstance(body, ChatRequest) else {}
        if isinstance(body, ChatRequest) and body.calls:
            variables["tools"] = body.told_tools()
        return await self.with_tokenizer(lambda tokenizer: chat_prompt(tokenizer, messages, **variables))

    async def decode(self, tokens: Sequence[int]) -> str:
        """Raises ApiError for tokens that the tokenizer does not know."""
        vocabulary = max(len(self.engine.tokenizer), self.engine.runner.vocabulary)
        if tokens and max(tokens) >= vocabulary:
            raise ApiError(400, f"tokens has {max(tokens)}; allowed are 0 to {vocabulary - 1}", param="tokens")
        text: str = await self.with_tokenizer(
            lambda tokenizer: tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        )
        return text

    def submit(
        self, http: Request, body: ChatRequest | CompletionRequest, prompts: Sequence[tuple[int, ...]]
    ) -> tuple[Answers, SamplingParams]:
        """Hands the prompts to the engine. Raises ApiError and what `Engine.submit` raises."""
        params, config = body.params(), body.config(self.engine.config)
        watch = body.include_attention
        requests = [EngineRequest(prompt, params, config, body.priority, watch=watch) for prompt in prompts]
        stream = self.engine.stream(requests)
        chat = isinstance(body, ChatRequest)
        answers = Answers(
            stream,
            chat=chat,
            id=f"{'chatcmpl' if chat else 'cmpl'}-{http.state.request_id}",
            model=body.model or self.name,
            tokenizer=self.engine.tokenizer,
            logprobs=params.logprobs is not None,
            include_usage=body.include_usage,
            calls=isinstance(body, ChatRequest) and body.calls,
        )
        return answers, params

    async def answer(self, http: Request, body: ChatRequest | CompletionRequest, answers: Answers) -> Response:
        """The whole answer, or a stream of it. A client that hangs up cancels its requests."""
        if body.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(answers.events(), media_type="text/event-stream", headers=headers)
        try:
            whole = await _unless_gone(http, answers.whole())
        finally:
            answers.stream.close()
        return Response(status_code=499) if whole is None else JSONResponse(whole)


def create_app(engine: Engine, options: ServerOptions, metrics: Metrics) -> FastAPI:
    """The ASGI app around an engine that runs, or will by the time requests come. Closes it at shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="MagicPIG",
        description="OpenAI's interface to a model with sampled attention.",
        version=__version__,
        root_path=options.root_path,
        lifespan=lifespan,
    )
    service = Service(engine, options, metrics)
    app.state.service = service
    _add_routes(app, service)
    _add_error_handlers(app)
    # The last one added sees a request first.
    app.add_middleware(BodyLimit, limit=options.max_body)
    app.add_middleware(ApiKeys, keys=options.api_keys)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RequestLog)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.post("/v1/completions", tags=["OpenAI"])
    async def completions(http: Request, body: CompletionRequest) -> Response:
        """Continues one or several prompts, each a text or a list of token ids."""
        service.check_model(body.model)
        given = body.prompts()
        body.params()  # refused before a long text is cut into tokens
        prompts = await service.encode(given)
        echoes = None
        if body.echo:
            echoes = [prompt if isinstance(prompt, str) else await service.decode(prompt) for prompt in given]
        answers, _ = service.submit(http, body, prompts)
        answers.echoes = echoes
        return await service.answer(http, body, answers)

    @app.post("/v1/chat/completions", tags=["OpenAI"])
    async def chat_completions(http: Request, body: ChatRequest) -> Response:
        """Answers a conversation, in the model's own chat template."""
        service.check_model(body.model)
        params = body.params()
        if params.json_schema is not None:
            await asyncio.to_thread(engine.grammar, params)
        prompt = await service.encode_chat(body)
        answers, _ = service.submit(http, body, [prompt])
        return await service.answer(http, body, answers)

    @app.get("/v1/models", tags=["OpenAI"])
    async def models() -> dict[str, Any]:
        """The model, under each of its names."""
        return {"object": "list", "data": [_model(name, engine) for name in service.options.names]}

    @app.get("/v1/models/{name:path}", tags=["OpenAI"])
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(name, engine)

    @app.post("/tokenize", tags=["tokens"])
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """The token ids of a text or a conversation."""
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        if body.messages is not None:
            tokens = list(await service.encode_chat(body))
        else:
            special = body.add_special_tokens
            tokens = await service.with_tokenizer(
                lambda tokenizer: list(tokenizer(body.prompt, add_special_tokens=special, verbose=False)["input_ids"])
            )
        names = engine.tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
        return {"count": len(tokens), "max_model_len": engine.max_length, "tokens": tokens, "token_strs": names}

    @app.post("/detokenize", tags=["tokens"])
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of token ids."""
        service.check_model(body.model)
        return {"prompt": await service.decode(body.tokens)}

    @app.post("/extract", tags=["tokens"])
    async def extract(http: Request) -> dict[str, Any]:
        """The text of a PDF file, which is the body. Needs pypdf."""
        return {"text": await asyncio.to_thread(pdf_text, await http.body())}

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": POLICY})

    @app.get("/health", tags=["operation"])
    async def health() -> JSONResponse:
        """200 while requests are served; 503 when the engine is dead, or ends."""
        if not engine.alive:
            return JSONResponse({"status": "dead"}, 503)
        if not engine.accepting:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/version", tags=["operation"])
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics", tags=["operation"])
    async def metrics() -> Response:
        """For Prometheus."""
        return PlainTextResponse(service.metrics.render(), media_type="text/plain; version=0.0.4")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return respond(error)

    @app.exception_handler(MagicPigError)
    async def engine_error(_: Request, error: MagicPigError) -> JSONResponse:
        return respond(as_api_error(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        message = first["msg"].removeprefix("Value error, ")
        if not where and "json" not in http.headers.get("content-type", ""):
            # FastAPI takes such a body for a text: pages of other servers may send that unasked.
            message = "the body must be JSON, and the request say so: 'Content-Type: application/json'"
        return respond(
            ApiError(
                400,
                f"{'.'.join(where)}: {message}" if where else message,
                told="invalid_argument",
                param=where[0] if where else None,
            )
        )

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        answer = respond(ApiError(error.status_code, str(error.detail), told=CODES.get(error.status_code)))
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def bug(http: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s failed", http.method, http.url.path, exc_info=error)
        return respond(as_api_error(RuntimeError(type(error).__name__)))


def _model(name: str, engine: Engine) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "magicpig",
        "max_model_len": engine.max_length,
        "magicpig": engine.config.nondefault(),
    }


async def _unless_gone(http: Request, work: Awaitable[T]) -> T | None:
    """What the work comes to, or None when the client hangs up before; then it is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
