"""The ids and loss masks that others give the corpus's rows: transformers, mistral-common, sentencepiece.

A loss mask is a list of booleans, one a token. The first token is never trained: it has no token before it.
"""

from pathlib import Path
from typing import Any

from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from tests.corpus.case import Chat, Completion, Row, Text

Rendered = tuple[list[int], list[bool]]


class Transformers:
    """The tokenizer of a directory, with its template, which marks answers."""

    def __init__(self, directory: Path):
        self.tok = AutoTokenizer.from_pretrained(directory)

    def __call__(self, row: Row) -> Rendered:
        if isinstance(row, Chat):
            ids, mask = self._chat(row)
        elif isinstance(row, Text):
            ids = self._whole(row.text)[row.start : row.end]
            mask = [True] * len(ids)
        else:
            ids, mask = self._completion(row)
        return ids, [False, *mask[1:]]

    def _chat(self, row: Chat) -> Rendered:
        def apply(messages: list[dict], **options) -> dict:
            return self.tok.apply_chat_template(messages, tools=row.tools or None, return_dict=True, **options)

        whole = apply(row.messages, return_assistant_tokens_mask=True)
        mask = [bool(trained) for trained in whole["assistant_masks"]]
        for i in row.excluded:
            end = len(apply(row.messages[: i + 1])["input_ids"])
            start = len(apply(row.messages[:i])["input_ids"]) if i else 0
            mask[start:end] = [False] * (end - start)
        return whole["input_ids"], mask

    def _completion(self, row: Completion) -> Rendered:
        """As TRL's SFTTrainer does: the end is appended to the completion, and the prompt's tokens are not trained."""
        prompt = self._encode(row.prompt)
        ids = self._whole(row.prompt + row.completion)
        assert ids[: len(prompt)] == prompt
        return ids, [False] * len(prompt) + [True] * (len(ids) - len(prompt))

    def _whole(self, text: str) -> list[int]:
        """The ids of a text with its end."""
        return self._encode(text if text.endswith(self.tok.eos_token) else text + self.tok.eos_token)

    def _encode(self, text: str) -> list[int]:
        """The ids of a text with one bos."""
        return self.tok(text, add_special_tokens=not text.startswith(self.tok.bos_token))["input_ids"]


class MistralCommon:
    """Mistral's own tokenizer, in the mode that takes conversations ending in either role.

    The encoder of answers gives the tokens of each, with the `</s>` that ends it; nothing else in a conversation ends
    so.
    """

    def __init__(self, file: Path):
        self.tok = MistralTokenizer.from_file(str(file), mode=ValidationMode.agnostic)
        self.answers: list[list[int]] = []
        encoder: Any = self.tok.instruct_tokenizer
        encode = encoder.encode_assistant_message

        def recorded(*arguments, **options) -> list[int]:
            self.answers.append(encode(*arguments, **options))
            return self.answers[-1]

        encoder.encode_assistant_message = recorded

    def __call__(self, row: Chat) -> Rendered:
        self.answers.clear()
        request = ChatCompletionRequest.model_validate({"messages": row.messages, "tools": row.tools or None})
        ids = self.tok.encode_chat_completion(request).tokens
        mask = [False] * len(ids)
        answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        end = 0
        for n, answer in enumerate(self.answers):
            end = ids.index(2, end) + 1
            assert ids[end - len(answer) : end] == answer
            if not row.excluded or answers[n] not in row.excluded:
                mask[end - len(answer) : end] = [True] * len(answer)
        return ids, mask


class OpenOrca:
    """Mistral-7B-OpenOrca's ids, by the rule of axolotl's alpaca_w_system: each part encoded alone."""

    def __init__(self, file: Path):
        self.encode = SentencePieceProcessor(model_file=str(file)).encode

    def __call__(self, row: Chat) -> Rendered:
        ids, mask = [1], [False]

        def write(part: list[int], trained: bool = False) -> None:
            ids.extend(part)
            mask.extend([trained] * len(part))

        for i, message in enumerate(row.messages):
            role, content = message["role"], message["content"]
            if role == "assistant":
                write([32001, *self.encode("assistant\n")])
                write([*self.encode(content), 32000], i not in row.excluded)
            else:
                write([32001, *self.encode(f"{role}\n{content}"), 32000])
            write(self.encode("\n"))
        return ids, mask


class SentencePiece:
    """Text of which nothing is a control token."""

    def __init__(self, file: Path):
        self.encode = SentencePieceProcessor(model_file=str(file)).encode

    def __call__(self, row: Text) -> Rendered:
        ids = [1, *self.encode(row.text), 2][row.start : row.end]
        return ids, [False] + [True] * (len(ids) - 1)
