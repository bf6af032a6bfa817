"""`python -m minorca.serve`: OpenAI's HTTP interface to one model and its adapters.

The event loop talks HTTP and turns tokens into text; the engine has its own thread (engine_thread.py); templates and tokenizers,
which may be slow, run in worker threads.
"""

import asyncio
import ipaddress
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from minorca import cli
from minorca.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from minorca.errors import UserError, raise_problems
from minorca.generate.engine import Engine, open_engine
from minorca.model.architecture import read_architecture
from minorca.serve.app import Service, make_app
from minorca.serve.engine_thread import EngineThread

GRACE_SECONDS = 30  # for answers under way when the server is told to end


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="minorca.serve", description="Serves OpenAI's HTTP interface, and a page to chat at /.")
    parser.add_argument("--model", required=True, metavar="DIR", help="a model's directory, whose name is the model's")
    adapter = "a LoRA adapter in PEFT's format, a model of that name (its directory's by default); may be repeated"
    parser.add_argument("--adapter", action="append", default=[], metavar="[NAME=]DIR", help=adapter)
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on; other machines reach 0.0.0.0 or ::"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any that is free")
    parser.add_argument(
        "--api-key", metavar="KEY", help="what clients must send; better in the environment, as MINORCA_API_KEY"
    )
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="answers generated at once")
    parser.add_argument(
        "--queue", type=int, default=64, metavar="N", help="answers that may wait for a slot; more are refused"
    )
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of a prompt and its answer, at most; by default the model's"
    )
    return parser


def _problems(args) -> Iterator[UserError]:
    if not 0 <= args.port < 2**16:
        yield UserError("must be from 0 to 65535", field="--port")
    if args.api_key == "":
        yield UserError("is empty", field="--api-key")
    if not 1 <= args.slots <= 4096:
        yield UserError("must be from 1 to 4096", field="--slots")
    if args.queue < 0:
        yield UserError("must be 0 or more", field="--queue")
    if args.max_length is not None and args.max_length < 2:
        yield UserError("must be at least 2", field="--max-length")


def _named(model: str, adapters: list[str]) -> tuple[str, dict[str, str]]:
    """The base's name, and the adapters' directories by name."""
    base, directories = Path(model).resolve().name, {}
    for adapter in adapters:
        name, directory = (
            match.groups()
            if (match := re.fullmatch(r"([^/=]+)=(.+)", adapter))
            else (Path(adapter).resolve().name, adapter)
        )
        if name in (base, *directories):
            raise UserError(f"--adapter {adapter}: {name} is the name of another model; give another one as NAME=DIR")
        directories[name] = directory
    return base, directories


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # a server that ended a moment ago does not matter
        listener.bind(address)
        listener.listen(1024)
        return listener
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error}); choose another one") from None


async def _serve(
    engine: Engine, tok: Tokenizer, models: dict[str, str | None], listener: socket.socket, args, key: str | None
) -> None:
    thread = EngineThread(engine, args.queue)
    host, port = listener.getsockname()[:2]
    local = ipaddress.ip_address(host).is_loopback
    app = make_app(
        Service(thread, tok, models), key, {"localhost", "127.0.0.1", "[::1]", args.host.lower()} if local else None
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level="error",
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )  # fmt: skip
    )
    cut_off = lambda record: (
        record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError)
    )  # at the end: no bug to tell
    logging.getLogger("uvicorn.error").addFilter(lambda record: not cut_off(record))
    thread.when_failed = lambda: setattr(server, "should_exit", True)
    thread.start()
    try:
        if not local and not key:
            print(
                "minorca: warning: other machines can reach this server, and it asks for no key (MINORCA_API_KEY)",
                file=sys.stderr,
            )
        where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        print(f"serving {', '.join(models)} at {where}: {engine.slots} slots of {engine.max_length} tokens", flush=True)
        await server.serve(sockets=[listener])
    finally:
        thread.stop()
    if thread.failure:
        raise thread.failure


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    raise_problems(_problems(args))
    base, adapters = _named(args.model, args.adapter)
    with _listen(args.host, args.port) as listener:  # before minutes of loading
        tok, arch = load_tokenizer(args.model), read_architecture(args.model)
        check_vocabulary(tok, arch.vocab_size, args.model)
        if args.max_length and args.max_length > (arch.max_positions or args.max_length):
            raise UserError(f"--max-length is {args.max_length}; the model has {arch.max_positions} positions")
        engine = open_engine(args.model, adapters, slots=args.slots, max_length=args.max_length)
        models = {base: None} | {name: name for name in adapters}
        asyncio.run(
            _serve(engine, tok, models, listener, args, args.api_key or os.environ.get("MINORCA_API_KEY") or None)
        )


if __name__ == "__main__":
    cli.run(main)
