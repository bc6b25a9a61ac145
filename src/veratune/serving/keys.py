"""Keys: who may ask, for which tenants. Only their hashes are kept."""

import dataclasses
import hashlib
import hmac
import json
import secrets
from pathlib import Path

from veratune.errors import ConfigError, StoreError
from veratune.formats.atomic import write_atomic
from veratune.serving.store import check_name

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

    A key is 32 random bytes, so that one round of SHA-256 is enough: there is nothing to guess.
    """

    def __init__(self, path: str | Path | None) -> None:
        """Raises ConfigError for a file that is no list of keys."""
        self.path = None if path is None else Path(path)
        self._known: dict[str, Caller] = {}
        if self.path is not None:
            self._known = self._load(self.path)

    def caller(self, key: str | None) -> Caller | None:
        """Who a key belongs to; None for nobody. It takes as long for a wrong key as for a right one."""
        if self.path is None:
            return OPEN
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
        self._known[_hash(key)] = Caller(tenants)
        lines = [{"sha256": known, "tenants": list(caller.tenants)} for known, caller in self._known.items()]
        write_atomic(self.path, json.dumps(lines, indent=2).encode())
        return key

    @staticmethod
    def _load(path: Path) -> dict[str, Caller]:
        if not path.is_file():
            return {}
        try:
            found = {str(line["sha256"]): Caller(tuple(line["tenants"])) for line in json.loads(path.read_text())}
            for caller in found.values():
                for tenant in caller.tenants:
                    check_name("tenant", tenant)
                if not caller.tenants:
                    raise ValueError("a key without tenants")
            return found
        except (ValueError, KeyError, TypeError, StoreError) as error:
            raise ConfigError(
                f"{path}: no list of keys ({error}); make it with veratune key --key_file {path} --tenants NAME"
            ) from None


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
