"""Target: the model, adapter or mix that one request is for."""

import dataclasses
from collections.abc import Callable
from typing import TypedDict

from veratune.adapter import Adapter
from veratune.serving.mixes import MixKey
from veratune.serving.names import Key


class RequestFields(TypedDict, total=False):
    """Return the request fields that come from the caller and the model's name."""

    tenant: str
    key: Key | MixKey
    load: Callable[[], Adapter]


@dataclasses.dataclass(frozen=True)
class Target:
    """What a model's name stands for in one request.

    Attributes:
        model: The name that the response gives.
        fields: Fields of the engine's requests.
        system: System message for a conversation without one; "" for none.
    """

    model: str
    fields: RequestFields
    system: str = ""
