"""Router: chooses the adapter that an input is for (model="auto").

Each adapter has an embedding of its training inputs. An input goes to the adapter with the nearest
one by cosine, as in LoraRetriever (Zhao et al., arXiv 2402.09997), or to the base model.
"""

import collections
import logging
import threading
from collections.abc import Sequence

from veratune.errors import AdapterNotFoundError, ConfigError, VeratuneError
from veratune.serving.routing.adapter_embedding import AdapterEmbedding
from veratune.serving.routing.embedder import Embedder
from veratune.serving.routing.index import RoutingIndex
from veratune.serving.store.base import Store

log = logging.getLogger(__name__)
MAX_EXAMPLES = 128  # that are embedded for one adapter
_MAX_STALE = 8  # deleted adapters that one choice passes over


class Router:
    """Chooses adapters, and stores the embeddings that it chooses by.

    Methods may be called from any thread; they compute, so the event loop calls none.

    Args:
        store: Has the adapters and their embeddings.
        embedder: Embeds inputs.
        refresh_seconds: How long an index is used before the store is asked for changes.
    """

    def __init__(self, store: Store, embedder: Embedder, refresh_seconds: float = 2.0) -> None:
        self.store, self.embedder = store, embedder
        self.index = RoutingIndex(store, embedder, refresh_seconds)
        self.choices: collections.Counter[str] = collections.Counter(adapter=0, base=0)
        self._lock = threading.Lock()

    def choose(self, tenant: str, inputs: Sequence[Sequence[str]]) -> str | None:
        """Choose the adapter of one tenant that the inputs of a call are for.

        Args:
            tenant: Whose adapters.
            inputs: At least one; each is one or more texts. Of a conversation, it is the user's
                messages, newest first: the first one that is near to an adapter decides.

        Returns:
            The adapter's name; None for the base model, where no adapter is near enough.

        Raises:
            ConfigError: An input is empty, or the inputs are for different adapters.
            AdapterStateError: All embeddings of the tenant were made by another model.
            StoreError: The store cannot be read.
        """
        index = self.index.get(tenant)
        index.check_current()
        if not index.names:
            self._count(None)
            return None
        vectors = iter(self.embedder.embed([text for texts in inputs for text in texts]))
        groups = [[next(vectors) for _ in texts] for texts in inputs]
        gone: set[str] = set()
        for _ in range(_MAX_STALE):
            found = {index.first_near(group, gone) for group in groups}
            if len(found) > 1:
                listed = ", ".join(sorted(name or "the base model" for name in found)[:5])
                raise ConfigError(
                    f"the inputs of this call are for different models ({listed}); send them in "
                    "calls of their own, or name a model"
                )
            name = found.pop()
            if name is None or self._exists(tenant, name):
                break
            gone.add(name)
        else:
            name = None
        self._count(name)
        return name

    def put(self, tenant: str, name: str, texts: Sequence[str]) -> AdapterEmbedding:
        """Embed example inputs of an adapter, and store the embedding. The texts are not stored.

        Args:
            tenant: Whose adapter.
            name: Its name.
            texts: Inputs; equal ones count once. Of more than 128, 128 at equal distances count.

        Returns:
            What is stored.

        Raises:
            ConfigError: There are too few different inputs, or one is empty.
            AdapterNotFoundError: There is no such adapter.
            StoreError: The embedding could not be stored.
        """
        different = list(dict.fromkeys(texts))
        count = min(len(different), MAX_EXAMPLES)
        chosen = [different[i * len(different) // count] for i in range(count)]
        AdapterEmbedding.check_count(count)  # before the work
        made = AdapterEmbedding.fit(self.embedder.id, self.embedder.embed(chosen))
        self.store.put_embedding(tenant, name, made.encode())
        self.forget(tenant)
        return made

    def put_training_data(self, tenant: str, name: str, texts: Sequence[str]) -> str:
        """As `put`, for the inputs of a training run, whose end it never fails.

        Returns:
            A sentence for the run's log: by how many inputs "auto" chooses the adapter, or why it
            does not.
        """
        try:
            made = self.put(tenant, name, texts)
        except VeratuneError as error:
            return f"the model auto does not choose the adapter: {error}"
        except Exception:
            log.exception("the inputs of adapter %s of %s are not embedded", name, tenant)
            return "the model auto does not choose the adapter: its inputs could not be embedded"
        return f"the model auto chooses the adapter by {made.examples} of its inputs"

    def has_choice(self, tenant: str) -> bool:
        """Whether a tenant has adapters to choose from. Raises StoreError."""
        return bool(self.index.get(tenant).names)

    def forget(self, tenant: str) -> None:
        """Take a tenant's embeddings out of memory; the store is read again at the next use."""
        self.index.forget(tenant)

    def _exists(self, tenant: str, name: str) -> bool:
        try:
            self.store.newest(tenant, name)
        except AdapterNotFoundError:
            return False
        return True

    def _count(self, name: str | None) -> None:
        with self._lock:
            self.choices["base" if name is None else "adapter"] += 1
