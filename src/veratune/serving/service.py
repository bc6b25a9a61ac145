"""Service: what a server can do, apart from HTTP: adapters in and out of the store, and answers from the engine."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

from veratune.adapter import Adapter, base_id, check_fits
from veratune.errors import StoreError, UnknownAdapterError, VeratuneError
from veratune.formats import native
from veratune.serving.engine import Engine, Request
from veratune.serving.keys import Caller
from veratune.serving.sampling import Sampling
from veratune.serving.store import Entry, Store, Version


@dataclasses.dataclass(frozen=True)
class Place:
    """An adapter that was asked for: whose it is, its name and the version that answers. None stands for the base model."""

    tenant: str
    name: str
    version: Version


class Service:
    """One base model, one store, one engine."""

    def __init__(self, engine: Engine, store: Store, name: str | None = None) -> None:
        """name: the base model's name for clients; default its hub id or folder's name."""
        self.engine, self.store = engine, store
        self.name = name or base_id(engine.model)

    def find(self, caller: Caller, model: str) -> Place | None:
        """The adapter of a model's name, NAME or TENANT/NAME; None for the base model.

        Raises UnknownAdapterError for one that is not there, and in the same words for one of somebody else's.
        """
        if model == self.name:
            return None
        tenant, _, name = model.rpartition("/")
        tenant = tenant or caller.tenant
        missing = UnknownAdapterError(f"the model {model!r} does not exist, or this key may not use it")
        if tenant not in caller.tenants:
            # As much work as for a name of one's own that is not there.
            tenant, name = caller.tenant, "-"
        try:
            return Place(tenant, name, self.store.newest(tenant, name))
        except StoreError as error:
            if isinstance(error, UnknownAdapterError) or "cannot be used" in str(error):
                raise missing from None
            raise

    def ask(self, caller: Caller, model: str, prompt: Sequence[int], sampling: Sampling) -> Request:
        """Start an answer; what it raises is what `find` and `Engine.submit` raise."""
        return self.engine.submit(self.request(caller, model, prompt, sampling))

    def request(self, caller: Caller, model: str, prompt: Sequence[int], sampling: Sampling) -> Request:
        """A request that is not submitted yet."""
        place = self.find(caller, model)
        if place is None:
            return Request(caller.tenant, prompt, sampling)
        key = (place.tenant, place.name, place.version.number)
        return Request(place.tenant, prompt, sampling, key=key, load=lambda: self.load(place))

    def load(self, place: Place) -> Adapter:
        """An adapter out of the store, checked."""
        return native.decode(self.store.get(place.tenant, place.name, place.version.number))

    def put(self, tenant: str, name: str, data: bytes) -> Version:
        """Store an adapter's file, if it is one and fits the base model. Raises VeratuneError, and then nothing was stored."""
        adapter = native.decode(data)
        check_fits(self.engine.bank.plain, adapter)
        return self.store.put(tenant, name, data)

    def delete(self, tenant: str, name: str) -> Version:
        """Delete an adapter; requests that it answers now end as they began."""
        gone = self.store.newest(tenant, name)
        stone = self.store.delete(tenant, name)
        self.engine.bank.drop((tenant, name, gone.number))
        return stone

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
            with contextlib.suppress(UnknownAdapterError):
                out += [(prefix + entry.name, entry) for entry in self.store.names(tenant, begin, limit - len(out))]
            if len(out) >= limit:
                break
        return out

    def ready(self) -> str | None:
        """Why the server cannot answer now; None if it can."""
        try:
            self.store.names("default", limit=1)
        except VeratuneError as error:
            return str(error)
        return None if self.engine.alive else "the engine is not running"


def tokens_of(engine: Engine, text: str) -> list[int]:
    """A text as the model's tokens, with what its tokenizer puts around."""
    found: Any = engine.tokenizer(text)["input_ids"]
    return list(found)
