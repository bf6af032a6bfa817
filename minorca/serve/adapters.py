"""Adapters that clients load and unload while the server runs.

Paths and bodies of requests are vLLM's (its documentation, "Dynamically serving LoRA adapters").
"""

import asyncio
import concurrent.futures
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Annotated

import torch
from fastapi import FastAPI, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse
from pydantic import Field

from minorca.data.chat_template import resolve_template
from minorca.data.portable_files import load_chat
from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError, memory_asked_for
from minorca.files.safe_io import quote
from minorca.files.vocabulary import check_shares_vocabulary
from minorca.model.build import read_adapter, warn_of_other_base
from minorca.model.lora import LoRA
from minorca.model.quantization import Quantization
from minorca.serve.errors import APIError
from minorca.serve.fields import Body
from minorca.serve.service import Model, Service

# Every step multiplies by all of them.
MAX_ADAPTERS = 64
# Between two looks at whether an unloaded adapter is still in use.
POLL_SECONDS = 0.1

Name = Annotated[str, Field(min_length=1, max_length=256)]


class LoadRequest(Body):
    lora_name: Name
    lora_path: str


class UnloadRequest(Body):
    lora_name: Name


def read_chat(
    base: Tokenizer, rows: int, directory: str | Path | None, template: str | None, adapter: str | None
) -> Model:
    """What clients name as a model: its tokenizer is that which its adapter brings, or the base model's.

    Args:
        rows: of the base model's embedding.
        directory: of the adapter; None: the base model.
        template: the chat template; None: that of the adapter's training, or auto.
        adapter: the engine's name of the adapter.

    Raises:
        UserError: a file of the adapter that is invalid, or a template that the tokenizer cannot write.
    """
    tok, recorded = load_chat(base, rows, directory)
    template = template or recorded or "auto"
    # A model without any template can still complete text.
    if template != "auto":
        resolve_template(tok, template)
    return Model(tok, template, adapter)


class RuntimeAdapters:
    """Loads adapters into a service, and unloads them. All methods are for the event loop's thread.

    Args:
        root: only directories below this one are loaded.
        template: the chat template of all of them; None: that of each one's training.
        quantization: of the base model.
    """

    def __init__(self, service: Service, root: Path, template: str | None, quantization: Quantization | None):
        self.service = service
        self.root = root
        self.template = template
        self.quantization = quantization
        self.base = next(model.tok for model in service.models.values() if model.adapter is None)
        self._loads = count(1)
        # One at a time: names are taken in turn, and little memory is.
        self._turn = asyncio.Lock()
        self._removals: set[asyncio.Task] = set()

    async def load(self, name: str, path: str) -> None:
        """Reads an adapter in a worker thread, then installs it between two steps.

        Raises:
            APIError: the name, the path or a file of the adapter is not valid; the server is as it was.
        """
        engine = self.service.thread.engine
        async with self._turn:
            if name in self.service.models:
                raise APIError(400, f"lora_name is {quote(name)}, which is in use; unload it first", "lora_name")
            if len(engine.adapters) >= MAX_ADAPTERS:
                raise APIError(400, f"{MAX_ADAPTERS} adapters are loaded; unload one first")
            # The engine's name, which requests to an earlier adapter of this name do not have, nor cached prefixes of
            # these. No adapter from the start has a name with a slash.
            adapter = f"{next(self._loads)}/{name}"
            model, loras = await run_in_threadpool(self._read, path, adapter)
            try:
                await self._call(engine.add_adapter, adapter, loras)
            except torch.OutOfMemoryError as error:
                raise APIError(400, f"the adapter does not fit in memory: {memory_asked_for(error)}") from None
            self.service.models[name] = model

    def unload(self, name: str) -> None:
        """Forgets a name at once, and the adapter when the last request that uses it has ended.

        Raises:
            APIError: no adapter has this name.
        """
        model = self.service.models.get(name)
        if model is None or model.adapter is None:
            names = ", ".join(name for name, model in self.service.models.items() if model.adapter) or "none is loaded"
            raise APIError(404, f"lora_name is {quote(name)}; expected an adapter ({names})", "lora_name")
        del self.service.models[name]
        removal = asyncio.create_task(self._remove_when_unused(model.adapter))
        self._removals.add(removal)
        removal.add_done_callback(self._removals.discard)

    async def _remove_when_unused(self, adapter: str) -> None:
        # Those too that have not reached the engine yet.
        while any(request.adapter == adapter for request in self.service.thread.completions):
            await asyncio.sleep(POLL_SECONDS)
        self.service.thread.call(self.service.thread.engine.remove_adapter, adapter)

    def _read(self, path: str, adapter: str) -> tuple[Model, dict[int, LoRA]]:
        directory = self._find(path)
        model = self.service.thread.engine.model
        try:
            check_shares_vocabulary(directory)
            warn_of_other_base(directory, self.quantization)
            chat = read_chat(self.base, model.arch.vocab_size, directory, self.template, adapter)
            # A GPU is the engine thread's.
            return chat, read_adapter(model, directory, "cpu")
        except UserError as error:
            message = "; ".join(str(_as_client_sees(problem, directory, path)) for problem in error.problems)
            raise APIError(400, message, "lora_path") from None

    def _find(self, path: str) -> Path:
        try:
            directory = (self.root / path).resolve()
            if self.root in directory.parents and directory.is_dir():
                return directory
        # Loops of links, names that are too long, null characters and surrogates; and then no path.
        except (OSError, RuntimeError, ValueError):
            pass
        raise APIError(
            400,
            f"lora_path is {quote(path)}; expected the directory of an adapter below that of --runtime-adapters",
            "lora_path",
        )

    async def _call(self, function: Callable[..., None], *arguments) -> None:
        """Calls a function of the engine between two steps, and waits for it; raises what it raises."""
        result: concurrent.futures.Future[None] = concurrent.futures.Future()

        def call() -> None:
            try:
                result.set_result(function(*arguments))
            except Exception as error:
                result.set_exception(error)

        self.service.thread.call(call)
        await asyncio.wrap_future(result)


def _as_client_sees(problem: UserError, directory: Path, path: str) -> UserError:
    """A problem whose file is named as the client names its directory."""
    file = None
    if problem.path is not None and Path(problem.path).is_relative_to(directory):
        file = Path(path, Path(problem.path).relative_to(directory))
    return UserError(problem.message, path=file, where=problem.where, field=problem.field, advice=problem.advice)


def add_endpoints(app: FastAPI, adapters: RuntimeAdapters) -> None:
    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadRequest) -> Response:
        await adapters.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadRequest) -> Response:
        adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
