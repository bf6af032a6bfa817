"""`python -m minorca.serve`: an OpenAI-compatible HTTP server for one model and its adapters.

The event loop speaks HTTP and turns tokens into text; the engine has a thread of its own (engine_thread.py); templates
and tokenizers, which may be slow, run in worker threads."""

import argparse
import asyncio
import gc
import ipaddress
import logging
import os
import re
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn
from fastapi import FastAPI

from minorca import cli
from minorca.data.chat_template import TEMPLATES
from minorca.data.tokenizer import check_vocabulary, load_tokenizer
from minorca.errors import UserError, raise_problems
from minorca.files.hub import name_of
from minorca.files.safe_io import quote, user_path
from minorca.files.vocabulary import check_shares_vocabulary
from minorca.files.weights import open_model
from minorca.generate.engine import Engine, open_engine
from minorca.model.architecture import Architecture, read_architecture
from minorca.model.quantization import parse_quantization
from minorca.serve.adapters import RuntimeAdapters, read_chat
from minorca.serve.app import make_app
from minorca.serve.engine_thread import EngineThread
from minorca.serve.http import Connection, Listener
from minorca.serve.service import Model, Service

# Seconds that running requests have to finish after SIGINT or SIGTERM.
SHUTDOWN_SECONDS = 30
# Of these the process itself has some 20 open, and `Listener` leaves 16 free.
MIN_DESCRIPTORS = 64
# For which one thread may keep the interpreter's lock from another. With Python's 5 ms a client that keeps this process
# at work makes a step of 25 ms last for seconds.
SWITCH_SECONDS = 5e-5
# the environment's, of which the API key is where the command line has none
KEY_VARIABLE = "MINORCA_API_KEY"
# In URLs, as browsers send them in lower case.
HOST_NAME = r"([a-z0-9_.-]+|\[[0-9a-f:.]+\])"


def main(argv: list[str]) -> None:
    args = _parse(argv)
    cli.outlive_readers()
    directories = _name_models(args.model, args.adapter)
    # Before the model is loaded, which may take minutes.
    with _listen(args.host, args.port) as listener:
        arch = read_architecture(args.model)
        for directory in filter(None, directories.values()):
            check_shares_vocabulary(directory)
        models = _load_chats(directories, arch, args)
        _check_max_length(args.max_length, arch)
        adapters = {name: directory for name, directory in directories.items() if directory is not None}
        opener = partial(
            open_engine,
            args.model,
            adapters,
            args.slots,
            args.max_length,
            quantize=args.quantize,
            double_quant=args.double_quant,
        )
        asyncio.run(_serve(opener, models, listener, args))


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="minorca.serve", description="Serves OpenAI's chat and completions API over HTTP, and a chat page at /."
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="the model's directory or hub id, by whose name clients call it"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="a LoRA adapter in PEFT's format, a directory or a hub id, which clients use as the model NAME (default: "
        "its own name); may be repeated",
    )
    parser.add_argument(
        "--runtime-adapters",
        metavar="DIR",
        help="let clients load adapters from directories below DIR, and unload them, while the server runs",
    )
    cli.add_quantization(parser, "nf4: quantize the model while it loads, as a QLoRA adapter was trained on it")
    parser.add_argument(
        "--template",
        choices=TEMPLATES,
        help="the chat template of the model and of all adapters; default: that of each adapter's training, or auto",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 or :: accepts other machines"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 chooses a free port; default: 8000")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"the key that clients must send; safer in the environment: {KEY_VARIABLE}"
    )
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="an origin, as https://chat.example, whose pages may read responses; *: those of all; may be repeated",
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a host name for this server, beside this machine's own; no other name is accepted; may be repeated",
    )
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="requests that run at once; default: 8")
    parser.add_argument(
        "--queue", type=int, default=64, metavar="N", help="requests that may wait for a slot; default: 64"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="the maximum number of tokens of a prompt and its answer; default: the model's",
    )
    return parser


def _parse(argv: list[str]) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    raise_problems(_problems(args))
    return args


def _problems(args: argparse.Namespace) -> Iterator[UserError]:
    for origin in args.cors_origin:
        if origin != "*" and not re.fullmatch(f"[a-z][a-z0-9+.-]*://{HOST_NAME}(:[0-9]+)?", origin):
            expected = "https://chat.example or http://localhost:3000, in lower case and without a path; or *"
            yield UserError(f"is {quote(origin)}; expected an origin as {expected}", field="--cors-origin")
    for name in args.allowed_host:
        if not re.fullmatch(HOST_NAME, name.lower()):
            expected = "without a scheme or port; an IPv6 address in brackets"
            yield UserError(f"is {quote(name)}; expected a host name {expected}", field="--allowed-host")
    if args.runtime_adapters is not None and not user_path(args.runtime_adapters).is_dir():
        yield UserError(f"is {quote(args.runtime_adapters)}; expected a directory", field="--runtime-adapters")
    if not 0 <= args.port < 2**16:
        yield UserError("must be from 0 to 65535", field="--port")
    keys = {"--api-key": args.api_key, f"the environment's {KEY_VARIABLE}": os.environ.get(KEY_VARIABLE)}
    for field, key in keys.items():
        # which the message must not quote; clients cannot send other characters
        if key is not None and not (key and key == key.strip() and key.isprintable()):
            yield UserError("is empty, or has a space around it or a control character; fix or unset it", field=field)
    if not 1 <= args.slots <= 4096:
        yield UserError("must be from 1 to 4096", field="--slots")
    if args.queue < 0:
        yield UserError("must be 0 or more", field="--queue")
    if args.max_length is not None and args.max_length < 2:
        yield UserError("must be at least 2", field="--max-length")


def _name_models(model: str, adapters: list[str]) -> dict[str, str | None]:
    """The names that clients use, each with its adapter's directory (None: the base model)."""
    directories: dict[str, str | None] = {name_of(model): None}
    for adapter in adapters:
        match = re.fullmatch(r"([^/=]+)=(.+)", adapter)
        name, directory = match.groups() if match else (name_of(adapter), adapter)
        if name in directories:
            raise UserError(f"{adapter}: another model is named {name}; choose a name with NAME=DIR", field="--adapter")
        directories[name] = directory
    return directories


def _load_chats(directories: dict[str, str | None], arch: Architecture, args: argparse.Namespace) -> dict[str, Model]:
    """Each model with the tokenizer that its adapter brings, or the base model's, and its template."""
    base = load_tokenizer(args.model)
    check_vocabulary(base, arch.vocab_size, args.model)
    models = {}
    for name, directory in directories.items():
        adapter = None if directory is None else name
        models[name] = read_chat(base, arch.vocab_size, directory, args.template, adapter)
    return models


def _listen(host: str, port: int) -> Listener:
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors < MIN_DESCRIPTORS:
        raise UserError(
            f"{descriptors} files and connections may be open; allow {MIN_DESCRIPTORS}, or better 1024 (ulimit -n)"
        )
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = Listener(family, kind, protocol)
        # Allows a restart while connections of the last server are in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
        return listener
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot listen on {host} port {port} ({error}); choose another --host or --port") from None


def _check_max_length(max_length: int | None, arch: Architecture) -> None:
    if max_length and arch.max_positions and max_length > arch.max_positions:
        raise UserError(f"is {max_length}; the model has {arch.max_positions} positions", field="--max-length")


async def _serve(
    opener: Callable[[], Engine],
    models: dict[str, Model],
    listener: Listener,
    args: argparse.Namespace,
) -> None:
    """Serves until a signal comes or the engine fails."""
    address = listener.getsockname()[0]
    is_local = ipaddress.ip_address(address).is_loopback
    hosts = _host_names(args) if is_local or args.allowed_host else None
    key = args.api_key or os.environ.get(KEY_VARIABLE)
    thread = EngineThread(opener, args.queue)
    await thread.open()
    service = Service(thread, models)
    server = _make_server(make_app(service, key, hosts, args.cors_origin, _runtime_adapters(service, args)))

    def shut_down() -> None:
        server.should_exit = True

    thread.on_failure = shut_down
    listener.on_refusal = thread.metrics.connections_refused.inc
    try:
        if not is_local and not key:
            print(
                f"minorca: warning: other machines can use this server without an API key; set {KEY_VARIABLE}",
                file=sys.stderr,
            )
        # A collection of garbage, which a long body starts, need not look through all that was loaded.
        gc.freeze()
        # The engine's thread takes the lock hundreds of times a step.
        sys.setswitchinterval(SWITCH_SECONDS)
        _announce(listener, models, thread.engine)
        await server.serve(sockets=[listener])
    finally:
        gc.unfreeze()
        thread.stop()
    if thread.failure:
        raise thread.failure


def _runtime_adapters(service: Service, args: argparse.Namespace) -> RuntimeAdapters | None:
    if args.runtime_adapters is None:
        return None
    quantization = open_model(args.model, parse_quantization(args.quantize, args.double_quant)).quantization
    return RuntimeAdapters(service, user_path(args.runtime_adapters).resolve(), args.template, quantization)


def _host_names(args: argparse.Namespace) -> set[str]:
    """The names by which clients may address the server, as they are in URLs."""
    own = f"[{args.host}]" if ":" in args.host else args.host
    return {"localhost", "127.0.0.1", "[::1]", *(name.lower() for name in (own, *args.allowed_host))}


def _make_server(app: FastAPI) -> uvicorn.Server:
    # At shutdown uvicorn logs the requests that it cancels as errors.
    logging.getLogger("uvicorn.error").addFilter(_is_not_cancellation)
    config = uvicorn.Config(
        app,
        http=Connection,
        log_config=None,
        log_level="error",
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)


def _is_not_cancellation(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _announce(listener: socket.socket, models: dict[str, Model], engine: Engine) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"serving {', '.join(models)} at {url}: {engine.slots} slots of {engine.max_length} tokens", flush=True)


if __name__ == "__main__":
    cli.run(main)
