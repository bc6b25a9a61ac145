"""train_fleet: from settings and tenants' data to one adapter per tenant."""

import dataclasses
import os
from pathlib import Path

import yaml

from veratune.config import VeraConfig
from veratune.errors import ConfigError, OutputError
from veratune.formats.atomic import refuse_used, write_atomic
from veratune.training.fleet.settings import FleetSettings, check_settings
from veratune.training.fleet.worker import (
    AdapterFolder,
    Finished,
    FleetResult,
    Sink,
    Source,
    Worker,
)
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
        rank, world: This worker and their number; default torchrun's RANK and WORLD_SIZE.

    Raises:
        VeratuneError: for mistakes in settings, model or data. A mistake in one tenant's data
            refuses that tenant alone, unless `fleet.strict`.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world = int(os.environ.get("WORLD_SIZE", "1")) if world is None else world
    vera = dataclasses.replace(vera, seed=settings.basis_seed)
    check_settings(settings, fleet)
    if sink is None and fleet.store is not None:
        raise ConfigError(
            f"store is {fleet.store!r}, but train_fleet got no sink; use veratune.Fleet"
        )
    if source is None and fleet.continue_from is not None:
        if not Path(fleet.continue_from).is_dir():
            raise ConfigError(f"continue_from: {fleet.continue_from!r} is no folder of adapters")
        source = AdapterFolder(Path(fleet.continue_from))
    out = Path(settings.out)
    _open(out, settings, vera, fleet, rank)
    sink = sink or AdapterFolder(out / ADAPTERS)
    return Worker(settings, vera, fleet, sink, source, finished, rank, world).run()


def _open(
    out: Path, settings: TrainSettings, vera: VeraConfig, fleet: FleetSettings, rank: int
) -> None:
    """A new run wants an empty folder, a resumed one the settings it was started with."""
    now, path = run_settings(settings, vera) | dataclasses.asdict(fleet), out / SETTINGS
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
    elif rank == 0:
        refuse_used(out, "choose another, empty it, or go on with --resume true")
        write_atomic(path, yaml.safe_dump(now, sort_keys=False).encode())
