"""The tokenizer's file under the name by which mistral-common knows its format: tokenizer.model.vN or tekken.json.

mistral-inference wants exactly one of these in a directory, and renders conversations as its version says.
"""

import logging

from minorca.data.tekken import TekkenTokenizer
from minorca.data.tokenizer import SentencePieceTokenizer, Tokenizer
from minorca.errors import UserError

log = logging.getLogger(__name__)

TEKKEN, SENTENCEPIECE = "tekken.json", "tokenizer.model"
# Tells tokenizers apart. Without runs of spaces, which tokenizer.json may split otherwise.
SAMPLE = "Two words, naïve 日本語 🦜\ndef f(x):\n return x ** 2 + 1234567890 # it's"


def with_mistral_tokenizer(files: dict[str, bytes], tok: Tokenizer, template: str | None) -> dict[str, bytes]:
    """A directory's files with one tokenizer in a format of Mistral's; what its readers would do otherwise is logged.

    Args:
        files: of `portable_files`, by name.
        tok: the tokenizer in use, of which they are.
        template: the resolved name of the chat template.
    """
    ours = sorted(name for name in files if name == TEKKEN or name.startswith(SENTENCEPIECE))
    others = {name: content for name, content in files.items() if name not in ours}
    if not ours:
        message = (
            "no tokenizer for Mistral's readers: %s cannot be written as %s or %s, only Hugging Face's will find it"
        )
        log.warning(message, tok.file.name, SENTENCEPIECE, TEKKEN)
        return others
    found = tok.file.name if tok.file.name in ours else TEKKEN if TEKKEN in ours else ours[-1]
    written = TEKKEN if found == TEKKEN else _versioned_name(found, tok, template)
    _warn_of_differences(tok, found, written, template)
    return others | {written: files[found]}


def _versioned_name(found: str, tok: Tokenizer, template: str | None) -> str:
    """The name whose version writes conversations as the template does, where it is one of Mistral's."""
    version = found.removeprefix(SENTENCEPIECE)
    if version not in ("", ".v1", ".v2", ".v3"):
        return found
    # what `auto` makes of both
    if version == ".v2" and template == "mistral-v3":
        return found
    if template and template.startswith("mistral-"):
        return f"{SENTENCEPIECE}.{template.removeprefix('mistral-')}"
    # an unversioned file is of v1, or of v3 where Hugging Face's repositories rename it
    return found if version else f"{SENTENCEPIECE}.{'v3' if '[INST]' in tok.control_ids else 'v1'}"


def _warn_of_differences(tok: Tokenizer, found: str, written: str, template: str | None) -> None:
    file = tok.path / found
    try:
        theirs = TekkenTokenizer(file, {}) if found == TEKKEN else SentencePieceTokenizer(file, {})
    except UserError as error:
        log.warning("%s is written as it is, not compared with %s: %s", written, tok.file.name, error)
        return
    size = theirs.pieces if isinstance(theirs, SentencePieceTokenizer) else theirs.vocab_size
    if lost := sorted(token for token, i in tok.control_ids.items() if i >= size):
        log.warning("%s lacks %s, which Mistral's readers will not know", written, ", ".join(lost[:5]))
    if theirs.encode(SAMPLE) != tok.encode(SAMPLE):
        log.warning("%s gives other ids to text than %s, which is the model's", written, tok.file.name)
    if template and not template.startswith("mistral-"):
        log.warning("the model's chat template is %s; Mistral's readers write [INST] instead", template)
