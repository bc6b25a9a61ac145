"""Fleet: one VeRA adapter per tenant, trained in shared batches, into a folder or a store.

Training and serving meet here: `StoreAdapters` publishes what a fleet trains as versions of a store
that `veratune serve` reads.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veratune.adapter import Adapter
from veratune.config import VeraConfig
from veratune.errors import AdapterNotFoundError, ConfigError
from veratune.formats import native
from veratune.serving.store.base import Store, check_name
from veratune.serving.store.object import ObjectStore
from veratune.serving.store.sqlite import SqliteStore
from veratune.tasks.registry import task_class
from veratune.training.fleet.loop import ADAPTERS, train_fleet
from veratune.training.fleet.report import draw_map, draw_scores
from veratune.training.fleet.results import FleetResult, read_results
from veratune.training.fleet.settings import FleetSettings
from veratune.training.fleet.torchrun import rank_and_world
from veratune.training.fleet.worker import AdapterFolder, Finished, Sink, Source
from veratune.training.settings import TrainSettings

_FLEET = {field.name for field in dataclasses.fields(FleetSettings)}


class StoreAdapters:
    """The adapters of one name in a store, by tenant. A fleet's Sink and Source."""

    def __init__(self, store: Store, name: str) -> None:
        """Check the name. Raises InvalidNameError."""
        check_name("adapter name", name)
        self.store, self.name = store, name

    def put(self, tenant: str, adapter: Adapter) -> int:
        """Append a version, unless the newest has the same bytes: a resumed run puts twice.

        Returns:
            The file's size in bytes.
        """
        data = native.encode(adapter)
        if self._newest(tenant) != data:
            self.store.put(tenant, self.name, data)
        return len(data)

    def get(self, tenant: str) -> Adapter | None:
        """The newest version, or None."""
        data = self._newest(tenant)
        return None if data is None else native.decode(data)

    def _newest(self, tenant: str) -> bytes | None:
        with contextlib.suppress(AdapterNotFoundError):
            number = self.store.newest(tenant, self.name).number
            return self.store.get(tenant, self.name, number)
        return None


def open_store(address: str) -> Store:
    """Open a store: a SQLite file, or a bucket by its URL. Raises StoreError."""
    return ObjectStore.from_url(address) if "://" in address else SqliteStore(address)


@contextlib.contextmanager
def open_adapters(address: str, name: str) -> Iterator[StoreAdapters]:
    """The adapters of one name in a store, which is closed at the end. Raises StoreError."""
    with contextlib.closing(open_store(address)) as store:
        yield StoreAdapters(store, name)


class Fleet:
    """Train one VeRA adapter per tenant, many tenants in each batch: y = W x + b_t (B (d_t (A x))).

    A and B are shared, so a batch mixes tenants t, and each tenant's gradient falls into its own
    d_t and b_t. Each adapter equals the one that `veratune train` makes of that tenant's data.

    Args:
        model: The base model: a folder, a .gguf file or a Hugging Face id.
        task: A task of `veratune train`, such as "instruction" or "text-classification".
        out: Folder for adapters, results, pictures and checkpoints; empty at first.
        config: How every tenant is adapted; default rank 256 on query and value.
        settings: Fields of `TrainSettings` and `FleetSettings` by name, such as lr, epochs,
            max_active, start_adapter, continue_from, store.

    Raises:
        ConfigError: A setting is unknown or wrong.

    Source: VeRA (arXiv 2310.11454), equation 2, for many adapters of one basis.
    """

    def __init__(
        self,
        model: str,
        task: str,
        out: str | Path,
        config: VeraConfig | None = None,
        **settings: Any,
    ) -> None:
        self._vera = config or VeraConfig()
        own = {key: settings.pop(key) for key in list(settings) if key in _FLEET}
        known = {field.name for field in dataclasses.fields(TrainSettings)} - {"data"}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(f"a fleet has no setting {unknown[0]!r}")
        self._fleet = FleetSettings(**own)
        self._settings = {"model": model, "task": task, "out": str(out), **settings}

    def train(self, data: str | Path, *, finished: Finished | None = None) -> FleetResult:
        """Train all tenants of a data set.

        Args:
            data: A file with a tenant column, or a folder with a file per tenant.
            finished: Called after each tenant with (its result, tenants finished, tenants in all).

        Returns:
            Counts, and one entry per tenant: scores before and after, or why it was refused.

        Raises:
            VeratuneError: For mistakes in settings, model or data. A mistake in one tenant's data
                refuses that tenant alone.
        """
        settings = TrainSettings(data=str(data), **self._settings)
        return run_fleet(settings, self._vera, self._fleet, finished=finished)


def run_fleet(
    settings: TrainSettings,
    vera: VeraConfig,
    fleet: FleetSettings,
    *,
    finished: Finished | None = None,
    rank: int | None = None,
    world: int | None = None,
) -> FleetResult:
    """Train a fleet with the store and the sources that its settings name.

    Args:
        settings: As for `train_fleet`.
        vera: How every tenant is adapted.
        fleet: The fleet's settings; `store` and `continue_from` are opened here.
        finished: Called after each tenant.
        rank: This worker's number.
        world: The number of workers.

    Raises:
        VeratuneError: For mistakes in settings, model, data or store.
    """
    if fleet.workers > 1 and rank is None:
        if rank_and_world()[1] > 1:
            raise ConfigError(
                f"workers is {fleet.workers}, but torchrun has started workers; leave it out"
            )
        from veratune.fleet.cluster import train_on_ray

        return train_on_ray(settings, vera, fleet, finished=finished)
    with contextlib.ExitStack() as stack:

        def adapters_of(address: str) -> StoreAdapters:
            return stack.enter_context(open_adapters(address, fleet.adapter_name))

        sink: Sink | None = None if fleet.store is None else adapters_of(fleet.store)
        source: Source | None = None
        begin = fleet.continue_from
        if begin is not None and not Path(begin).is_dir():
            if "://" not in begin and not Path(begin).is_file():
                raise ConfigError(f"continue_from: {begin!r} is no folder and no store")
            source = adapters_of(begin)
        return train_fleet(
            settings,
            vera,
            fleet,
            sink=sink,
            source=source,
            finished=finished,
            rank=rank,
            world=world,
        )


def draw_fleet(settings: TrainSettings, fleet: FleetSettings) -> list[Path]:
    """Draw a finished run's scores per tenant and the map of its adapters into its folder."""
    out, metric = Path(settings.out), task_class(settings.task).metric
    lines = read_results(out)
    scores = {
        line["tenant"]: line["after"][metric] for line in lines if metric in line.get("after", {})
    }
    trained = [line["tenant"] for line in lines if line["status"] == "trained"]
    with contextlib.ExitStack() as stack:
        source: Source = AdapterFolder(out / ADAPTERS)
        if fleet.store is not None:
            source = stack.enter_context(open_adapters(fleet.store, fleet.adapter_name))
        pictures = (
            draw_scores(lines, metric, out / "scores.png"),
            draw_map(source, trained, out / "map.png", scores or None, metric),
        )
    return [picture for picture in pictures if picture is not None]
