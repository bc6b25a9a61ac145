"""API keys: which tenants a key may act for. Only hashes of keys are stored."""

import dataclasses
import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path

from veratune.errors import ConfigError, InvalidNameError
from veratune.formats.atomic import write_atomic
from veratune.serving.names import check_not_auto
from veratune.serving.store.base import check_name

log = logging.getLogger(__name__)
PREFIX = "vt-"


@dataclasses.dataclass(frozen=True)
class Caller:
    """The holder of a key.

    Attributes:
        tenants: Whose adapters the key may use and change.
    """

    tenants: tuple[str, ...]

    @property
    def tenant(self) -> str:
        """The tenant of calls that name none: the first."""
        return self.tenants[0]


OPEN = Caller(("default",))


class Keys:
    """A JSON file with the hashes of keys and their tenants.

    A key is 32 random bytes, so one round of SHA-256 is enough: there is nothing to guess. The file
    is opened again by its path whenever it has changed, so keys come and go while a server runs.
    """

    def __init__(self, path: str | Path | None) -> None:
        """Read the file.

        Args:
            path: The file; None for a server without keys, on which everybody is one tenant.

        Raises:
            ConfigError: The file is no list of keys.
        """
        self.path = None if path is None else Path(path)
        self._state: tuple[int, ...] = ()
        self._callers: dict[str, Caller] = {}
        if self.path is not None:
            self._state, self._callers = _file_state(self.path), _read(self.path)

    @property
    def callers(self) -> Mapping[str, Caller]:
        """The callers by the hashes of their keys."""
        return self._callers

    def caller(self, key: str | None) -> Caller | None:
        """The holder of a key; None for an unknown key. Both take the same time."""
        if self.path is None:
            return OPEN
        state = _file_state(self.path)
        if state != self._state:
            self._state = state
            try:
                self._callers = _read(self.path)
            except ConfigError as error:  # a half-written edit: the keys read before stay valid
                log.error("%s", error)
        wanted, found = _hash(key or ""), None
        for digest, caller in self._callers.items():
            if hmac.compare_digest(digest, wanted):
                found = caller
        return found

    def add(self, tenants: tuple[str, ...]) -> str:
        """Make a key for some tenants and write its hash.

        Args:
            tenants: Whose adapters the key may use; the first is the default.

        Returns:
            The key, which is stored nowhere.

        Raises:
            ConfigError: There is no file, or no tenant.
            InvalidNameError: A tenant cannot have this name.
        """
        if self.path is None:
            raise ConfigError("there is no key file; name one with --key-file")
        if not tenants:
            raise ConfigError("a key needs at least one tenant")
        for tenant in tenants:
            check_name("tenant", tenant)
            check_not_auto("tenant", tenant)
        key = PREFIX + secrets.token_urlsafe(32)
        self._write({**self._callers, _hash(key): Caller(tenants)})
        return key

    def revoke(self, key: str) -> Caller:
        """Remove a key.

        Args:
            key: The key, or at least the first 8 digits of its hash.

        Returns:
            Its holder.

        Raises:
            ConfigError: No key or several keys match.
        """
        matching = [
            digest
            for digest in self._callers
            if digest == _hash(key) or (len(key) >= 8 and digest.startswith(key))
        ]
        if len(matching) != 1:
            raise ConfigError(
                f"{len(matching)} keys of {self.path} match; give a whole key, or at least the "
                "first 8 digits of its hash"
            )
        revoked = self._callers[matching[0]]
        self._write({d: caller for d, caller in self._callers.items() if d != matching[0]})
        return revoked

    def _write(self, callers: dict[str, Caller]) -> None:
        assert self.path is not None
        entries = [
            {"sha256": digest, "tenants": list(caller.tenants)}
            for digest, caller in callers.items()
        ]
        write_atomic(self.path, json.dumps(entries, indent=2).encode())
        self._callers, self._state = callers, _file_state(self.path)


def _read(path: Path) -> dict[str, Caller]:
    if not path.is_file():
        return {}
    try:
        callers = {
            str(entry["sha256"]): Caller(tuple(entry["tenants"]))
            for entry in json.loads(path.read_text())
        }
        for caller in callers.values():
            for tenant in caller.tenants:
                check_name("tenant", tenant)
            if not caller.tenants:
                raise ValueError("a key without tenants")
        return callers
    except (ValueError, KeyError, TypeError, InvalidNameError) as error:
        raise ConfigError(
            f"{path}: no list of keys ({error}); make it with "
            f"veratune key --key-file {path} --tenants NAME"
        ) from None


def _file_state(path: Path) -> tuple[int, ...]:
    """A value that changes when the file does; () for a missing file."""
    try:
        state = path.stat()
    except OSError:
        return ()
    return (state.st_mtime_ns, state.st_size, state.st_ino)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
