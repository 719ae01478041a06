"""`create_app`: the routes. What starts and stops with the server is the command's job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import nybble
from nybble.server import chat, completions, tokenization
from nybble.server.admission import Admission
from nybble.server.auth import ApiKeys
from nybble.server.body import check_content_type
from nybble.server.chat_format import ChatFormat
from nybble.server.context import Client, Context
from nybble.server.control import add_control_routes
from nybble.server.errors import ApiError, as_api_error
from nybble.server.job import Caller
from nybble.server.limits import BodyLimits
from nybble.server.openapi import body_of, describe
from nybble.server.page import page_response
from nybble.server.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from nybble.server.record import Recorder, Sink, record_of
from nybble.server.settings import ServerSettings
from nybble.server.stream import EventStream, WholeReply
from nybble.server.turns import Workers
from nybble.text.request_builder import RequestBuilder
from nybble.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nybble.server.metrics import Metrics


def create_app(
    client: Client,
    tokenizer: Tokenizer,
    builder: RequestBuilder,
    settings: ServerSettings,
    metrics: Metrics | None = None,
    sinks: Sequence[Sink] = (),
) -> FastAPI:
    """The application.

    Args:
        client: an `EngineClient`, started by whoever calls.
        metrics: shown at /metrics, and told of requests; None leaves the route out.
        sinks: called with the record of each HTTP request when it has ended.
    """
    context = Context(
        client=client,
        tokenizer=tokenizer,
        builder=builder,
        settings=settings,
        admission=Admission(settings.limits, metrics.submitted if metrics else None),
        workers=Workers(),
        created=int(time.time()),
        chat_format=ChatFormat.of(tokenizer.chat_template, settings.tool_call_parser),
    )
    # The viewers that FastAPI brings load their scripts from a CDN.
    app = FastAPI(title="nybble", version=nybble.__version__, docs_url=None, redoc_url=None)
    app.state.context = context
    describe(app)
    _add_generating_routes(app, context)
    _add_small_routes(app, context, metrics)
    add_control_routes(app, context)
    app.router.redirect_slashes = False  # Location would be a guess wherever a proxy changes paths or hosts
    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, _handle_error)
    app.add_middleware(BodyLimits, limits=settings.limits)
    app.add_middleware(ApiKeys, keys=settings.api_keys, admin_keys=settings.admin_keys)
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
    app.add_middleware(Recorder, sinks=(*sinks, metrics.answered) if metrics else tuple(sinks))  # last: asked first
    return app


def _add_generating_routes(app: FastAPI, context: Context) -> None:
    async def answer(request: Request, kind: Any) -> Response:
        try:
            check_content_type(request)
            content = await request.body()
            job = await context.workers.call(kind.prepare, content, context, _caller(request))
        except Exception as error:
            return _answer_error(request, error)
        record_of(request.scope).job = job
        longest = context.limits.max_send_seconds
        if job.streams:
            return EventStream(kind.events(job, context), longest)
        return WholeReply(lambda: kind.whole(job, context), longest)

    @app.post("/v1/completions", openapi_extra=body_of(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        return await answer(request, completions)

    @app.post("/v1/chat/completions", openapi_extra=body_of(ChatCompletionRequest))
    async def create_chat_completion(request: Request) -> Response:
        return await answer(request, chat)


def _add_small_routes(app: FastAPI, context: Context, metrics: Metrics | None) -> None:
    async def compute(request: Request, function: Any) -> Response:
        try:
            check_content_type(request)
            return _json(await context.workers.call(function, await request.body(), context))
        except Exception as error:
            return _answer_error(request, error)

    @app.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        return await compute(request, tokenization.tokenize)

    @app.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        return await compute(request, tokenization.detokenize)

    @app.get("/v1/models")
    async def list_models() -> Response:
        return _json({"object": "list", "data": [_model(context)]})

    @app.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> Response:
        context.model_name(model)
        return _json(_model(context))

    @app.head("/health", include_in_schema=False)  # what load balancers like to ask
    @app.get("/health")
    async def health() -> Response:
        """200 while the engine makes progress."""
        context.ready()
        return _json({"status": "ok"})

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": nybble.__version__})

    if metrics is not None:
        from nybble.server.metrics import CONTENT_TYPE

        @app.get("/metrics")
        async def show_metrics() -> Response:
            return Response(metrics.render(), headers={"content-type": CONTENT_TYPE})

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return page_response()


def _model(context: Context) -> dict[str, Any]:
    ready = context.ready()
    return {
        "id": context.model_name(),
        "object": "model",
        "created": context.created,
        "owned_by": "nybble",
        "root": ready.model,
        "parent": None,
        "max_model_len": ready.max_model_len,
    }


def _caller(request: Request) -> Caller:
    return Caller(record_of(request.scope).request_id, request.state.key_salt)


def _answer_error(request: Request, error: Exception) -> Response:
    failure = as_api_error(error)
    record_of(request.scope).error = failure.word
    return failure.response()


async def _handle_error(request: Request, error: Exception) -> Response:
    return _answer_error(request, error)


def _json(body: Any) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
