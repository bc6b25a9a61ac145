"""A fleet on many machines: Ray actors, each of which trains a share of the tenants.

    driver -> worker 0: tenants 0, w, 2w, ...      -> the output folder and the store
           -> worker 1: tenants 1, w + 1, ...      -> the same

A worker that dies is replaced, and the new one goes on from the last checkpoint of its share. The
output folder, and a store that is a file, are on a disk that all machines see.
"""

import dataclasses
import logging
import time
from pathlib import Path

import ray
from ray.exceptions import RayActorError, RayTaskError

from veratune.config import VeraConfig
from veratune.errors import OutputError, VeratuneError
from veratune.fleet.fleet import run_fleet
from veratune.training.fleet.loop import open_folder
from veratune.training.fleet.report import read_results
from veratune.training.fleet.settings import FleetSettings
from veratune.training.fleet.worker import Finished, FleetResult
from veratune.training.settings import TrainSettings

log = logging.getLogger(__name__)
POLL = 1.0  # seconds between two looks at the results


class FleetWorker:
    """One worker: a process with a base model and a share of the tenants."""

    def run(
        self,
        settings: TrainSettings,
        vera: VeraConfig,
        fleet: FleetSettings,
        rank: int,
        world: int,
    ) -> str | None:
        """Train the share of worker `rank` of `world`. Returns a VeratuneError's text, or None."""
        try:
            run_fleet(settings, vera, fleet, rank=rank, world=world)
        except VeratuneError as error:
            return str(error)
        return None


def train_on_ray(
    settings: TrainSettings,
    vera: VeraConfig,
    fleet: FleetSettings,
    *,
    finished: Finished | None = None,
    max_restarts: int = 3,
) -> FleetResult:
    """Train a fleet with `fleet.workers` Ray actors, on this machine or a cluster (RAY_ADDRESS).

    Args:
        settings: As for `train_fleet`; `out` is on a disk that all machines see.
        vera: How every tenant is adapted.
        fleet: The fleet's settings.
        finished: Called after each tenant with its result and, twice, the tenants finished.
        max_restarts: How often one worker may be replaced.

    Raises:
        OutputError: A worker died more often than that; the run goes on with resume.
        VeratuneError: A mistake in settings, model or data.
    """
    start, world = time.monotonic(), fleet.workers
    out = Path(settings.out)
    open_folder(out, settings, dataclasses.replace(vera, seed=settings.basis_seed), fleet, world)
    resumed = dataclasses.replace(settings, resume=True)  # the folder is prepared
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        remote = ray.remote(num_cpus=1)(FleetWorker)

        def launch(rank: int) -> tuple[object, int]:
            worker = remote.remote()
            actors[rank] = worker
            return worker.run.remote(resumed, vera, fleet, rank, world), rank

        actors: dict[int, object] = {}  # an actor lives as long as its handle
        restarts = dict.fromkeys(range(world), 0)
        running = dict(launch(rank) for rank in range(world))
        seen: set[str] = set()
        while running:
            ready, _ = ray.wait(list(running), timeout=POLL)
            for reference in ready:
                rank = running.pop(reference)
                try:
                    problem = ray.get(reference)
                except (RayActorError, RayTaskError) as error:
                    restarts[rank] += 1
                    log.warning("worker %d died and is replaced: %s", rank, type(error).__name__)
                    if restarts[rank] > max_restarts:
                        raise OutputError(
                            f"{out}: worker {rank} died {restarts[rank]} times; find out why, and "
                            "go on with --resume true"
                        ) from error
                    running.update([launch(rank)])
                else:
                    if problem is not None:
                        raise VeratuneError(problem)
            for line in read_results(out):
                if finished is not None and line["tenant"] not in seen:
                    seen.add(line["tenant"])
                    finished(line, len(seen), len(seen))
    finally:
        if started_here:
            ray.shutdown()
    return _result(settings, time.monotonic() - start)


def _result(settings: TrainSettings, seconds: float) -> FleetResult:
    """The results of all workers as one."""
    lines = read_results(Path(settings.out))
    done = [line for line in lines if line["status"] == "trained"]
    return FleetResult(
        out=settings.out,
        tenants=len(lines),
        trained=len(done),
        refused=len(lines) - len(done),
        steps=sum(line["steps"] for line in done),
        seconds=seconds,
        bytes=sum(line["bytes"] for line in done),
        results=lines,
    )
