"""From the engine's tokens to a choice: its text, finish reason and log-probabilities."""

from dataclasses import dataclass

from minorca.data.tokenizer import Tokenizer
from minorca.generate.request import PromptToken, Token
from minorca.generate.text_stream import TextStream
from minorca.serve.call_reader import Call, CallReader

# OpenAI's value for smaller ones: JSON has no infinity.
MIN_LOGPROB = -9999.0


@dataclass
class TokenLogprob:
    """A token's text, where in the choice's text it starts, its log-probability, and the most likely alternatives.

    The first token of a prompt has no log-probability."""

    text: str
    offset: int
    logprob: float | None
    top: list[tuple[str, float]]


class TokenTexts(dict[int, str]):
    """The text of each id by itself, decoded when it is first asked for; control tokens are their strings."""

    def __init__(self, tok: Tokenizer):
        super().__init__()
        self._tok = tok
        self._names: dict[int, str] = {}
        # Tokenizers drop a space at the start of a text, so ids are decoded after those of a letter.
        self._context: list[int] = []
        self._context_length = 0

    def __missing__(self, i: int) -> str:
        if not self._context:
            self._names = {i: name for name, i in self._tok.control_ids.items()}
            self._context = self._tok.encode("a")
            self._context_length = len(self._tok.decode(self._context))
        text = self._names.get(i)
        if text is None:
            text = self._tok.decode([*self._context, i])[self._context_length :] if i < self._tok.vocab_size else ""
        self[i] = text
        return text


@dataclass
class Echo:
    """A prompt that a choice's text starts with.

    Args:
        offsets: where in `text` each id starts; empty unless log-probabilities are asked for.
    """

    text: str
    ids: list[int]
    offsets: list[int]


class Choice:
    """One of the choices of a completion, as it is generated.

    Args:
        index: among the choices of the completion.
        texts: of the tokenizer, shared by the choices.
        stop: strings that end the text.
        continues: as `TextStream` takes it.
        min_tokens: the number of tokens in whose text no stop string is looked for.
        scores_stop_id: whether the log-probabilities are also of a stop id at the end, which has no text.

    Attributes:
        echo: what the text starts with, to be set before the first token; None: nothing.
        prompt: `Token.prompt` of the first token.
        reader: what finds calls of tools in the text; None: it has none.
    """

    def __init__(
        self,
        index: int,
        tok: Tokenizer,
        texts: TokenTexts,
        stop: list[str],
        continues: bool = False,
        min_tokens: int = 0,
        scores_stop_id: bool = False,
    ):
        self.index = index
        self.tokens = 0
        self.finish_reason: str | None = None
        self.echo: Echo | None = None
        self.prompt: list[PromptToken] | None = None
        self.texts = texts
        self.reader: CallReader | None = None
        self._content: list[str] = []
        self._tok = tok
        self._options = (stop, continues, min_tokens)
        self._scores_stop_id = scores_stop_id
        # Made with the first token: a completion may have thousands of choices. The second decodes without stop
        # strings, for the offsets of tokens.
        self._stream: TextStream | None = None
        self._unstopped: TextStream | None = None
        self._text = ""
        self._stopped = False
        self._length = 0
        self._logprobs: list[TokenLogprob] = []
        self._echo_is_scored = False

    @property
    def text(self) -> str:
        return self._text + (self._stream.text if self._stream else "")

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
        new = ""
        if self._stream is None:
            new = self._start(token)
        stream = self._stream
        assert stream is not None
        self.tokens += token.id >= 0
        if token.id >= 0 and (token.finish_reason != "stop" or self._scores_stop_id):
            self._add_logprob(token)
        if token.id >= 0 and token.finish_reason != "stop":
            new += stream.push(token.id)
        if token.finish_reason:
            new += stream.finish()
        self._stopped = stream.stopped
        self.finish_reason = "stop" if stream.stopped else token.finish_reason
        if self.reader:
            new = self.reader.push(token.id, new, self.finish_reason is not None)
            if self.reader.is_complete and self.finish_reason == "stop":
                self.finish_reason = "tool_calls"
        self._content.append(new)
        if self.finish_reason:
            self._text, self._stream, self._unstopped = self.text, None, None
        return new

    def _start(self, token: Token) -> str:
        stop, continues, min_tokens = self._options
        self._stream = TextStream(self._tok, stop, continues, min_tokens)
        self.prompt = token.prompt
        if self.echo:
            self._text = self.echo.text
            self._length = len(self._text)
        return self._text

    def take_logprobs(self) -> list[TokenLogprob]:
        """Returns, once each, the tokens whose text has been returned at least in part, an echoed prompt's first.

        At the end these are all tokens, except for those behind the start of a stop string.
        """
        is_complete = self.finish_reason and not self._stopped
        end = self._length + 1 if is_complete else len(self.text)
        taken = [logprob for logprob in self._logprobs if logprob.offset < end]
        self._logprobs = self._logprobs[len(taken) :]
        return self._score_echo() + taken

    @property
    def has_prompt_to_score(self) -> bool:
        """Whether `take_logprobs` will return a prompt's tokens, which may take long."""
        return bool(self.echo and self.echo.offsets and self.prompt is not None and not self._echo_is_scored)

    def _score_echo(self) -> list[TokenLogprob]:
        if not self.has_prompt_to_score:
            return []
        assert self.echo and self.prompt is not None
        self._echo_is_scored = True
        first, *others = zip(self.echo.ids, self.echo.offsets)
        return [TokenLogprob(self.texts[first[0]], 0, None, [])] + [
            self._logprob(i, offset, score.logprob, score.top) for (i, offset), score in zip(others, self.prompt)
        ]

    def _add_logprob(self, token: Token) -> None:
        if token.logprob is None or token.top is None:
            return
        self._logprobs.append(self._logprob(token.id, self._length, token.logprob, token.top))
        if self._unstopped is None:
            self._unstopped = TextStream(self._tok, continues=self._options[1])
        self._length += len(self._unstopped.push(token.id))

    def _logprob(self, i: int, offset: int, logprob: float, top: list[tuple[int, float]]) -> TokenLogprob:
        alternatives = [(self.texts[other], clamp_logprob(value)) for other, value in top]
        return TokenLogprob(self.texts[i], offset, clamp_logprob(logprob), alternatives)


def clamp_logprob(logprob: float) -> float:
    # In this order NaN becomes MIN_LOGPROB too.
    return max(MIN_LOGPROB, logprob)
