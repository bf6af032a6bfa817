"""How a request for text becomes requests to the engine, and their tokens a response."""

import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import Request as HTTPRequest
from fastapi import Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError
from minorca.files.safe_io import quote
from minorca.generate.request import Request
from minorca.serve.choice import Choice
from minorca.serve.engine_thread import Completion, EngineThread
from minorca.serve.errors import APIError, error_body
from minorca.serve.http import EventStream, cancel_on_disconnect
from minorca.serve.protocol import GenerationRequest

# The maximum where a request does not set one.
DEFAULT_NEW_TOKENS = 2048


@dataclass(frozen=True)
class Model:
    """What clients name as a model: the base model, or one of its adapters.

    Attributes:
        template: the name of its chat template.
        adapter: the engine's name of the adapter; None: the base model.
    """

    tok: Tokenizer
    template: str = "auto"
    adapter: str | None = None


class Service:
    """A model and its adapters, ready to answer; `models` are by the names that clients use."""

    def __init__(self, thread: EngineThread, models: dict[str, Model]):
        self.thread = thread
        self.models = models
        self.created = int(time.time())

    async def respond(self, http_request: HTTPRequest, body: GenerationRequest) -> Response:
        """Generates all choices of a request, and responds with JSON or a stream of events.

        Raises:
            APIError: the request cannot be served.
        """
        model = self._find_model(body)
        requests = self._make_requests(body, model)
        choices = {request: Choice(i, model.tok, body.stop, body.continues) for i, request in enumerate(requests)}
        with contextlib.ExitStack() as stack:
            completion = stack.enter_context(Completion(self.thread, choices))
            # In a worker thread: templates and tokenizers may be slow.
            completion.prompt_tokens = await run_in_threadpool(self._set_prompts, body, model, requests)
            for choice in choices.values():
                choice.reader = body.call_reader(model.tok, model.template)
            header = {
                "id": f"{body.id_prefix}-{secrets.token_hex(12)}",
                "object": body.chunk_object if body.stream else body.response_object,
                "created": int(time.time()),
                "model": body.model,
            }
            if body.stream:
                return EventStream(self._events(completion, body, header), stack.pop_all())
            return await cancel_on_disconnect(http_request, self._complete(completion, body, header))

    def _find_model(self, body: GenerationRequest) -> Model:
        if body.model not in self.models:
            expected = ", ".join(self.models)
            raise APIError(400, f"model is {quote(body.model)}; expected one of {expected}", "model", "model_not_found")
        return self.models[body.model]

    def _check_characters(self, body: GenerationRequest, model: Model) -> None:
        """Raises APIError for a text that is too long whatever its tokens are, before any time is spent on it."""
        max_length = self.thread.engine.max_length
        if body.characters > max_length * model.tok.longest:
            raise APIError(
                400,
                f"{body.characters} characters exceed the maximum length of {max_length} tokens, which have at most "
                f"{model.tok.longest} characters each",
                body.prompt_field,
                "context_length_exceeded",
            )

    def _make_requests(self, body: GenerationRequest, model: Model) -> list[Request]:
        """The engine's requests, one a choice, without their prompts."""
        if body.num_choices > self.thread.max_requests:
            raise APIError(
                400, f"{body.num_choices} choices were requested; expected at most {self.thread.max_requests}", "n"
            )
        return [
            Request(
                [],
                sampling=body.sampling,
                stop_ids=model.tok.stop_ids,
                adapter=model.adapter,
                logprobs=body.logprobs_count,
                sample=i % body.n,
            )
            for i in range(body.num_choices)
        ]

    def _set_prompts(self, body: GenerationRequest, model: Model, requests: list[Request]) -> int:
        """Sets and checks the requests' prompts and limits; returns the number of prompt tokens."""
        self._check_characters(body, model)
        engine = self.thread.engine
        grammar = body.compile_grammar(model.tok, model.template)
        try:
            prompts = body.encode_prompts(model.tok, model.template, engine.max_length)
            for i, request in enumerate(requests):
                request.prompt = prompts[i // body.n]
                request.grammar = grammar
                self._set_limit(body, request)
                engine.check(request)
        except UserError as error:
            # Without the path, which clients should not see.
            message = "; ".join(problem.sentence for problem in error.problems)
            raise APIError(400, message, body.prompt_field) from None
        return sum(map(len, prompts))

    def _set_limit(self, body: GenerationRequest, request: Request) -> None:
        max_length = self.thread.engine.max_length
        rest = max_length - len(request.prompt)
        request.max_new_tokens = body.max_new_tokens or max(1, min(rest, DEFAULT_NEW_TOKENS))
        if request.max_new_tokens > rest:
            raise APIError(
                400,
                f"{len(request.prompt)} prompt tokens and {request.max_new_tokens} new tokens exceed the maximum "
                f"length of {max_length}",
                body.max_new_tokens_field if rest > 0 else body.prompt_field,
                "context_length_exceeded",
            )

    async def _complete(self, completion: Completion, body: GenerationRequest, header: dict) -> Response:
        async for _ in completion.generate():
            pass
        choices = [body.response_choice(choice) for choice in completion.choices.values()]
        return JSONResponse(header | {"choices": choices, "usage": completion.usage})

    async def _events(self, completion: Completion, body: GenerationRequest, header: dict) -> AsyncIterator[str]:
        include_usage = body.stream_options.include_usage

        def chunk(choices: list[dict], usage: dict | None = None) -> str:
            return _event(header | {"choices": choices} | ({"usage": usage} if include_usage else {}))

        try:
            for choice in completion.choices.values():
                start = body.stream_start(choice.index)
                if start:
                    yield chunk([start])
            async for choice, text in completion.generate():
                logprobs = choice.take_logprobs() if text or choice.finish_reason else []
                if text or logprobs:
                    yield chunk([body.stream_chunk(choice.index, text, logprobs)])
                for delta in choice.take_call_deltas():
                    yield chunk([body.stream_calls(choice.index, delta)])
                if choice.finish_reason:
                    yield chunk([body.stream_chunk(choice.index, "", [], choice.finish_reason)])
            if include_usage:
                yield chunk([], completion.usage)
            yield "data: [DONE]\n\n"
        except APIError as error:
            # The status was sent already.
            yield _event(error_body(error.status_code, error.detail))


def _event(content: dict) -> str:
    # In ASCII: some clients split lines at more characters than line feeds.
    return f"data: {json.dumps(content)}\n\n"
