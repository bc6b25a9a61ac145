"""Keys: who may ask, for which tenants. Only their hashes are kept."""

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
from veratune.serving.store.base import check_name

log = logging.getLogger(__name__)
PREFIX = "vt-"


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who a key belongs to. tenants: those it speaks for, the first one where none is said."""

    tenants: tuple[str, ...]

    @property
    def tenant(self) -> str:
        return self.tenants[0]


OPEN = Caller(("default",))


class Keys:
    """A file of hashes of keys with their tenants, as JSON; None: no keys are asked for, and everybody is one tenant.

    A key is 32 random bytes, so that one round of SHA-256 is enough: there is nothing to guess. The file is read again when it has changed, so
    that keys come and go while a server runs.
    """

    def __init__(self, path: str | Path | None) -> None:
        """Raises ConfigError for a file that is no list of keys."""
        self.path = None if path is None else Path(path)
        self._seen: tuple[int, ...] = ()
        self._known: dict[str, Caller] = {}
        if self.path is not None:
            self._seen, self._known = _state(self.path), self._load(self.path)

    @property
    def callers(self) -> Mapping[str, Caller]:
        """Who may ask, by the hashes of their keys."""
        return self._known

    def caller(self, key: str | None) -> Caller | None:
        """Who a key belongs to; None for nobody. It takes as long for a wrong key as for a right one."""
        if self.path is None:
            return OPEN
        state = _state(self.path)
        if state != self._seen:
            self._seen = state
            try:
                self._known = self._load(self.path)
            except (
                ConfigError
            ) as error:  # half an edit of somebody's: the keys that were there go on
                log.error("%s", error)
        asked = _hash(key or "")
        found = None
        for known, caller in self._known.items():
            if hmac.compare_digest(known, asked):
                found = caller
        return found

    def add(self, tenants: tuple[str, ...]) -> str:
        """Make a key for some tenants and write its hash. Returns the key, which is not kept."""
        if self.path is None:
            raise ConfigError("there is no file for keys; say which")
        if not tenants:
            raise ConfigError("a key wants at least one tenant")
        for tenant in tenants:
            check_name("tenant", tenant)
        key = PREFIX + secrets.token_urlsafe(32)
        self._write({**self._known, _hash(key): Caller(tenants)})
        return key

    def revoke(self, key: str) -> Caller:
        """Strike out a key: itself, or the beginning of its hash, at least 8 digits. Returns whose it was. Raises ConfigError for none or several."""
        found = [
            known
            for known in self._known
            if known == _hash(key) or (len(key) >= 8 and known.startswith(key))
        ]
        if len(found) != 1:
            raise ConfigError(
                f"{len(found)} keys of {self.path} are meant by that; a whole key is wanted, or 8 digits and more of its hash"
            )
        gone = self._known[found[0]]
        self._write({known: caller for known, caller in self._known.items() if known != found[0]})
        return gone

    def _write(self, known: dict[str, Caller]) -> None:
        assert self.path is not None
        lines = [{"sha256": own, "tenants": list(caller.tenants)} for own, caller in known.items()]
        write_atomic(self.path, json.dumps(lines, indent=2).encode())
        self._known, self._seen = known, _state(self.path)

    @staticmethod
    def _load(path: Path) -> dict[str, Caller]:
        if not path.is_file():
            return {}
        try:
            found = {
                str(line["sha256"]): Caller(tuple(line["tenants"]))
                for line in json.loads(path.read_text())
            }
            for caller in found.values():
                for tenant in caller.tenants:
                    check_name("tenant", tenant)
                if not caller.tenants:
                    raise ValueError("a key without tenants")
            return found
        except (ValueError, KeyError, TypeError, InvalidNameError) as error:
            raise ConfigError(
                f"{path}: no list of keys ({error}); make it with veratune key --key-file {path} --tenants NAME"
            ) from None


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file does; nothing of one that is not there."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_size, found.st_ino)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
