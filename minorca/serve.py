"""`python -m minorca.serve`: OpenAI's HTTP interface to one model and its adapters.

The event loop talks HTTP and turns tokens into text; the engine has its own thread (engine_thread.py); templates and tokenizers,
which may be slow, run in worker threads.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request as HTTPRequest, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException

from minorca import cli
from minorca.architecture import read_architecture
from minorca.engine import Engine, Request, open_engine
from minorca.engine_thread import Answer, EngineThread
from minorca.errors import UserError, refuse
from minorca.protocol import ChatRequest, Choice, CompletionRequest, Generation, Problem, Refused, problem
from minorca.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from minorca.untrusted import parse_json, shown

BODY_BYTES = 2 * 2**20  # of a request; the ids of 32768 tokens take 0.2 million
DRAINED_BYTES = 64 * 2**20  # of a longer one are read and dropped, so that its client gets to hear why
DEFAULT_NEW_TOKENS = 2048  # at most, where a request names no limit
GRACE_SECONDS = 30  # for answers under way when the server is told to end
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
            raise Refused(400, f"model is {shown(body.model)}; expected one of {', '.join(self.models)}", "model", "model_not_found")
        if body.count > self.thread.seats:
            raise Refused(400, f"n asks for {body.count} answers at once; expected at most {self.thread.seats}", "n")
        options = {"sampling": body.sampling, "stop_ids": self.tok.stop_ids, "logprobs": body.scored, "adapter": self.models[body.model]}
        requests = [Request([], sample=i % body.n, **options) for i in range(body.count)]
        with contextlib.ExitStack() as seats:
            choices = {request: Choice(i, self.tok, body.stop) for i, request in enumerate(requests)}
            answer = seats.enter_context(Answer(self.thread, choices))
            answer.prompt_tokens = await run_in_threadpool(self._prepare, body, requests)
            kind, whole, piece = body.names
            head = {"id": f"{kind}-{secrets.token_hex(12)}", "object": whole, "created": int(time.time()), "model": body.model}
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
                    raise Refused(400, f"{what} are over the limit of {engine.max_length}", where, "context_length_exceeded")
                engine.check(request)
        except UserError as error:
            raise Refused(400, str(error).replace(str(self.tok.path), body.model), body.prompt_field) from None
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
                raise Refused(400, f"Content-Type is {shown(kind)}; expected application/json")
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
        self.headers = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Content-Security-Policy": policy}

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
            return self.refuse(Refused(400, f"Host is {shown(headers.get('host', ''))}; this server listens on this machine alone"))
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), os.fsencode(self.key or ""))
        if self.key and path not in OPEN and not right:
            message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            return self.refuse(Refused(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}))
        return None


def _invalid(error: RequestValidationError) -> Refused:
    """What is wrong with which fields."""
    problems = []
    for one in error.errors()[:10]:
        field = ".".join(map(str, one["loc"][1:]))
        what = "is not known here; leave it out" if one["type"] == "extra_forbidden" else one["msg"].removeprefix("Value error, ")
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
        content = problem(error.status_code, str(error.detail), getattr(error, "param", None), getattr(error, "code", None))
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


# -------------------------------------------------------------------------------------------------------------- command


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="minorca.serve", description="Serves OpenAI's HTTP interface, and a page to chat at /.")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model's directory, whose name is the model's")
    adapter = "a LoRA adapter in PEFT's format, a model of that name (its directory's by default); may be repeated"
    parser.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR", help=adapter)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; other machines reach 0.0.0.0 or ::")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any that is free")
    parser.add_argument("--api-key", metavar="KEY", help="what clients must send; better in the environment, as MINORCA_API_KEY")
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="answers generated at once")
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="answers that may wait for a slot; more are refused")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a prompt and its answer, at most; by default the model's")
    return parser


def _check(args) -> None:
    problems = {
        "--port must be from 0 to 65535": not 0 <= args.port < 2**16,
        "--api-key is empty": args.api_key == "",
        "--slots must be from 1 to 4096": not 1 <= args.slots <= 4096,
        "--queue must be 0 or more": args.queue < 0,
        "--max-length must be at least 2": args.max_length is not None and args.max_length < 2,
    }
    refuse(problems)


def _named(model: str, adapters: list[str]) -> tuple[str, dict[str, str]]:
    """The base's name, and the adapters' directories by name."""
    base, directories = Path(model).resolve().name, {}
    for adapter in adapters:
        name, directory = match.groups() if (match := re.fullmatch(r"([^/=]+)=(.+)", adapter)) else (Path(adapter).resolve().name, adapter)
        if name in (base, *directories):
            raise UserError(f"--adapter {adapter}: {name} is the name of another model; give another one as NAME=DIR")
        directories[name] = directory
    return base, directories


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that ended a moment ago does not matter
        listener.bind(address)
        listener.listen(1024)
        return listener
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error}); choose another one") from None


async def _serve(engine: Engine, tok: Tokenizer, models: dict[str, str | None], listener: socket.socket, args, key: str | None) -> None:
    thread = EngineThread(engine, args.queue)
    host, port = listener.getsockname()[:2]
    local = ipaddress.ip_address(host).is_loopback
    app = make_app(Service(thread, tok, models), key, {"localhost", "127.0.0.1", "[::1]", args.host.lower()} if local else None)
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_config=None, log_level="error", access_log=False, lifespan="off", ws="none", proxy_headers=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )  # fmt: skip
    )
    cut_off = lambda record: record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)  # at the end: no bug to tell
    logging.getLogger("uvicorn.error").addFilter(lambda record: not cut_off(record))
    thread.when_failed = lambda: setattr(server, "should_exit", True)
    thread.start()
    try:
        if not local and not key:
            print("minorca: warning: other machines can reach this server, and it asks for no key (MINORCA_API_KEY)", file=sys.stderr)
        where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"serving {', '.join(models)} at {where}: {engine.slots} slots of {engine.max_length} tokens", flush=True)
        await server.serve(sockets=[listener])
    finally:
        thread.stop()
    if thread.failure:
        raise thread.failure


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    _check(args)
    base, adapters = _named(args.model, args.adapter)
    with _listen(args.host, args.port) as listener:  # before minutes of loading
        tok, arch = load_tokenizer(args.model), read_architecture(args.model)
        check_vocabulary(tok, arch.vocab_size, args.model)
        if args.max_length and args.max_length > (arch.max_positions or args.max_length):
            raise UserError(f"--max-length is {args.max_length}; the model has {arch.max_positions} positions")
        engine = open_engine(args.model, adapters, slots=args.slots, max_length=args.max_length)
        models = {base: None} | {name: name for name in adapters}
        asyncio.run(_serve(engine, tok, models, listener, args, args.api_key or os.environ.get("MINORCA_API_KEY") or None))


if __name__ == "__main__":
    cli.run(main)
