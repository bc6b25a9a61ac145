"""Service: what the server does apart from HTTP. It resolves model names and moves adapters in and
out of the store.
"""

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

from veratune.adapter import Adapter, base_id
from veratune.errors import (
    AdapterNotFoundError,
    BaseModelError,
    ConfigError,
    InvalidNameError,
    ShutdownError,
    UnsupportedError,
)
from veratune.formats.lora_file import decode_lora, is_lora_file
from veratune.formats.native import AdapterReader
from veratune.mixing import MixPart, mix
from veratune.serving.conversation import SystemMessages
from veratune.serving.engine.encoder import Encoder
from veratune.serving.engine.engine import Engine
from veratune.serving.engine.protocol import ServingEngine
from veratune.serving.keys import Caller
from veratune.serving.mixes import MixIndex, MixKey, MixRef, is_mix, parse_mix
from veratune.serving.names import AUTO, AdapterRef, Key, check_not_auto, is_auto
from veratune.serving.routing.adapter_embedding import AdapterEmbedding
from veratune.serving.routing.embedder import Embedder
from veratune.serving.routing.router import Router
from veratune.serving.store.base import Entry, Store, Version
from veratune.serving.targets import RequestFields, Target


class Service:
    """One store of adapters over a causal model, an encoder, or both."""

    def __init__(
        self,
        store: Store,
        engine: Engine | None = None,
        encoder: Encoder | None = None,
        *,
        served_model_name: str = "",
        served_encoder_name: str = "",
        refresh_seconds: float = 2.0,
    ) -> None:
        """Name the base models.

        Args:
            store: Where adapters are kept.
            engine: Generates with a causal model.
            encoder: Computes embeddings and classes.
            served_model_name: The causal model's name for clients; default its id or folder's name.
            served_encoder_name: The encoder's name for clients; default its id or folder's name.
            refresh_seconds: How long the list of adapters that "auto" chooses from is cached.

        Raises:
            ConfigError: There is no model, or both have one name.
            InvalidNameError: A base model is called "auto".
        """
        self.store, self.engine, self.encoder = store, engine, encoder
        self._reader = AdapterReader()
        self._system_messages: SystemMessages | None = None
        if engine is not None:
            self._system_messages = SystemMessages(
                engine.tokenizer.chat_template, engine.max_characters
            )
        # The engines share the pools' base models: the embedder runs beside them.
        self.router: Router | None = None
        if engine is not None:
            embeds = encoder or engine
            embedder = Embedder(embeds.pool.base_model, embeds.tokenizer)
            self.router = Router(store, embedder, refresh_seconds)
        self.draining = False
        self.mixes = MixIndex(self._drop)
        self._closing, self._closed = threading.Lock(), False
        self.loops: dict[str, ServingEngine[Any]] = {}
        for loop, wanted in ((engine, served_model_name), (encoder, served_encoder_name)):
            if loop is not None:
                name = wanted or base_id(loop.model)
                check_not_auto("the base model's name", name)
                if name in self.loops:
                    raise ConfigError(
                        f"both base models are called {name!r}; give one of them another name"
                    )
                self.loops[name] = loop
        if not self.loops:
            raise ConfigError("there is nothing to serve: give a causal model, an encoder, or both")

    def require_engine(self) -> Engine:
        """The engine of the causal model. Raises UnsupportedError without one."""
        if self.engine is None:
            raise UnsupportedError(
                "this server has no causal model: it gives embeddings and classes "
                "(start it with --model)"
            )
        return self.engine

    def require_router(self) -> Router:
        """The router of the causal model's adapters. Raises UnsupportedError without one."""
        self.require_engine()
        assert self.router is not None
        return self.router

    def require_encoder(self) -> Encoder:
        """The encoder. Raises UnsupportedError without one."""
        if self.encoder is None:
            raise UnsupportedError(
                "this server has no encoder: it gives no embeddings and classes "
                "(start it with --encoder)"
            )
        return self.encoder

    def find_adapter(self, caller: Caller, model: str) -> AdapterRef | None:
        """Resolve a model's name.

        Args:
            caller: Who asks.
            model: A base model's name, NAME, or TENANT/NAME.

        Returns:
            The adapter; None for a base model.

        Raises:
            AdapterNotFoundError: There is none, or it is another tenant's: in the same words.
            UnsupportedError: It is "auto", which stands for no adapter without an input.
        """
        if model in self.loops:
            return None
        if is_auto(model):
            raise UnsupportedError(
                f"the model {model!r} is chosen by the input of a completion, chat completion or "
                "response; name an adapter or a base model here"
            )
        tenant, _, name = model.rpartition("/")
        tenant = tenant or caller.tenant
        missing = _missing(model)
        allowed = tenant in caller.tenants
        try:
            # For another tenant's name the same look-up is done on the caller's tenant, so that
            # the response time does not tell whether the adapter exists.
            version = self.store.newest(tenant if allowed else caller.tenant, name)
        except (AdapterNotFoundError, InvalidNameError):
            raise missing from None
        if not allowed:
            raise missing
        return AdapterRef(tenant, name, version)

    def choose(self, caller: Caller, model: str, inputs: Sequence[Sequence[str]]) -> str:
        """Choose the adapter that inputs are for.

        Args:
            caller: Who asks.
            model: "auto" for the caller's tenant, or "auto/TENANT".
            inputs: As `Router.choose`.

        Returns:
            The name of the adapter; that of the base model where no adapter is near enough.

        Raises:
            AdapterNotFoundError: The key may not use the tenant.
            Exception: As `Router.choose`.
        """
        tenant = model.removeprefix(AUTO).removeprefix("/") or caller.tenant
        if tenant not in caller.tenants:
            raise _missing(model)
        name = self.require_router().choose(tenant, inputs)
        if name is None:
            return next(base for base, loop in self.loops.items() if loop is self.engine)
        own = tenant == caller.tenant and name not in self.loops
        return name if own else f"{tenant}/{name}"

    def resolve(self, caller: Caller, model: str) -> AdapterRef | MixRef | None:
        """Resolve a model's name, which may be that of a mix such as "a:0.7+b:0.3".

        Args:
            caller: Who asks.
            model: A base model's name, an adapter's, or a mix of adapters.

        Returns:
            The adapter or the mix; None for a base model.

        Raises:
            ConfigError: The name of a mix cannot be read.
            AdapterNotFoundError: As `find_adapter`, for any part.
            UnsupportedError: A part is a base model.
        """
        if model in self.loops or not is_mix(model):
            return self.find_adapter(caller, model)
        parts = []
        for name, weight in parse_mix(model):
            ref = self.find_adapter(caller, name)
            if ref is None:
                raise UnsupportedError(f"{name!r} is a base model; a mix has adapters alone")
            parts.append((ref, weight))
        found = MixRef(tuple(parts))
        self.mixes.use(found.key)
        return found

    def request_fields(self, caller: Caller, model: str, loop: ServingEngine[Any]) -> RequestFields:
        """The fields of a request that follow from the caller and the model's name.

        Args:
            caller: Who asks.
            model: A model's name.
            loop: The engine that the request is for.

        Raises:
            Exception: As `resolve`.
            UnsupportedError: `model` is the other base model.
            ShutdownError: The server is draining.
        """
        if self.draining:
            raise ShutdownError("the server is shutting down; send the request to another one")
        ref = self.resolve(caller, model)
        if ref is not None:
            # A mix may have parts of several tenants: it counts for the caller's own.
            tenant = ref.tenant if isinstance(ref, AdapterRef) else caller.tenant
            return {"tenant": tenant, "key": ref.key, "load": lambda: self.load(ref)}
        if self.loops[model] is not loop:
            encodes = isinstance(self.loops[model], Encoder)
            does = "reads texts (embeddings, classes)" if encodes else "generates"
            raise UnsupportedError(f"the model {model!r} {does}, and nothing else")
        return {"tenant": caller.tenant}

    def target(self, caller: Caller, model: str) -> Target:
        """Resolve a model's name for the causal model, once for one call.

        Raises:
            Exception: As `request_fields`.
            UnsupportedError: The adapter was trained with another chat template.
        """
        fields = self.request_fields(caller, model, self.require_engine())
        if "key" not in fields:
            return Target(model, fields)
        assert self._system_messages is not None
        return Target(model, fields, self._system_messages.get(fields["key"], fields["load"]))

    def load(self, ref: AdapterRef | MixRef) -> Adapter:
        """Read an adapter from the store and check it; of a mix, all parts, and add them up."""
        if isinstance(ref, MixRef):
            return mix([MixPart(part.name, self.load(part), w) for part, w in ref.parts])
        return self._decode(self.store.get(*ref.key))

    def put(self, tenant: str, name: str, data: bytes) -> Version:
        """Store an adapter file that fits one of the base models.

        Raises:
            AdapterFileError: `data` is no adapter file.
            BaseModelError: It fits no base model here.
            UnsupportedError: It is too large for this server.
            StoreError: It could not be stored.
            InvalidNameError: The name cannot be an adapter's.
        """
        check_not_auto("adapter name", name)
        adapter = self._decode(data)
        refused: list[BaseModelError] = []
        for loop in self.loops.values():
            try:
                loop.pool.check(adapter)
                if loop is self.engine and self._system_messages is not None:
                    self._system_messages.check(adapter)
            except BaseModelError as error:
                refused.append(error)
            else:
                return self.store.put(tenant, name, data)
        raise refused[0]

    def _decode(self, data: bytes) -> Adapter:
        return decode_lora(data) if is_lora_file(data) else self._reader.decode(data)

    def put_examples(self, tenant: str, name: str, texts: Sequence[str]) -> AdapterEmbedding:
        """Store the embedding of an adapter's example inputs, for the model "auto".

        Raises:
            AdapterNotFoundError: There is no such adapter.
            BaseModelError: It is none of the causal model.
            Exception: As `Router.put`.
        """
        ref = AdapterRef(tenant, name, self.store.newest(tenant, name))
        self.require_engine().pool.check(self.load(ref))
        return self.require_router().put(tenant, name, texts)

    def put_if_changed(self, tenant: str, name: str, data: bytes) -> Version:
        """Store an adapter file unless its newest version has the same bytes. Raises as `put`."""
        with contextlib.suppress(AdapterNotFoundError):
            newest = self.store.newest(tenant, name)
            if self.store.get(tenant, name, newest.number) == data:
                return newest
        return self.put(tenant, name, data)

    def delete(self, tenant: str, name: str) -> Version:
        """Delete an adapter; running requests finish with it. Raises AdapterNotFoundError."""
        ref = AdapterRef(tenant, name, self.store.newest(tenant, name))
        tombstone = self.store.delete(tenant, name)
        self.unload(ref.key)
        if self.router is not None:
            self.router.forget(tenant)
        return tombstone

    def forget_tenant(self, tenant: str) -> None:
        """Take what was computed for a tenant with the base model alone out of memory."""
        if self.engine is not None and self.engine.prefix_cache is not None:
            self.engine.prefix_cache.remove_tenant(tenant)

    def unload(self, key: Key) -> None:
        """Take an adapter, and mixes with it, out of memory, unless a request uses them now."""
        self._drop(key)
        self.mixes.forget_part(*key[:2])

    def _drop(self, key: Key | MixKey) -> None:
        for loop in self.loops.values():
            loop.forget(key)

    def list_adapters(self, caller: Caller, after: str, limit: int) -> list[tuple[str, Entry]]:
        """Adapters of all tenants of a caller.

        Args:
            caller: Who asks.
            after: List only what comes after this model's name.
            limit: The most entries.

        Returns:
            (model's name, entry), by tenant and name.
        """
        listed: list[tuple[str, Entry]] = []
        last_tenant, _, last_name = after.rpartition("/")
        begin = caller.tenants.index(last_tenant) if last_tenant in caller.tenants else 0
        for i, tenant in enumerate(caller.tenants):
            if i < begin:
                continue
            prefix = "" if i == 0 else f"{tenant}/"
            begin_name = last_name if after and i == begin else ""
            with contextlib.suppress(AdapterNotFoundError):
                entries = self.store.list_adapters(tenant, begin_name, limit - len(listed))
                listed += [(prefix + entry.name, entry) for entry in entries]
            if len(listed) >= limit:
                break
        return listed

    def problem(self) -> str | None:
        """Why the server cannot answer now; None if it can. Raises StoreError."""
        if self.draining:
            return "the server is shutting down"
        if not all(loop.alive for loop in self.loops.values()):
            return "an engine is not running"
        return self.store.problem()

    @property
    def idle(self) -> bool:
        """Whether no request runs or waits."""
        return not any(
            loop.scheduler.waiting or loop.scheduler.running for loop in self.loops.values()
        )

    def close(self, timeout: float = 0.0) -> None:
        """Give running requests `timeout` seconds to finish, and stop the engines."""
        self.draining = True
        with self._closing:
            if not self._closed:
                self._closed = True
                for loop in self.loops.values():
                    loop.close(timeout)


def _missing(model: str) -> AdapterNotFoundError:
    return AdapterNotFoundError(f"the model {model!r} does not exist, or this key may not use it")
