"""`python -m minorca.serve`: OpenAI's HTTP interface to one model and its adapters.

The event loop talks HTTP and turns tokens into text; the engine has its own thread (engine_thread.py); templates and tokenizers,
which may be slow, run in worker threads.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi import Request as HTTPRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException

from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError
from minorca.files.safe_io import parse_json, quote
from minorca.generate.engine import Request
from minorca.serve.engine_thread import Answer, EngineThread
from minorca.serve.protocol import ChatRequest, Choice, CompletionRequest, Generation, Problem, Refused, problem

BODY_BYTES = 2 * 2**20  # of a request; the ids of 32768 tokens take 0.2 million
DRAINED_BYTES = 64 * 2**20  # of a longer one are read and dropped, so that its client gets to hear why
DEFAULT_NEW_TOKENS = 2048  # at most, where a request names no limit
PATIENCE = 30  # seconds for the reader of a stream to take the next piece, before its place goes to others
OPEN = ("/", "/health")  # need no key
PAGE = Path(__file__).parent / "page.html"


# -------------------------------------------------------------------------------------------------------------- answers


class Service:
    """A model, its tokenizer and its engine's thread, and how a call for text is answered."""

    def __init__(self, thread: EngineThread, tok: Tokenizer, models: dict[str, str | None]):
        self.thread, self.tok, self.models = thread, tok, models  # names, and the adapter that each means
        self.started = int(time.time())

    async def answer(self, call: HTTPRequest, body: Generation) -> Response:
        if body.model not in self.models:
            raise Refused(
                400,
                f"model is {quote(body.model)}; expected one of {', '.join(self.models)}",
                "model",
                "model_not_found",
            )
        if body.count > self.thread.seats:
            raise Refused(400, f"n asks for {body.count} answers at once; expected at most {self.thread.seats}", "n")
        options = {
            "sampling": body.sampling,
            "stop_ids": self.tok.stop_ids,
            "logprobs": body.scored,
            "adapter": self.models[body.model],
        }
        requests = [Request([], sample=i % body.n, **options) for i in range(body.count)]
        with contextlib.ExitStack() as seats:
            choices = {request: Choice(i, self.tok, body.stop) for i, request in enumerate(requests)}
            answer = seats.enter_context(Answer(self.thread, choices))
            answer.prompt_tokens = await run_in_threadpool(self._prepare, body, requests)
            kind, whole, piece = body.names
            head = {
                "id": f"{kind}-{secrets.token_hex(12)}",
                "object": whole,
                "created": int(time.time()),
                "model": body.model,
            }
            if body.stream:
                return EventStream(self._events(answer, body, head | {"object": piece}), seats.pop_all())
            return await unless_gone(call, self._whole(answer, body, head))

    def _prepare(self, body: Generation, requests: list[Request]) -> int:
        """Gives the requests their prompts and limits; returns how many tokens the prompts have."""
        engine = self.thread.engine
        try:
            prompts = body.render(self.tok, engine.max_length)
            for i, request in enumerate(requests):
                request.prompt = prompts[i // body.n]
                room = engine.max_length - len(request.prompt)
                request.max_new_tokens = body.limit or max(1, min(room, DEFAULT_NEW_TOKENS))
                if request.max_new_tokens > room:
                    what = f"{len(request.prompt)} prompt tokens and {request.max_new_tokens} new ones"
                    where = body.limit_field if room > 0 else body.prompt_field
                    raise Refused(
                        400, f"{what} are over the limit of {engine.max_length}", where, "context_length_exceeded"
                    )
                engine.check(request)
        except UserError as error:
            # without the path, which is the server's own affair
            sentences = "; ".join(problem.sentence for problem in error.problems)
            raise Refused(400, sentences, body.prompt_field) from None
        return sum(map(len, prompts))

    async def _whole(self, answer: Answer, body: Generation, head: dict) -> Response:
        async for _ in answer.grow():
            pass
        choices = [body.whole(choice) for choice in answer.choices.values()]
        return JSONResponse(head | {"choices": choices, "usage": answer.usage})

    async def _events(self, answer: Answer, body: Generation, head: dict) -> AsyncIterator[str]:
        def event(choices: list[dict], usage: dict | None = None) -> str:
            told = {"usage": usage} if body.stream_options.include_usage else {}
            return _event(head | {"choices": choices} | told)

        try:
            for choice in answer.choices.values():
                if opening := body.opening(choice.index):
                    yield event([opening])
            async for choice, text in answer.grow():
                scores = choice.take_scores() if text or choice.finish_reason else []
                if text or scores:
                    yield event([body.piece(choice.index, text, scores)])
                if choice.finish_reason:
                    yield event([body.piece(choice.index, "", [], choice.finish_reason)])
            if body.stream_options.include_usage:
                yield event([], answer.usage)
            yield "data: [DONE]\n\n"
        except Refused as refused:  # too late for a status
            yield _event(problem(refused.status_code, refused.detail))


def _event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"  # in ASCII: some clients split lines at more than line feeds


class EventStream(StreamingResponse):
    """Server-sent events, and what is given back once they are sent, or their reader has left or no longer reads."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], held: contextlib.ExitStack):
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self.held = held

    async def __call__(self, scope, receive, send) -> None:
        async def in_time(message) -> None:
            await asyncio.wait_for(send(message), PATIENCE)

        with self.held, contextlib.suppress(TimeoutError):  # an answer that returns unfinished ends its connection
            await super().__call__(scope, receive, in_time)


async def unless_gone(call: HTTPRequest, work: Awaitable[Response]) -> Response:
    """Does the work, but for a client that disconnects stops it."""

    async def gone() -> None:
        while (await call.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=499)  # which nobody reads
    finally:
        working.cancel()
        watching.cancel()


# ----------------------------------------------------------------------------------------------------------------- HTTP


class JSONBody(HTTPRequest):
    """A call whose body is strict JSON of a bounded size."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Refused(400, f"Content-Type is {quote(kind)}; expected application/json")
            size, chunks = 0, []
            async for chunk in self.stream():
                size += len(chunk)
                if size <= BODY_BYTES:
                    chunks.append(chunk)
                elif size > DRAINED_BYTES:
                    break
            if size > BODY_BYTES:
                raise Refused(400, f"the body has more than {BODY_BYTES} bytes", headers={"Connection": "close"})
            self._body = b"".join(chunks)
        return self._body

    async def json(self):
        try:
            return parse_json((await self.body()).decode())
        except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, numbers without end, and brackets
            raise Refused(400, f"the body cannot be read as JSON ({error})") from None


class JSONRoute(APIRoute):
    def get_route_handler(self):
        handle = super().get_route_handler()

        async def handle_strictly(call: HTTPRequest) -> Response:
            return await handle(JSONBody(call.scope, call.receive))

        return handle_strictly


class Guard:
    """Before anything else: is the host the one that we are called by, and is the key right? And headers for every answer."""

    def __init__(self, app, key: str | None, hosts: set[str] | None, policy: str, refuse: Callable):
        self.app, self.key, self.hosts, self.refuse = app, key, hosts, refuse
        self.headers = {
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Content-Security-Policy": policy,
        }

    async def __call__(self, scope, receive, send) -> None:
        async def with_headers(message):
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        answer = self._refusal(scope["path"], Headers(scope=scope)) or self.app
        await answer(scope, receive, with_headers)

    def _refusal(self, path: str, headers: Headers) -> Response | None:
        host = re.fullmatch(r"(\[[^]]*\]|[^:]*)(:\d+)?", headers.get("host", ""))
        if self.hosts and not (host and host[1].lower() in self.hosts):  # a page of another site, whose name leads here
            return self.refuse(
                Refused(400, f"Host is {quote(headers.get('host', ''))}; this server listens on this machine alone")
            )
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = scheme.lower() == "bearer" and hmac.compare_digest(
            given.strip().encode("latin-1"), os.fsencode(self.key or "")
        )
        if self.key and path not in OPEN and not right:
            message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            return self.refuse(Refused(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}))
        return None


def _invalid(error: RequestValidationError) -> Refused:
    """What is wrong with which fields."""
    problems = []
    for one in error.errors()[:10]:
        field = ".".join(map(str, one["loc"][1:]))
        what = (
            "is not known here; leave it out"
            if one["type"] == "extra_forbidden"
            else one["msg"].removeprefix("Value error, ")
        )
        problems.append((field, f"{field}: {what}" if field else what))
    return Refused(400, "; ".join(text for _, text in problems), problems[0][0] or None)


def _policy(page: str) -> str:
    """The page's own script and style and nothing else, nor calls to elsewhere."""

    def inline(tag: str) -> str:
        digest = hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1].encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    allowed = f"default-src 'none'; script-src {inline('script')}; style-src {inline('style')}; connect-src 'self'; img-src data:"
    return f"{allowed}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def make_app(service: Service, key: str | None = None, hosts: set[str] | None = None) -> FastAPI:
    """The whole interface. hosts: the only names that it may be called by; None: any."""
    page = PAGE.read_text()
    thread, refusals = service.thread, {code: {"model": Problem} for code in ("4XX", "5XX")}
    app = FastAPI(title="minorca", docs_url=None, redoc_url=None, responses=refusals)
    app.router.route_class = JSONRoute

    def refuse(error: AnyHTTPException) -> Response:
        thread.metrics.refused.labels(error.status_code).inc()
        content = problem(
            error.status_code, str(error.detail), getattr(error, "param", None), getattr(error, "code", None)
        )
        return JSONResponse(content, error.status_code, error.headers)

    app.add_middleware(Guard, key=key, hosts=hosts, policy=_policy(page), refuse=refuse)

    @app.exception_handler(AnyHTTPException)
    async def refused(call: HTTPRequest, error: AnyHTTPException) -> Response:
        if error.status_code in (404, 405):
            error.detail = f"{error.detail}: {call.method} {call.url.path}"
        return refuse(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(call: HTTPRequest, error: RequestValidationError) -> Response:
        return refuse(_invalid(error))

    @app.exception_handler(Exception)
    async def failed(call: HTTPRequest, error: Exception) -> Response:
        return refuse(Refused(500, "the server has a bug, which its log tells"))

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, call: HTTPRequest) -> Response:
        return await service.answer(call, body)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, call: HTTPRequest) -> Response:
        return await service.answer(call, body)

    @app.get("/v1/models")
    async def models() -> Response:
        entry = {"object": "model", "created": service.started, "owned_by": "minorca"}
        return JSONResponse({"object": "list", "data": [{"id": name} | entry for name in service.models]})

    @app.get("/health")
    async def health() -> Response:
        if not thread.is_alive():
            raise Refused(503, "the engine has failed")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(thread.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(page)

    return app
