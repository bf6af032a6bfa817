"""HTTP below the endpoints: connections, host and key checks, JSON bodies, event streams, clients that disconnect."""

import asyncio
import contextlib
import hmac
import os
import re
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import Request as HTTPRequest
from fastapi import Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from minorca.files.safe_io import parse_json, quote
from minorca.serve.errors import APIError

# Of a request body; the ids of 32768 tokens take 0.2 million.
MAX_BODY_BYTES = 2 * 2**20
# Of lists and objects in a body, counted by their brackets, those in texts too: to parse 400,000 takes 0.2 s, in which
# no other thread runs.
MAX_BRACKETS = 2**17
# A body of fewer is parsed within a millisecond.
INLINE_CHARACTERS = 2**16
# Between two longer ones, as a multiple of the time that the first took to parse: what its validation takes and as many
# streams' steps as pass meanwhile.
PAUSE = 20
# More than MAX_BODY_BYTES are read up to here and dropped, because most clients read the error only after they have
# sent it all.
MAX_DRAINED_BYTES = 64 * 2**20
# Seconds until a client that does not read its stream is disconnected.
SEND_TIMEOUT = 30
# Seconds until a client that has not sent the head of a request is disconnected, and a body is refused.
HEAD_TIMEOUT = 10
BODY_TIMEOUT = 60
# Descriptors that connections leave free for files and for a template's process.
RESERVED_DESCRIPTORS = 16
# Paths that need no API key.
PUBLIC_PATHS = ("/", "/health")


class Listener(socket.socket):
    """A listening socket that closes a connection at once where few descriptors would be left.

    Attributes:
        on_refusal: called for each of these.
    """

    on_refusal: Callable[[], None] | None = None

    def accept(self):
        connection, address = super().accept()
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # the number of a new descriptor is the lowest that is free
        if connection.fileno() < limit - RESERVED_DESCRIPTORS:
            return connection, address
        connection.close()
        if self.on_refusal:
            self.on_refusal()
        # after which asyncio waits for the next one
        raise ConnectionAbortedError


class Connection(AutoHTTPProtocol):
    """uvicorn's, which alone would wait for ever for a first request, and for the rest of a head that has begun."""

    # of uvicorn's two implementations; the request that is or was served last
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    cycle: Any
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()

    def _await_head(self) -> None:
        self.timer = self.loop.call_later(HEAD_TIMEOUT, self._close_after, self.cycle)

    def _close_after(self, last: Any) -> None:
        self.timer = None
        if self.cycle is last:
            self.transport.close()


class Guard:
    """ASGI middleware that checks the host and the API key before anything else, and adds headers to every response.

    Args:
        key: the API key; None: none is needed.
        hosts: the allowed values of the Host header, without a port; None: any. They are checked against DNS rebinding:
            a web page whose own host name resolves to this machine.
        policy: the Content-Security-Policy.
        respond: the response to an error.
    """

    def __init__(
        self,
        app: ASGIApp,
        key: str | None,
        hosts: set[str] | None,
        policy: str,
        respond: Callable[[APIError], Response],
    ):
        self.app = app
        self.key = key
        self.hosts = hosts
        self.respond = respond
        self.headers = {
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Content-Security-Policy": policy,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            # The server sends no body of its response.
            scope = {**scope, "method": "GET"}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        headers = Headers(scope=scope)
        error = self._check_host(headers) or self._check_key(scope["path"], headers)
        app = self.respond(error) if error else self.app
        await app(scope, receive, send_with_headers)

    def _check_host(self, headers: Headers) -> APIError | None:
        if not self.hosts:
            return None
        host = headers.get("host", "")
        match = re.fullmatch(r"(\[[^]]*\]|[^:]*)(:\d+)?", host)
        if match and match[1].lower() in self.hosts:
            return None
        expected = ", ".join(sorted(self.hosts))
        return APIError(
            400, f"invalid Host header {quote(host)}; expected one of {expected} (--allowed-host adds names)"
        )

    def _check_key(self, path: str, headers: Headers) -> APIError | None:
        if not self.key or path in PUBLIC_PATHS:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        matches = hmac.compare_digest(key.strip(" ").encode("latin-1"), os.fsencode(self.key))
        if scheme.lower() == "bearer" and matches:
            return None
        return APIError(
            401,
            "missing or invalid API key; send it as Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


class JSONRequest(HTTPRequest):
    """A request whose body is strict JSON of limited size."""

    async def body(self) -> bytes:
        # The attribute in which starlette's `Request.body` keeps it.
        if not hasattr(self, "_body"):
            content_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
            if content_type != "application/json":
                raise APIError(400, f"invalid Content-Type {quote(content_type)}; expected application/json")
            try:
                async with asyncio.timeout(BODY_TIMEOUT):
                    self._body = await self._read_body()
            except TimeoutError:
                late = f"the body was not complete after {BODY_TIMEOUT} seconds"
                raise APIError(408, late, headers={"Connection": "close"}) from None
        return self._body

    async def _read_body(self) -> bytes:
        size = 0
        chunks = []
        async for chunk in self.stream():
            size += len(chunk)
            if size <= MAX_BODY_BYTES:
                chunks.append(chunk)
            elif size > MAX_DRAINED_BYTES:
                break
        if size > MAX_BODY_BYTES:
            raise APIError(400, f"the body has more than {MAX_BODY_BYTES} bytes", headers={"Connection": "close"})
        return b"".join(chunks)

    async def json(self) -> Any:
        # Also ValueError: invalid UTF-8 and numbers with too many digits; RecursionError: nesting that is too deep.
        try:
            text = (await self.body()).decode()
            if len(text) < INLINE_CHARACTERS:
                return parse_json(text)
            return await self._parse_long(text)
        except (ValueError, RecursionError) as error:
            raise APIError(400, f"the body is not valid JSON ({error})") from None

    async def _parse_long(self, text: str) -> Any:
        """Parses in a thread, one body at a time: between two the streams go on."""
        turn = self.app.state.long_bodies
        await turn.acquire()
        began = time.perf_counter()
        try:
            if text.count("[") + text.count("{") > MAX_BRACKETS:
                raise APIError(400, f"the body has more than {MAX_BRACKETS} opening brackets")
            return await run_in_threadpool(parse_json, text)
        finally:
            asyncio.get_running_loop().call_later(PAUSE * (time.perf_counter() - began), turn.release)


class JSONRoute(APIRoute):
    """A route whose requests are `JSONRequest`s."""

    def get_route_handler(self) -> Callable[[HTTPRequest], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: HTTPRequest) -> Response:
            return await handle(JSONRequest(request.scope, request.receive))

        return handle_json


class EventStream(StreamingResponse):
    """Server-sent events.

    Args:
        events: encoded events.
        resources: closed when all events are sent, when the client has left, or when it no longer reads.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], resources: contextlib.ExitStack):
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self.resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            await asyncio.wait_for(send(message), SEND_TIMEOUT)

        # The server closes the connection when a response returns unfinished.
        with self.resources, contextlib.suppress(TimeoutError):
            await super().__call__(scope, receive, send_in_time)


async def cancel_on_disconnect(request: HTTPRequest, work: Coroutine[Any, Any, Response]) -> Response:
    """The response that `work` returns; cancels it when the client disconnects."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        # 499, nginx's status for a client that has gone, is read by nobody.
        return working.result() if working.done() else Response(status_code=499)
    finally:
        working.cancel()
        watching.cancel()
