"""Service: what a server can do, apart from HTTP: adapters in and out of the store, and which engine answers."""

import contextlib
import dataclasses
from typing import Any

from veratune.adapter import Adapter, base_id
from veratune.errors import (
    AdapterNotFoundError,
    BaseModelError,
    ConfigError,
    InvalidNameError,
    UnsupportedError,
    VeratuneError,
)
from veratune.formats.native import AdapterReader
from veratune.serving.engine.encoder import Encoder
from veratune.serving.engine.engine import Engine
from veratune.serving.engine.loop import Loop
from veratune.serving.keys import Caller
from veratune.serving.store.base import Entry, Store, Version


@dataclasses.dataclass(frozen=True)
class AdapterRef:
    """An adapter that was asked for: whose it is, its name and the version that answers."""

    tenant: str
    name: str
    version: Version

    @property
    def key(self) -> tuple[str, str, int]:
        """What the pools know it by."""
        return (self.tenant, self.name, self.version.number)


class Service:
    """One store of adapters over a causal model, an encoder, or both."""

    def __init__(
        self,
        store: Store,
        engine: Engine | None = None,
        encoder: Encoder | None = None,
        *,
        name: str = "",
        encoder_name: str = "",
    ) -> None:
        """name, encoder_name: the base models' names for clients; default their hub ids or folders' names. Raises ConfigError."""
        self.store, self.engine, self.encoder = store, engine, encoder
        self._reader = AdapterReader()
        self.loops: dict[str, Loop[Any]] = {}
        for loop, wanted in ((engine, name), (encoder, encoder_name)):
            if loop is not None:
                own = wanted or base_id(loop.model)
                if own in self.loops:
                    raise ConfigError(
                        f"both base models are called {own!r}; give one of them another name"
                    )
                self.loops[own] = loop
        if not self.loops:
            raise ConfigError("there is nothing to serve: give a causal model, an encoder, or both")

    def generating(self) -> Engine:
        """The engine of the causal model. Raises UnsupportedError without one."""
        if self.engine is None:
            raise UnsupportedError(
                "this server has no causal model: it gives embeddings and classes (start it with --model)"
            )
        return self.engine

    def encoding(self) -> Encoder:
        """The encoder. Raises UnsupportedError without one."""
        if self.encoder is None:
            raise UnsupportedError(
                "this server has no encoder: it gives no embeddings and classes (start it with --encoder)"
            )
        return self.encoder

    def find(self, caller: Caller, model: str) -> AdapterRef | None:
        """The adapter of a model's name, NAME or TENANT/NAME; None for a base model.

        Raises AdapterNotFoundError for one that is not there, and in the same words for one of somebody else's.
        """
        if model in self.loops:
            return None
        tenant, _, name = model.rpartition("/")
        tenant = tenant or caller.tenant
        missing = AdapterNotFoundError(
            f"the model {model!r} does not exist, or this key may not use it"
        )
        own = tenant in caller.tenants
        try:
            # For somebody else's the same work is done on the caller's own, so that time tells nothing either.
            ref = AdapterRef(
                tenant, name, self.store.newest(tenant if own else caller.tenant, name)
            )
        except (AdapterNotFoundError, InvalidNameError):
            raise missing from None
        if not own:
            raise missing
        return ref

    def asked(self, caller: Caller, model: str, loop: Loop[Any]) -> dict[str, Any]:
        """Tenant, key and load of a request to one of the loops, for a model's name. Raises what `find` raises, UnsupportedError for the other
        base model.
        """
        ref = self.find(caller, model)
        if ref is None and self.loops[model] is not loop:
            does = (
                "reads texts (embeddings, classes)"
                if isinstance(self.loops[model], Encoder)
                else "generates"
            )
            raise UnsupportedError(f"the model {model!r} {does}, and nothing else")
        if ref is None:
            return {"tenant": caller.tenant}
        return {"tenant": ref.tenant, "key": ref.key, "load": lambda: self.load(ref)}

    def load(self, ref: AdapterRef) -> Adapter:
        """An adapter out of the store, checked."""
        return self._reader.decode(self.store.get(*ref.key))

    def put(self, tenant: str, name: str, data: bytes) -> Version:
        """Store an adapter's file, if it is one and fits a base model here. Raises VeratuneError, and then nothing was stored."""
        adapter = self._reader.decode(data)
        refused: list[BaseModelError] = []
        for loop in self.loops.values():
            try:
                loop.pool.check(adapter)
            except BaseModelError as error:
                refused.append(error)
            else:
                return self.store.put(tenant, name, data)
        raise refused[0]

    def keep(self, tenant: str, name: str, data: bytes) -> Version:
        """Store an adapter's file unless its newest version has the same bytes already: what may be done twice. Raises as `put`."""
        with contextlib.suppress(AdapterNotFoundError):
            newest = self.store.newest(tenant, name)
            if self.store.get(tenant, name, newest.number) == data:
                return newest
        return self.put(tenant, name, data)

    def delete(self, tenant: str, name: str) -> Version:
        """Delete an adapter; requests that it answers now end as they began."""
        gone = AdapterRef(tenant, name, self.store.newest(tenant, name))
        tombstone = self.store.delete(tenant, name)
        self.forget(gone.key)
        return tombstone

    def forget(self, key: tuple[str, str, int]) -> None:
        """Take an adapter out of memory, if nobody uses it now."""
        for loop in self.loops.values():
            loop.forget(key)

    def names(self, caller: Caller, after: str, limit: int) -> list[tuple[str, Entry]]:
        """Adapters of the caller's tenants, as (model's name, entry), by name; those behind `after`."""
        out: list[tuple[str, Entry]] = []
        first, _, rest = after.rpartition("/")
        for i, tenant in enumerate(caller.tenants):
            prefix = "" if i == 0 else f"{tenant}/"
            begin = ""
            if after:
                at = caller.tenants.index(first) if first in caller.tenants else 0
                if i < at:
                    continue
                begin = rest if i == at else ""
            with contextlib.suppress(AdapterNotFoundError):
                out += [
                    (prefix + entry.name, entry)
                    for entry in self.store.list(tenant, begin, limit - len(out))
                ]
            if len(out) >= limit:
                break
        return out

    def ready(self) -> str | None:
        """Why the server cannot answer now; None if it can."""
        try:
            self.store.list("default", limit=1)
        except VeratuneError as error:
            return str(error)
        return (
            None if all(loop.alive for loop in self.loops.values()) else "an engine is not running"
        )

    def close(self, drain: float = 0.0) -> None:
        """Let answers end for `drain` seconds, and stop the engines."""
        for loop in self.loops.values():
            loop.close(drain)
