"""train_fleet: from settings and tenants' data to one adapter per tenant."""

import contextlib
import dataclasses
import time
from pathlib import Path

import yaml

from veratune.config import VeraConfig
from veratune.errors import ConfigError, OutputError
from veratune.formats.atomic import refuse_used, remove_partial, write_atomic
from veratune.training.fleet.results import FleetResult, summarise
from veratune.training.fleet.settings import FleetSettings, check_settings
from veratune.training.fleet.tenants import load_tenants
from veratune.training.fleet.torchrun import processes, rank_and_world
from veratune.training.fleet.worker import AdapterFolder, Finished, Sink, Source, Worker
from veratune.training.prepare import build_task
from veratune.training.run_folder import run_settings
from veratune.training.settings import TrainSettings

SETTINGS = "fleet.yaml"
ADAPTERS = "adapters"


def train_fleet(
    settings: TrainSettings,
    vera: VeraConfig,
    fleet: FleetSettings,
    *,
    sink: Sink | None = None,
    source: Source | None = None,
    finished: Finished | None = None,
    rank: int | None = None,
    world: int | None = None,
) -> FleetResult:
    """Train one adapter per tenant, many tenants in each batch.

    Args:
        settings: As for `train`; `data` has a tenant column or is a folder with a file per tenant.
        vera: How every tenant is adapted.
        fleet: Sizes, warm starts, checkpoints.
        sink: Where adapters go; default the folder `adapters` in `settings.out`.
        source: Where tenants' stored adapters come from; default the folder `fleet.continue_from`.
        finished: Called after each tenant with its result, tenants finished and tenants in all.
        rank, world: This worker and their number; default torchrun's processes, which wait for
            each other and return the result of all.

    Raises:
        VeratuneError: for mistakes in settings, model or data. A mistake in one tenant's data
            refuses that tenant alone, unless `fleet.strict`.
    """
    vera = dataclasses.replace(vera, seed=settings.basis_seed)
    check_settings(settings, fleet)
    by_torchrun = rank is None and world is None and rank_and_world()[1] > 1
    if rank is None or world is None:
        rank, world = rank_and_world()
    if fleet.workers > 1 and fleet.workers != world:
        raise ConfigError(
            f"workers is {fleet.workers}, but this call is one of {world} processes; use "
            "veratune.Fleet"
        )
    if sink is None and fleet.store is not None:
        raise ConfigError(
            f"store is {fleet.store!r}, but train_fleet got no sink; use veratune.Fleet"
        )
    if source is None and fleet.continue_from is not None:
        if not Path(fleet.continue_from).is_dir():
            raise ConfigError(f"continue_from: {fleet.continue_from!r} is no folder of adapters")
        source = AdapterFolder(Path(fleet.continue_from))
    out, start = Path(settings.out), time.monotonic()
    sink = sink or AdapterFolder(out / ADAPTERS)
    with processes() if by_torchrun else contextlib.nullcontext(lambda: None) as wait:
        if rank == 0 or settings.resume:
            open_folder(out, settings, vera, fleet, world)
        if rank == 0 and (world == 1 or by_torchrun):
            clean_folder(out)
        wait()  # the folder is prepared
        result = Worker(settings, vera, fleet, sink, source, finished, rank, world).run()
        wait()  # all results are there
    return summarise(out, time.monotonic() - start) if by_torchrun else result


def count_tenants(settings: TrainSettings, fleet: FleetSettings) -> int:
    """The number of tenants in a run's data. Raises DataError."""
    task = build_task(settings)
    return len(load_tenants(settings.data, task, fleet.tenant_column, settings.split).names)


def clean_folder(out: Path) -> None:
    """Remove what killed workers left half-written, while no worker runs."""
    for folder in (out, out / ADAPTERS):
        remove_partial(folder)


def open_folder(
    out: Path, settings: TrainSettings, vera: VeraConfig, fleet: FleetSettings, world: int
) -> None:
    """Check a run's folder: empty for a new run, with the same settings for a resumed one.

    Raises:
        OutputError: The folder is not empty, or there is nothing to resume.
        ConfigError: A setting differs.
    """
    now, path = run_settings(settings, vera) | dataclasses.asdict(fleet), out / SETTINGS
    now["workers"] = world  # they decide which tenants a worker has
    if settings.resume:
        if not path.is_file():
            raise OutputError(f"{out}: there is no fleet to resume (no {SETTINGS})")
        before = yaml.safe_load(path.read_text())
        for key in sorted(set(now) | set(before)):
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"{out}: the fleet was started with {key} = {before.get(key)!r}, "
                    f"not {now.get(key)!r}; resume it unchanged"
                )
    else:
        refuse_used(out, "choose another, empty it, or go on with --resume true")
        write_atomic(path, yaml.safe_dump(now, sort_keys=False).encode())
