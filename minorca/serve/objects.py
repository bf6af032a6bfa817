"""What the JSON objects in the bodies of requests have in common."""

from itertools import islice

from pydantic import BaseModel, ConfigDict, model_validator

# Each unknown field is an error of its own, so not all of them are reported.
MAX_UNKNOWN_FIELDS = 10


class Object(BaseModel):
    """A JSON object without unknown fields; null is the same as an absent field."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data):
        if not isinstance(data, dict):
            return data
        names = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = (key for key in data if key not in names)
        known = {key: value for key, value in data.items() if key in names and value is not None}
        return known | dict.fromkeys(islice(unknown, MAX_UNKNOWN_FIELDS))
