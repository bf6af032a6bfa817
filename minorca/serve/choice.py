"""From the engine's tokens to a choice: its text, finish reason and log-probabilities."""

from dataclasses import dataclass

from minorca.data.tokenizer import Tokenizer
from minorca.generate.request import Token
from minorca.generate.text_stream import TextStream
from minorca.serve.call_reader import Call, CallReader

# OpenAI's value for smaller ones: JSON has no infinity.
MIN_LOGPROB = -9999.0


@dataclass
class TokenLogprob:
    """A token's text, where in the choice's text it starts, its log-probability, and the most likely alternatives."""

    text: str
    offset: int
    logprob: float
    top: list[tuple[str, float]]


class Choice:
    """One of the choices of a completion, as it is generated.

    Args:
        index: among the choices of the completion.
        stop: strings that end the text.
        continues: as `TextStream` takes it.

    Attributes:
        reader: what finds calls of tools in the text; None: it has none.
    """

    def __init__(self, index: int, tok: Tokenizer, stop: list[str], continues: bool = False):
        self.index = index
        self.tokens = 0
        self.finish_reason: str | None = None
        self.reader: CallReader | None = None
        self._content: list[str] = []
        self._tok = tok
        self._stream = TextStream(tok, stop, continues)
        # Decodes without stop strings, for the offsets of tokens.
        self._unstopped = TextStream(tok, continues=continues)
        self._length = 0
        self._logprobs: list[TokenLogprob] = []
        # Tokenizers drop a space at the start of a text, so tokens after the first are decoded after those of a letter.
        self._context: list[int] = []
        self._context_length = 0

    @property
    def text(self) -> str:
        return self._stream.text

    @property
    def content(self) -> str:
        """The text without calls."""
        return "".join(self._content)

    @property
    def calls(self) -> list[Call]:
        return self.reader.calls if self.reader else []

    def take_call_deltas(self) -> list[dict]:
        """As `CallReader.take_deltas`."""
        return self.reader.take_deltas() if self.reader else []

    def push(self, token: Token) -> str:
        """Adds the next token; returns the new content. A stop id has no text and ends it like a stop string."""
        self.tokens += 1
        new = ""
        if token.finish_reason != "stop":
            self._add_logprob(token)
            new = self._stream.push(token.id)
        if token.finish_reason:
            new += self._stream.finish()
        self.finish_reason = "stop" if self._stream.stopped else token.finish_reason
        if self.reader:
            new = self.reader.push(token.id, new, self.finish_reason is not None)
            if self.reader.is_complete and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        self._content.append(new)
        return new

    def take_logprobs(self) -> list[TokenLogprob]:
        """Returns, once each, the tokens whose text has been returned at least in part.

        At the end these are all tokens, except for those behind the start of a stop string.
        """
        is_complete = self.finish_reason and not self._stream.stopped
        end = self._length + 1 if is_complete else len(self.text)
        taken = [logprob for logprob in self._logprobs if logprob.offset < end]
        self._logprobs = self._logprobs[len(taken) :]
        return taken

    def _add_logprob(self, token: Token) -> None:
        if token.logprob is None or token.top is None:
            return
        top = [(self._decode(i), _clamp(value)) for i, value in token.top]
        self._logprobs.append(TokenLogprob(self._decode(token.id), self._length, _clamp(token.logprob), top))
        self._length += len(self._unstopped.push(token.id))
        if not self._context:
            self._context = self._tok.encode("a")
            self._context_length = len(self._tok.decode(self._context))

    def _decode(self, token: int) -> str:
        return self._tok.decode([*self._context, token])[self._context_length :]


def _clamp(logprob: float) -> float:
    # In this order NaN becomes MIN_LOGPROB too.
    return max(MIN_LOGPROB, logprob)
