"""The HTTP application: endpoints, error handlers and the chat page."""

import asyncio
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from minorca import __version__
from minorca.page_policy import inline_source
from minorca.serve.adapters import RuntimeAdapters, add_endpoints
from minorca.serve.completions import CompletionRequest
from minorca.serve.errors import APIError, ErrorResponse, error_body
from minorca.serve.http import Guard, JSONRoute
from minorca.serve.protocol import ChatRequest
from minorca.serve.service import Service
from minorca.serve.tokenization import DetokenizeRequest, TokenizeRequest

PAGE = Path(__file__).parent / "page.html"
# Problems of one request body that are reported.
MAX_PROBLEMS = 10


def make_app(
    service: Service,
    key: str | None = None,
    hosts: set[str] | None = None,
    origins: Collection[str] = (),
    adapters: RuntimeAdapters | None = None,
) -> FastAPI:
    """The whole interface.

    Args:
        key: the API key that clients must send; None: none.
        hosts: the host names by which the server may be addressed; None: any.
        origins: whose pages may read responses, beside this server's own; "*": all.
        adapters: loads and unloads adapters for clients; None: there are no such endpoints.
    """
    page = PAGE.read_text(encoding="utf-8")
    error_responses: dict[int | str, dict[str, Any]] = {code: {"model": ErrorResponse} for code in ("4XX", "5XX")}
    app = FastAPI(title="minorca", docs_url=None, redoc_url=None, responses=error_responses)
    app.router.route_class = JSONRoute
    app.state.long_bodies = asyncio.Lock()

    def respond(error: HTTPException) -> Response:
        service.thread.metrics.refused.labels(error.status_code).inc()
        param = getattr(error, "param", None)
        code = getattr(error, "code", None)
        content = error_body(error.status_code, str(error.detail), param, code)
        return JSONResponse(content, error.status_code, error.headers)

    app.add_middleware(Guard, key=key, hosts=hosts, policy=_content_security_policy(page), respond=respond)
    if origins:
        # Around the guard: browsers ask without the key, and show a page only those errors that it may read.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("Retry-After",),
        )
    _add_error_handlers(app, respond)
    _add_generation(app, service)
    _add_information(app, service, page)
    if adapters:
        add_endpoints(app, adapters)
    return app


def _add_error_handlers(app: FastAPI, respond: Callable[[HTTPException], Response]) -> None:
    @app.exception_handler(HTTPException)
    async def on_http_error(request: HTTPRequest, error: HTTPException) -> Response:
        if error.status_code in (404, 405) and not isinstance(error, APIError):
            return respond(
                HTTPException(error.status_code, f"{error.detail}: {request.method} {request.url.path}", error.headers)
            )
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_body(request: HTTPRequest, error: RequestValidationError) -> Response:
        return respond(_validation_error(error))

    @app.exception_handler(Exception)
    async def on_failure(request: HTTPRequest, error: Exception) -> Response:
        return respond(APIError(500, "internal error; see the server log"))


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: HTTPRequest) -> Response:
        return await service.respond(request, body)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: HTTPRequest) -> Response:
        return await service.respond(request, body)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        return JSONResponse(await service.tokenize(body))

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        return JSONResponse(await service.detokenize(body))


def _add_information(app: FastAPI, service: Service, page: str) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.describe_model(name) for name in service.models]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(service.describe_model(name))

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @app.get("/health")
    async def health() -> Response:
        if not service.thread.is_alive():
            raise APIError(503, "the engine has failed")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.thread.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(page)


def _validation_error(error: RequestValidationError) -> APIError:
    """The problems that pydantic found, each with its field."""
    fields = []
    messages = []
    for problem in error.errors()[:MAX_PROBLEMS]:
        field = ".".join(map(str, problem["loc"][1:]))
        message = _problem_message(problem)
        fields.append(field)
        messages.append(f"{field}: {message}" if field else message)
    return APIError(400, "; ".join(messages), fields[0] or None)


def _problem_message(problem: dict[str, Any]) -> str:
    if problem["type"] == "value_error":
        # Raised by a validator of ours.
        return str(problem["ctx"]["error"])
    return problem["msg"]


def _content_security_policy(page: str) -> str:
    """Allows the page's own script and style and calls to this server, nothing else."""
    policy = {
        "default-src": "'none'",
        "script-src": inline_source(page, "script"),
        "style-src": inline_source(page, "style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{directive} {source}" for directive, source in policy.items())
