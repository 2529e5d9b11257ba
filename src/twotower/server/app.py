"""The server's routes."""

import codecs
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.routing import APIRoute
from fastapi.staticfiles import StaticFiles
from prometheus_client import Counter
from pydantic_core import from_json
from starlette.applications import Starlette

import twotower
from twotower.checkpoints.chat_template import ChatTemplate
from twotower.engine.aio import AsyncEngine
from twotower.server.anthropic.protocol import MessagesRequest
from twotower.server.anthropic.reply import count_tokens, messages
from twotower.server.chat import chat
from twotower.server.completions import complete
from twotower.server.config import ServerConfig
from twotower.server.errors import ApiError, install
from twotower.server.middleware import OPEN_PATHS, ApiKeys, BodyLimit, HeadAndOptions, RequestLog, RootPath
from twotower.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    WatchRequest,
)
from twotower.server.responses.protocol import ResponsesRequest
from twotower.server.responses.reply import respond
from twotower.server.service import Service
from twotower.server.tokens import detokenize, tokenize
from twotower.server.tracing import note_parent, open_tracer
from twotower.server.watch import about, watch

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

# What pydantic's parser says of an escape such as \ud83c that its other half doesn't follow.
_HALF = re.compile("surrogate|unexpected end of hex escape")


class _JsonRequest(Request):
    """Reads a body with pydantic's JSON parser; unlike Python's it refuses lone surrogates, NaN and deep nesting."""

    async def json(self) -> Any:
        encoding = self.headers.get("content-encoding", "identity")
        if encoding.lower() not in ("", "identity"):
            message = f"the body has the Content-Encoding {encoding[:40]}, and this server reads none; send it as it is"
            raise ApiError(415, message, code="unsupported_encoding")
        sent = (await self.body()).removeprefix(codecs.BOM_UTF8)
        try:
            return from_json(sent, allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, _why_no_json(sent, error), code="invalid_json") from error


def _why_no_json(sent: bytes, error: ValueError) -> str:
    """What is wrong with a body, of which pydantic's parser says `error`."""
    try:
        sent.decode()
    except UnicodeDecodeError as wrong:
        return f"the body is not in UTF-8, as JSON must be, at its byte {wrong.start}; send it in UTF-8"
    if _HALF.search(str(error)):
        place = str(error).partition(" at ")[2]
        return f"the body has half of a character, a lone surrogate, at {place}; cut texts between characters"
    return f"the body is not JSON: {error}"


class Api(FastAPI):
    """An application whose OpenAPI schema is narrowed to this server's model and limits.

    Clients and fuzz tests that are generated from the schema then send requests that this server accepts.
    """

    service: Service

    def openapi(self) -> dict[str, Any]:
        schema = super().openapi()
        room = self.service.max_context - 1
        last = self.service.engine.model.config.vocab_size - 1
        most = {"prompt": last, "allowed_token_ids": last, "stop_token_ids": last, "n": self.service.max_choices}
        most |= {"max_tokens": room, "max_completion_tokens": room, "max_output_tokens": room, "min_tokens": room}
        most |= {"best_of": self.service.max_choices}
        most |= {"tokens": last}
        writing = (CompletionRequest, ChatRequest, ResponsesRequest, MessagesRequest, WatchRequest)
        for request in (*writing, TokenizeRequest, DetokenizeRequest):
            fields = schema["components"]["schemas"][request.__name__]["properties"]
            if "model" in fields:
                fields["model"]["enum"] = [*self.service.model_names]
            for name in most.keys() & fields.keys():
                _limit_integers(fields[name], most[name])
        if self.service.config.api_keys:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
            for path in OPEN_PATHS & schema["paths"].keys():
                for operation in schema["paths"][path].values():
                    operation["security"] = []
        return schema


def _limit_integers(schema: dict[str, Any], most: int) -> None:
    """Sets the maximum in every branch of a field's schema that is an integer or a list of integers."""
    for branch in schema.get("anyOf", [schema]):
        if branch["type"] == "array":
            _limit_integers(branch["items"], most)
        elif branch["type"] == "integer":
            branch["maximum"] = most


class _JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            note_parent(request.scope)
            return await handler(_JsonRequest(request.scope, request.receive))

        return handle


_PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {"Content-Security-Policy": "default-src 'self'"}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def add_layers(app: Starlette, config: ServerConfig, responses: Counter, tracer: "Tracer | None") -> None:
    """Puts around an application what every request passes: the log, which counts `responses` by path and status, the
    root path, origins, keys and the limit of bodies."""
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limit=config.max_body_bytes)
    if config.api_keys:
        app.add_middleware(ApiKeys, keys=config.api_keys)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    if config.root_path:
        app.add_middleware(RootPath, root=config.root_path)
    app.add_middleware(RequestLog, responses=responses, tracer=tracer)


def make_app(engine: AsyncEngine, config: ServerConfig, template: ChatTemplate | None = None) -> Api:
    """The server's application. The caller starts and closes the engine.

    Without a `template`, chats are refused. Raises ValueError for a model without a tokenizer.
    """
    service = Service(engine, config, template)
    app = Api(title="twotower", docs_url=None, redoc_url=None)
    app.service = service
    app.router.route_class = _JsonRoute
    install(app)
    # The last one added is the outermost.
    app.add_middleware(HeadAndOptions)
    add_layers(app, config, service.metrics.responses, open_tracer())

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await complete(service, body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await chat(service, body, request)

    @app.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        return await respond(service, body, request)

    @app.post("/v1/messages")
    async def anthropic_messages(body: MessagesRequest, request: Request) -> Response:
        return await messages(service, body, request)

    @app.post("/v1/messages/count_tokens")
    async def anthropic_count_tokens(body: MessagesRequest) -> dict[str, int]:
        return await count_tokens(service, body)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card(name) for name in service.model_names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model_card(name)

    @app.post("/tokenize")
    async def tokenize_text(body: TokenizeRequest) -> dict[str, Any]:
        return await tokenize(service, body)

    @app.post("/detokenize")
    async def detokenize_ids(body: DetokenizeRequest) -> dict[str, str]:
        return detokenize(service, body)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": twotower.__version__}

    @app.get("/health")
    @app.get("/ping")
    async def health() -> JSONResponse:
        status = "stopped" if not engine.is_running else "stopping" if engine.is_draining else "ready"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type=METRICS_TYPE)

    @app.get("/twotower/about")
    async def about_server() -> dict[str, Any]:
        return about(service)

    @app.post("/twotower/watch")
    async def watch_text(body: WatchRequest, request: Request) -> Response:
        return await watch(service, body, request)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_PAGE / "index.html", headers=_PAGE_HEADERS)

    @app.get("/watch", include_in_schema=False)
    async def watch_page() -> Response:
        return FileResponse(_PAGE / "watch.html", headers=_PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=_PAGE))
    return app
