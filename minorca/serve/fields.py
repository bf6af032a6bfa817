"""The types of fields in requests' bodies, and what becomes of fields that are unknown or cannot be served."""

import logging
import re
from collections.abc import Container
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import core_schema

from minorca.data.conversation import join_text_parts
from minorca.files.safe_io import quote

log = logging.getLogger(__name__)

# Of one message's text, and the prompts of one request; a body of 2 MiB could have hundreds of thousands.
MAX_PARTS = 1024
MAX_PROMPTS = 4096
MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
# Of `logit_bias` and `stop_token_ids`.
MAX_IDS = 1024
# Names of unknown fields that are logged, once each.
MAX_UNKNOWN_FIELDS = 100
MAX_NAME_LENGTH = 256

# Their names; None: it was logged that further ones are not.
_unknown_fields: set[str | None] = set()


class Unsupported:
    """Metadata of a field that cannot be served: it accepts only values that ask for nothing, or none at all."""

    def __init__(self, *values):
        self.values = values

    def _check(self, value):
        if value not in self.values:
            instead = f"leave it out or send {self.values[0]!r}" if self.values else "leave it out"
            raise ValueError(f"is not supported; {instead}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> dict:
        return {"enum": [*self.values, None]}


class Body(BaseModel):
    """A JSON object; null is the same as an absent field, and an unknown field is ignored with a warning in the log."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, data):
        names = {field.alias or name for name, field in cls.model_fields.items()}
        return keep_known(data, names) if isinstance(data, dict) else data


def keep_known(data: dict, names: Container[str]) -> dict:
    """The fields of an object that are among `names` and not null; of others a warning is logged, once for a name."""
    for name in data:
        if name not in names:
            _warn_of(name[:MAX_NAME_LENGTH])
    return {name: value for name, value in data.items() if name in names and value is not None}


def _warn_of(name: str) -> None:
    if name in _unknown_fields or len(_unknown_fields) > MAX_UNKNOWN_FIELDS:
        return
    if len(_unknown_fields) < MAX_UNKNOWN_FIELDS:
        _unknown_fields.add(name)
        log.warning("unknown field %s of a request is ignored", quote(name))
    else:
        _unknown_fields.add(None)
        log.warning("further unknown fields of requests are ignored without a warning")


class TextPart(Body):
    type: Literal["text"]
    text: str
    # Anthropic's, which some clients send to every server. No effect.
    cache_control: dict[str, Any] = {}


def read_content(value: Any) -> str:
    """A message's text: a string or a list of parts of text."""
    parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
    if len(parts) > MAX_PARTS:
        raise ValueError(f"expected at most {MAX_PARTS} parts")
    names = TextPart.model_fields.keys()
    known = [keep_known(part, names) if _is_text(part) else part for part in parts]
    return join_text_parts([{"type": "text", "text": part.get("text")} if _is_text(part) else part for part in known])


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text"


def read_stop(value: Any) -> list[str]:
    strings = [value] if isinstance(value, str) else value
    if (
        not isinstance(strings, list)
        or len(strings) > MAX_STOP_STRINGS
        or not all(isinstance(string, str) and 0 < len(string) <= MAX_STOP_LENGTH for string in strings)
    ):
        raise ValueError(
            f"expected a string or a list of up to {MAX_STOP_STRINGS}, of 1 to {MAX_STOP_LENGTH} characters each"
        )
    return strings


def read_prompt(value: Any) -> list[str] | list[list[int]]:
    if isinstance(value, str) or (value and is_ids(value)):
        return [value]
    is_list = isinstance(value, list) and 0 < len(value) <= MAX_PROMPTS
    if not is_list or not (all(isinstance(prompt, str) for prompt in value) or all(map(is_ids, value))):
        raise ValueError(f"expected a string, a list of token ids, or a list of up to {MAX_PROMPTS} of either")
    return value


def is_ids(value: Any) -> bool:
    # Not isinstance: a bool is an int.
    return isinstance(value, list) and set(map(type, value)) <= {int}


def read_stop_token_ids(value: Any) -> list[int]:
    if not is_ids(value) or len(value) > MAX_IDS:
        raise ValueError(f"expected a list of up to {MAX_IDS} token ids")
    return value


def read_logit_bias(value: Any) -> dict[int, float]:
    """What is added to the logits of ids, which are strings, as keys of JSON are."""
    if (
        not isinstance(value, dict)
        or len(value) > MAX_IDS
        or not all(re.fullmatch("[0-9]{1,10}", key) for key in value)
        or not all(type(bias) in (int, float) and -100 <= bias <= 100 for bias in value.values())
    ):
        raise ValueError(f"expected an object of up to {MAX_IDS} token ids with numbers from -100 to 100")
    return {int(key): float(bias) for key, bias in value.items()}
