"""Mixes of adapters, such as "a:0.7+b:0.3": how a name is read, and which mixes are in use."""

import collections
import dataclasses
import math
import re
import threading
from collections.abc import Callable

from veratune.errors import ConfigError
from veratune.serving.names import AdapterRef, Key

MAX_PARTS = 8
_MAX_CHARACTERS = 2300  # 8 parts with the longest names
_WEIGHT = re.compile(r"[+-]?([0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9})")
_MAX_MIXES = 4096


@dataclasses.dataclass(frozen=True)
class MixKey:
    """The key of a mix in the adapter pools and in the prefix cache.

    Attributes:
        parts: Key of each part's version, and its weight.
    """

    parts: tuple[tuple[Key, float], ...]

    def has(self, tenant: str, name: str) -> bool:
        """Whether an adapter is a part."""
        return any(key[:2] == (tenant, name) for key, _ in self.parts)


@dataclasses.dataclass(frozen=True)
class MixRef:
    """Stored adapters that a request mixes.

    Attributes:
        parts: Each adapter, and its weight.
    """

    parts: tuple[tuple[AdapterRef, float], ...]

    @property
    def key(self) -> MixKey:
        """The key of these versions with these weights."""
        return MixKey(tuple((ref.key, weight) for ref, weight in self.parts))

    @property
    def created(self) -> float:
        """When the newest part was stored, in seconds since 1970."""
        return max(ref.version.created for ref, _ in self.parts)


def is_mix(model: str) -> bool:
    """Whether a model's name is one of a mix: adapters' names have neither colon nor plus."""
    return ":" in model or "+" in model


def parse_mix(model: str) -> list[tuple[str, float]]:
    """Read the name of a mix.

    Args:
        model: NAME:WEIGHT, several joined by "+"; NAME may be TENANT/NAME.

    Returns:
        (name, weight) of each part.

    Raises:
        ConfigError: It is no such name, is too long, or a weight is no decimal number.
    """
    if len(model) > _MAX_CHARACTERS:
        raise ConfigError(
            f"model: a mix's name has {len(model):,} characters; {_MAX_CHARACTERS:,} are taken"
        )
    texts = model.split("+")
    if len(texts) > MAX_PARTS:
        raise ConfigError(f"model: a mix of {len(texts)} adapters; {MAX_PARTS} are taken")
    parts = []
    for text in texts:
        name, colon, weight = text.rpartition(":")
        if not name or not colon or not _WEIGHT.fullmatch(weight):
            raise ConfigError(
                f"model: {text[:200]!r} is no part of a mix; NAME:WEIGHT is wanted, as in "
                "house:0.7+style:0.3"
            )
        parts.append((name, float(weight)))
    assert all(math.isfinite(weight) for _, weight in parts)
    return parts


class MixIndex:
    """The mixes that were used last. A mix is forgotten when a part has another version, when a
    part is deleted, or when many others were used since.

    Args:
        forget: Takes a mix out of memory.
    """

    def __init__(self, forget: Callable[[MixKey], None]) -> None:
        self._forget = forget
        self._keys: collections.OrderedDict[MixKey, MixKey] = collections.OrderedDict()
        self._lock = threading.Lock()

    def use(self, key: MixKey) -> None:
        """Note that a mix is used, and forget the one of older versions."""
        # The same mix with other versions has the same entry.
        unversioned = MixKey(tuple(((t, n, 0), weight) for (t, n, _), weight in key.parts))
        old = []
        with self._lock:
            before = self._keys.get(unversioned)
            if before is not None and before != key:
                old.append(before)
            self._keys[unversioned] = key
            self._keys.move_to_end(unversioned)
            while len(self._keys) > _MAX_MIXES:
                old.append(self._keys.popitem(last=False)[1])
        for mix in old:
            self._forget(mix)

    def forget_part(self, tenant: str, name: str) -> None:
        """Forget every mix that has an adapter as a part."""
        with self._lock:
            found = [entry for entry in self._keys.items() if entry[0].has(tenant, name)]
            for unversioned, _ in found:
                del self._keys[unversioned]
        for _, mix in found:
            self._forget(mix)
