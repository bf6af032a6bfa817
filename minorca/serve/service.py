"""How a request for text becomes requests to the engine, and their tokens a response."""

import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from fastapi import Request as HTTPRequest
from fastapi import Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from minorca.data.tokenizer import Tokenizer
from minorca.errors import UserError
from minorca.files.safe_io import quote
from minorca.generate.request import Request
from minorca.serve.choice import Choice, TokenTexts
from minorca.serve.engine_thread import Completion, EngineThread
from minorca.serve.errors import APIError, error_body
from minorca.serve.fields import MAX_PROMPTS
from minorca.serve.http import EventStream, cancel_on_disconnect
from minorca.serve.protocol import GenerationRequest
from minorca.serve.tokenization import DetokenizeRequest, TokenizeRequest

# Log-probabilities in one response, some 100 bytes each.
MAX_LOGPROB_ENTRIES = 2**21
# The fields of the engine's requests that clients set by other names than the prompt's.
ENGINE_FIELDS = {"logit_bias": "logit_bias", "stop_ids": "stop_token_ids"}


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

    @property
    def base(self) -> str:
        """The name of the base model."""
        return next(name for name, model in self.models.items() if model.adapter is None)

    def describe_model(self, name: str) -> dict:
        """OpenAI's object for a model, with vLLM's fields.

        Raises:
            APIError: there is no such model.
        """
        model = self._find_model(name)
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "minorca",
            "root": self.base,
            "parent": None if model.adapter is None else self.base,
            "max_model_len": self.thread.engine.max_length,
        }

    async def tokenize(self, body: TokenizeRequest) -> dict:
        """vLLM's object with the ids of a text or conversation, which may have as many as a prompt."""
        body.check()
        model = self._find_model(body.model or self.base)
        max_length = self.thread.engine.max_length
        self._check_characters(body.characters, body.prompt_field, model)
        with _prompt_errors(body.prompt_field):
            ids = await run_in_threadpool(body.encode_prompt, model.tok, model.template, max_length)
        self._check_count(len(ids), body.prompt_field)
        return {"count": len(ids), "max_model_len": max_length, "tokens": ids, "token_strs": None}

    async def detokenize(self, body: DetokenizeRequest) -> dict:
        """vLLM's object with the text of ids, which may be as many as a prompt's."""
        model = self._find_model(body.model or self.base)
        self._check_count(len(body.tokens), "tokens")
        _check_ids(body.tokens, model.tok.vocab_size, "tokens")
        return {"prompt": await run_in_threadpool(body.decode, model.tok)}

    async def respond(self, http_request: HTTPRequest, body: GenerationRequest) -> Response:
        """Generates all choices of a request, and responds with JSON or a stream of events.

        Raises:
            APIError: the request cannot be served.
        """
        model = self._find_model(body.model)
        choices = self._make_choices(body, model)
        with contextlib.ExitStack() as stack:
            completion = stack.enter_context(Completion(self.thread, choices))
            # In a worker thread: templates and tokenizers may be slow.
            completion.prompt_tokens = await run_in_threadpool(self._set_prompts, body, model, choices)
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

    def _find_model(self, name: str) -> Model:
        if name not in self.models:
            expected = ", ".join(self.models)
            raise APIError(404, f"model is {quote(name)}; expected one of {expected}", "model", "model_not_found")
        return self.models[name]

    def _check_characters(self, characters: int, field: str, model: Model) -> None:
        """Raises APIError for a text that is too long whatever its tokens are, before any time is spent on it."""
        max_length = self.thread.engine.max_length
        if characters > max_length * model.tok.longest:
            raise APIError(
                400,
                f"{characters} characters exceed the maximum length of {max_length} tokens, which have at most "
                f"{model.tok.longest} characters each",
                field,
                "context_length_exceeded",
            )

    def _check_count(self, tokens: int, field: str) -> None:
        max_length = self.thread.engine.max_length
        if tokens > max_length:
            message = f"{tokens} tokens exceed the maximum length of {max_length}"
            raise APIError(400, message, field, "context_length_exceeded")

    def _make_choices(self, body: GenerationRequest, model: Model) -> dict[Request, Choice]:
        """The choices and the engine's request for each, without its prompt."""
        if body.num_choices > MAX_PROMPTS:
            raise APIError(400, f"{body.num_choices} choices were requested; expected at most {MAX_PROMPTS}", "n")
        _check_ids(body.stop_token_ids, self.thread.engine.vocab_size, "stop_token_ids")
        texts = TokenTexts(model.tok)
        stop_ids = {*body.stop_token_ids, *([] if body.ignore_eos else model.tok.stop_ids)}
        return {
            Request(
                [],
                sampling=body.sampling,
                stop_ids=stop_ids,
                adapter=model.adapter,
                logprobs=body.logprobs_count,
                sample=i % body.n,
                min_new_tokens=body.min_tokens,
                prompt_logprobs=body.prompt_logprobs_count,
            ): Choice(i, model.tok, texts, body.stop, body.continues, body.min_tokens, body.scores_stop_ids)
            for i in range(body.num_choices)
        }

    def _set_prompts(self, body: GenerationRequest, model: Model, choices: dict[Request, Choice]) -> int:
        """Sets and checks the requests' prompts and limits; returns the number of prompt tokens."""
        self._check_characters(body.characters, body.prompt_field, model)
        grammar = body.compile_grammar(model.tok, model.template)
        with _prompt_errors(body.prompt_field):
            prompts = body.encode_prompts(model.tok, model.template, self.thread.engine.max_length)
            for i, (request, choice) in enumerate(choices.items()):
                request.prompt = prompts[i // body.n]
                request.grammar = grammar
                self._set_limit(body, request)
                # Those of one prompt differ in nothing that is checked.
                if i % body.n == 0:
                    self.thread.engine.check(request)
                    echo = body.make_echo(i // body.n, model.tok, request.prompt)
                choice.echo = echo
        self._check_logprobs(body, choices)
        return sum(map(len, prompts))

    def _set_limit(self, body: GenerationRequest, request: Request) -> None:
        rest = self.thread.engine.max_length - len(request.prompt)
        limit = body.max_new_tokens
        if limit is None:
            limit = max(1, min(rest, body.default_new_tokens or rest))
        request.max_new_tokens = limit
        if limit == 0 and request.prompt_logprobs is None:
            raise APIError(400, "max_tokens is 0; expected at least 1, or echo: true", "max_tokens")
        if limit > rest:
            raise APIError(
                400,
                f"{len(request.prompt)} prompt tokens and {limit} new tokens exceed the maximum length of "
                f"{self.thread.engine.max_length}",
                body.max_new_tokens_field if rest > 0 else body.prompt_field,
                "context_length_exceeded",
            )
        if body.min_tokens > limit:
            raise APIError(400, f"min_tokens is {body.min_tokens}; the maximum is {limit}", "min_tokens")

    def _check_logprobs(self, body: GenerationRequest, choices: dict[Request, Choice]) -> None:
        entries = 0
        for request in choices:
            for tokens, count in (
                (request.max_new_tokens, request.logprobs),
                (len(request.prompt), request.prompt_logprobs),
            ):
                entries += 0 if count is None else tokens * (1 + count)
        if entries > MAX_LOGPROB_ENTRIES:
            raise APIError(
                400,
                f"{entries} log-probabilities may be returned; expected at most {MAX_LOGPROB_ENTRIES}: ask for fewer "
                f"alternatives, choices or prompts, or set {body.max_new_tokens_field}",
                "logprobs" if body.prompt_logprobs is None else "prompt_logprobs",
            )

    async def _complete(self, completion: Completion, body: GenerationRequest, header: dict) -> Response:
        async for _ in completion.generate():
            pass

        def make_response() -> Response:
            choices = [body.response_choice(choice, request.prompt) for request, choice in completion.choices.items()]
            request, choice = next(iter(completion.choices.items()))
            content = header | {"choices": choices, "usage": completion.usage}
            return JSONResponse(content | body.response_fields(choice, request.prompt))

        # Many log-probabilities take long to write.
        has_many = body.logprobs_count is not None or body.prompt_logprobs_count is not None
        return await run_in_threadpool(make_response) if has_many else make_response()

    async def _events(self, completion: Completion, body: GenerationRequest, header: dict) -> AsyncIterator[str]:
        options = body.stream_options

        def chunk(choices: list[dict]) -> str:
            usage = {}
            if options.include_usage or options.continuous_usage_stats:
                usage = {"usage": completion.usage if options.continuous_usage_stats else None}
            return _event(header | {"choices": choices} | usage)

        def chunks(choice: Choice, text: str) -> list[str]:
            logprobs = choice.take_logprobs() if text or choice.finish_reason else []
            events = []
            if text or logprobs:
                events.append(chunk([body.stream_chunk(choice.index, text, logprobs)]))
            events += [chunk([body.stream_calls(choice.index, delta)]) for delta in choice.take_call_deltas()]
            if choice.finish_reason:
                events.append(chunk([body.stream_chunk(choice.index, "", [], choice.finish_reason)]))
            return events

        try:
            for choice in completion.choices.values():
                start = body.stream_start(choice.index)
                if start:
                    yield chunk([start])
            async for choice, text in completion.generate():
                # The log-probabilities of a long prompt take long to write.
                is_slow = choice.has_prompt_to_score
                for event in await run_in_threadpool(chunks, choice, text) if is_slow else chunks(choice, text):
                    yield event
            if options.include_usage:
                yield _event(header | {"choices": [], "usage": completion.usage})
            yield "data: [DONE]\n\n"
        except APIError as error:
            # The status was sent already.
            yield _event(error_body(error.status_code, error.detail))


def _check_ids(ids: list[int], vocab_size: int, field: str) -> None:
    if not all(0 <= i < vocab_size for i in ids):
        raise APIError(400, f"{field} has ids outside the vocabulary of {vocab_size}", field)


@contextlib.contextmanager
def _prompt_errors(field: str) -> Iterator[None]:
    """What is wrong with a prompt or a request to the engine, as an error of a field."""
    try:
        yield
    except UserError as error:
        # Without the path, which clients should not see.
        message = "; ".join(problem.sentence for problem in error.problems)
        raise APIError(400, message, ENGINE_FIELDS.get(error.problems[0].field or "", field)) from None


def _event(content: dict) -> str:
    # In ASCII: some clients split lines at more characters than line feeds.
    return f"data: {json.dumps(content)}\n\n"
