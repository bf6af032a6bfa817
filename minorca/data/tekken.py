"""Mistral's own tekken.json, read by mistral-common, which is installed only where a model needs it."""

from pathlib import Path

from minorca.data.tokenizer import Tokenizer
from minorca.data.tokenizer_files import MAX_TOKENIZER_BYTES, library_errors
from minorca.errors import UserError
from minorca.files.safe_io import read_small


class TekkenTokenizer(Tokenizer):
    """`tekken.json`. Its special tokens have the lowest ids, and no text produces them.

    Raises:
        UserError: mistral-common is not installed, or cannot read the file.
    """

    def __init__(self, file: Path, settings: dict):
        try:
            from mistral_common.tokens.tokenizers.tekken import Tekkenizer
        except ImportError:
            raise UserError(
                "is read by mistral-common, which is not installed: pip install mistral-common, or copy the model's "
                "tokenizer.json beside it",
                path=file,
            ) from None
        # its size is checked before the library reads it
        read_small(file, MAX_TOKENIZER_BYTES)
        with library_errors(file):
            model = Tekkenizer.from_file(file)
            control_ids = {model.id_to_piece(i): i for i in range(model.num_special_tokens)}
            bos_id, eos_id = model.bos_id, model.eos_id
            longest = max(len(model.id_to_byte_piece(i)) for i in range(model.n_words))
        self._model = model
        super().__init__(file, settings, control_ids, model.n_words, longest, bos_id, eos_id)

    def _encode_text(self, text: str) -> list[int]:
        with library_errors(self.file):
            return self._model.encode(text, bos=False, eos=False)

    def _encode_template(self, text: str) -> list[int]:
        return self._encode_pieces(text)

    def token_id(self, token: str) -> int | None:
        # no text of a person is looked up among the others, which are bytes
        return self.control_ids.get(token)

    def decode(self, ids: list[int]) -> str:
        # Ids beyond the vocabulary are rows that pad the embedding, which an untrained model may well choose.
        with library_errors(self.file):
            return self._model.decode([i for i in ids if i < self.vocab_size])

    def _format_adds_bos(self) -> bool:
        # Every model of Mistral's was trained that way.
        return True
