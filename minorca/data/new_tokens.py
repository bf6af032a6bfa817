"""Tokens that a run adds to its model's vocabulary: which, and how the tokenizer's files name them."""

import json

from tokenizers import AddedToken

from minorca.config import Config
from minorca.data.chat_template import resolve_template
from minorca.data.tokenizer import JsonTokenizer, Tokenizer, load_tokenizer
from minorca.data.tokenizer_files import added_tokens, read_settings
from minorca.errors import UserError, raise_problems

# what template chatml adds to a tokenizer that lacks it, in the order of Mistral-7B-OpenOrca's ids
_CHATML_TOKENS = ("<|im_end|>", "<|im_start|>")


def training_tokenizer(config: Config) -> tuple[Tokenizer, str]:
    """The model's tokenizer with the tokens that a run adds, and the resolved name of the template of its rows.

    Raises:
        UserError: a token that the tokenizer has already, a tokenizer of a kind that takes no more, or a template that
            it cannot write.
    """
    tok = load_tokenizer(config.model.path)
    tokens = config.train.new_tokens
    ids = {token: tok.token_id(token) for token in tokens}
    raise_problems(
        UserError(f"has {token!r}, which is a token already, id {i}; leave it out", field="train.new_tokens")
        for token, i in ids.items()
        if i is not None
    )
    if config.data.template == "chatml":
        missing = (token for token in _CHATML_TOKENS if tok.token_id(token) is None)
        tokens = list(dict.fromkeys([*tokens, *missing]))
    if tokens:
        tok = load_tokenizer(config.model.path, tuple(tokens))
    return tok, resolve_template(tok, config.data.template)


def new_ids(tok: Tokenizer) -> range:
    """The ids of its new tokens, the last that it has."""
    return range(tok.vocab_size - len(tok.new_tokens), tok.vocab_size)


def name_new_tokens(tok: Tokenizer, files: dict[str, bytes], config: dict) -> None:
    """Puts a tokenizer's new tokens into its files, and into the settings that tokenizer_config.json will hold."""
    if not tok.new_tokens:
        return
    new = zip(new_ids(tok), (AddedToken(token, normalized=False, special=True) for token in tok.new_tokens))
    if isinstance(tok, JsonTokenizer):
        # with those that only the settings beside it name
        added = tok.added_tokens()
        values = json.loads(files["tokenizer.json"])
        values["added_tokens"] = [{"id": i, **_properties(token)} for i, token in sorted(added.items())]
        files["tokenizer.json"] = json.dumps(values, ensure_ascii=False, indent=2).encode()
    else:
        added = {i: token for _, i, token in added_tokens(tok.path, read_settings(tok.path))} | dict(new)
    if config.get("added_tokens_decoder") or not isinstance(tok, JsonTokenizer):
        # where there is one, added_tokens.json is not read
        config["added_tokens_decoder"] = {str(i): _properties(token) for i, token in sorted(added.items())}


def _properties(token: AddedToken) -> dict:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"content": token.content} | {flag: getattr(token, flag) for flag in flags}
