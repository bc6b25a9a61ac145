"""A fleet on many machines: Ray actors, each of which trains a share of the tenants.

    driver -> worker 0: tenants 0, w, 2w, ...      -> the output folder and the store
           -> worker 1: tenants 1, w + 1, ...      -> the same

A worker that dies is replaced, and the new one goes on from the last checkpoint of its share. The
output folder, and a store that is a file, are on a disk that all machines see.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

from veratune.config import VeraConfig
from veratune.errors import ConfigError, OutputError
from veratune.fleet.fleet import run_fleet
from veratune.training.fleet.loop import clean_folder, count_tenants, open_folder
from veratune.training.fleet.results import FleetResult, ResultFollower, summarise
from veratune.training.fleet.settings import FleetSettings, check_settings
from veratune.training.fleet.worker import Finished
from veratune.training.settings import TrainSettings

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0  # between two looks at the results
MAX_RESTARTS = 3  # of one worker
DEAD = (RayActorError, OutOfMemoryError, WorkerCrashedError)


class FleetWorker:
    """One worker: a process with a base model and a share of the tenants."""

    def run(
        self,
        settings: TrainSettings,
        vera: VeraConfig,
        fleet: FleetSettings,
        rank: int,
        world: int,
    ) -> None:
        """Train the share of worker `rank` of `world`."""
        run_fleet(settings, vera, fleet, rank=rank, world=world)


def train_on_ray(
    settings: TrainSettings,
    vera: VeraConfig,
    fleet: FleetSettings,
    *,
    finished: Finished | None = None,
) -> FleetResult:
    """Train a fleet with `fleet.workers` Ray actors, on this machine or a cluster (RAY_ADDRESS).

    Args:
        settings: As for `train_fleet`; `out` is on a disk that all machines see.
        vera: How every tenant is adapted.
        fleet: The fleet's settings.
        finished: Called after each tenant with its result, tenants finished and tenants in all.

    Raises:
        OutputError: A worker died more than three times; the run goes on with resume.
        VeratuneError: A mistake in settings, model or data.
    """
    start, world, out = time.monotonic(), fleet.workers, Path(settings.out)
    check_settings(settings, fleet)
    total = count_tenants(settings, fleet)
    open_folder(out, settings, dataclasses.replace(vera, seed=settings.basis_seed), fleet, world)
    clean_folder(out)
    resumed = dataclasses.replace(settings, resume=True)  # the folder is prepared
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    pool = _Pool(resumed, vera, fleet)
    follower = ResultFollower(out)
    done = 0
    try:
        for _ in pool.run():
            for line in follower.new_lines():
                done += 1
                if finished is not None:
                    finished(line, done, total)
    finally:
        pool.stop()
        if started_here:
            ray.shutdown()
    return summarise(out, time.monotonic() - start)


class _Pool:
    """The actors of a run, each replaced when it dies."""

    def __init__(self, settings: TrainSettings, vera: VeraConfig, fleet: FleetSettings) -> None:
        self._arguments = settings, vera, fleet
        self._world, self._out = fleet.workers, settings.out
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        options = share_of(nodes, fleet.workers, on_cpu=settings.device == "cpu")
        decorate: Any = ray.remote(**options)
        self._remote = decorate(FleetWorker)
        self._actors: dict[int, Any] = {}  # an actor lives as long as its handle
        self._restarts = dict.fromkeys(range(self._world), 0)

    def run(self) -> Iterator[None]:
        """Run all shares to their end. Yields every second, and once after the last."""
        running = {self._launch(rank): rank for rank in range(self._world)}
        while running:
            ready, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            for reference in ready:
                rank = running.pop(reference)
                try:
                    ray.get(reference)
                except RayTaskError as error:  # the same in a new worker
                    raise error.cause from None
                except DEAD as error:
                    self._count_death(rank, error)
                    running[self._launch(rank)] = rank
            yield

    def stop(self) -> None:
        """End all actors, also those in the middle of a step."""
        for actor in self._actors.values():
            ray.kill(actor)

    def _launch(self, rank: int) -> ObjectRef:
        self._actors[rank] = self._remote.remote()
        return self._actors[rank].run.remote(*self._arguments, rank, self._world)

    def _count_death(self, rank: int, error: Exception) -> None:
        self._restarts[rank] += 1
        log.warning("worker %d died and is replaced: %s", rank, type(error).__name__)
        if self._restarts[rank] > MAX_RESTARTS:
            raise OutputError(
                f"{self._out}: worker {rank} died {self._restarts[rank]} times; find out why (out "
                "of memory?), and go on with --resume true"
            ) from error


def share_of(
    nodes: list[Mapping[str, float]], workers: int, *, on_cpu: bool = False
) -> dict[str, Any]:
    """The resources of each worker: the most cores that fit so many workers, and a GPU each.

    Args:
        nodes: The cluster's machines: their numbers of "CPU" and "GPU".
        workers: How many are wanted.
        on_cpu: Whether GPUs are left alone.

    Returns:
        num_cpus and num_gpus, as `ray.remote` takes them.

    Raises:
        ConfigError: The cluster is too small for so many.
    """
    cores = [int(node.get("CPU", 0)) for node in nodes]
    gpus = 0 if on_cpu else sum(int(node.get("GPU", 0)) for node in nodes)
    if 0 < gpus < workers:
        raise ConfigError(
            f"workers is {workers}, but the cluster has {gpus} GPUs; each worker wants one: take "
            "fewer workers, or --device cpu"
        )
    for share in range(max(cores, default=0), 0, -1):
        if sum(count // share for count in cores) >= workers:
            return {"num_cpus": share, "num_gpus": min(gpus, 1)}
    raise ConfigError(
        f"workers is {workers}, but the cluster has {sum(cores)} cores; take fewer workers"
    )
