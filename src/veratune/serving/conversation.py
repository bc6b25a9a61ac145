"""What an adapter file says of conversations: its system message, and its chat template.

An adapter is trained with both, so a server that leaves one out would silently give other
completions than those of training.
"""

import collections
import logging
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from veratune.adapter import Adapter
from veratune.errors import UnsupportedError
from veratune.tasks.base import TEMPLATE_HASH
from veratune.tasks.text.chat_template import template_hash

log = logging.getLogger(__name__)
_CACHED_CHARACTERS = 2**22  # of system messages
_CACHED_ADAPTERS = 2**14


def check_conversation(task: Mapping[str, Any], template: str | None, max_characters: int) -> str:
    """Check an adapter's conversation settings and return its system message; "" for none.

    Args:
        task: The adapter's task metadata.
        template: The base model's chat template; None without one.
        max_characters: Longest system message.

    Raises:
        UnsupportedError: The adapter was trained with another chat template, or its system message
            is longer than this server's prompts.
    """
    own = task.get("chat_template")
    if own and own != template:
        raise UnsupportedError(
            "the adapter was trained with a chat template of its own, which this server does not "
            "run: put that template into the base model's folder and start the server with it"
        )
    seen = task.get(TEMPLATE_HASH)
    if seen and not own and seen != template_hash(template):
        raise UnsupportedError(
            "the adapter was trained with another chat template than this server's base model has; "
            "serve it with the base model and the tokenizer that it was trained with"
        )
    system = task.get("system") or ""
    if not isinstance(system, str):
        raise UnsupportedError(
            f"the adapter's system message is a {type(system).__name__}; text is wanted"
        )
    if len(system) > max_characters:
        raise UnsupportedError(
            f"the adapter's system message has {len(system):,} characters; "
            f"{max_characters:,} fit into a prompt here"
        )
    return system


class SystemMessages:
    """The system messages of adapters, read from their files once.

    Args:
        template: The base model's chat template.
        max_characters: Longest system message.
    """

    def __init__(self, template: str | None, max_characters: int) -> None:
        self.template, self.max_characters = template, max_characters
        self._messages: collections.OrderedDict[Hashable, str] = collections.OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def check(self, adapter: Adapter) -> str:
        """Return the system message of an adapter; raises UnsupportedError as `get`."""
        return check_conversation(adapter.task, self.template, self.max_characters)

    def get(self, key: Hashable, load: Callable[[], Adapter]) -> str:
        """Return the system message of an adapter; "" for none.

        Args:
            key: Of one version of the adapter.
            load: Reads it.

        Raises:
            UnsupportedError: As `check_conversation`.
        """
        with self._lock:
            if key in self._messages:
                self._messages.move_to_end(key)
                return self._messages[key]
        message = self.check(load())
        if message:
            log.info(
                "adapter %s: its system message (%d characters) begins conversations without one",
                key,
                len(message),
            )
        with self._lock:
            if key not in self._messages:
                self._messages[key] = message
                self._size += len(message)
            while self._size > _CACHED_CHARACTERS or len(self._messages) > _CACHED_ADAPTERS:
                self._size -= len(self._messages.popitem(last=False)[1])
        return message
