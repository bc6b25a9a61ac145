"""StrictBody and ApiBody: what all request bodies have in common.

Null means not given, as OpenAI's clients have it. Bodies of the OpenAI API ignore unknown fields,
because its clients send new ones every few months; the context logs each name once. Bodies of this
server's own calls refuse them.
"""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class StrictBody(BaseModel):
    """A JSON body without unknown fields."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """Drop null fields, and refuse text that cannot be encoded."""
        if not isinstance(data, dict):
            return data
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                "half of a surrogate pair is no text; valid Unicode is wanted"
            ) from None
        except RecursionError:
            raise ValueError("too many levels") from None
        return {key: value for key, value in data.items() if value is not None}


class ApiBody(StrictBody):
    """A JSON body of the OpenAI API: unknown fields are ignored."""

    model_config = ConfigDict(extra="allow")
