"""Train tenants' adapters on their feedback, and publish what is better on held-out feedback.

All adapters with enough new examples are one fleet. Each continues from its newest version. The
candidate is published if its loss on the adapter's held-out examples is lower than that of the
version that was live.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from veratune.adapter import Adapter
from veratune.config import VeraConfig
from veratune.errors import ConfigError, StoreError
from veratune.fleet.fleet import StoreAdapters
from veratune.formats import native
from veratune.serving.feedback.models import Example, FeedbackRun
from veratune.serving.feedback.repository import HELD_OUT_EVERY, FeedbackRepository
from veratune.serving.store.base import Store
from veratune.training.fleet.loop import ADAPTERS, train_fleet
from veratune.training.fleet.settings import FleetSettings
from veratune.training.fleet.worker import AdapterFolder
from veratune.training.settings import TrainSettings

MAX_EXAMPLES = 1000  # the newest of an adapter, unless max_examples says otherwise
Progress = Callable[[FeedbackRun], None]


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """One adapter of a run, whose name in the fleet is a number: any stored name will do."""

    tenant: str
    adapter: str
    examples: list[Example]


class _Stored:
    """The Source of a run: each adapter's newest version."""

    def __init__(self, store: Store, candidates: Mapping[str, _Candidate]) -> None:
        self.store, self.candidates = store, candidates

    def get(self, tenant: str) -> Adapter | None:
        candidate = self.candidates[tenant]
        return StoreAdapters(self.store, candidate.adapter).get(candidate.tenant)


def train_on_feedback(
    repository: FeedbackRepository,
    store: Store,
    settings: TrainSettings,
    vera: VeraConfig,
    fleet: FleetSettings,
    min_examples: int,
    finished: Progress | None = None,
) -> list[FeedbackRun]:
    """Train, evaluate and publish all adapters with enough new feedback.

    Args:
        repository: The feedback.
        store: Where adapters are read and published.
        settings: As for a fleet of task "instruction"; `data` and `eval_data` are set here.
        vera: How a tenant without an adapter is adapted; others must fit it.
        fleet: The fleet's settings.
        min_examples: New examples of an adapter that make it take part; at least 5, so that one of
            them is held out.
        finished: Called with each outcome.

    Returns:
        One outcome per adapter.

    Raises:
        VeratuneError: For mistakes in settings or model. A problem of one adapter is its outcome.
    """
    if min_examples < HELD_OUT_EVERY:
        raise ConfigError(
            f"min_examples is {min_examples}; at least {HELD_OUT_EVERY} are wanted, because one of "
            f"{HELD_OUT_EVERY} examples is held out for the evaluation"
        )
    limit = fleet.max_examples or MAX_EXAMPLES
    candidates = {
        f"a{i}": _Candidate(
            due.tenant, due.adapter, repository.usable(due.tenant, due.adapter, limit)
        )
        for i, due in enumerate(repository.due(min_examples))
    }
    if not candidates:
        return []
    out = Path(settings.out)
    data = out.parent / f"{out.name}-data"
    _write(data, candidates)
    settings = dataclasses.replace(
        settings,
        task="instruction",
        data=str(data / "train.jsonl"),
        eval_data=str(data / "eval.jsonl"),
        train_on="last",  # the turns before are the conversation as it was
        keep="last",  # the held-out loss judges the candidate, so it must not choose it
    )
    outcomes: list[FeedbackRun] = []

    def publish(line: dict[str, Any], _: int, __: int) -> None:
        candidate = candidates[line["tenant"]]
        run = _publish(repository, store, candidate, line, out / ADAPTERS)
        repository.finish(run, candidate.examples)
        outcomes.append(run)
        if finished is not None:
            finished(run)

    folder = AdapterFolder(out / ADAPTERS)
    source = _Stored(store, candidates)
    train_fleet(settings, vera, fleet, sink=folder, source=source, finished=publish)
    return outcomes


def _write(folder: Path, candidates: Mapping[str, _Candidate]) -> None:
    """Write the examples as the fleet's training and evaluation data."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("w") as train, (folder / "eval.jsonl").open("w") as held_out:
        for name, candidate in candidates.items():
            for example in candidate.examples:
                line = json.dumps({"tenant": name, "messages": example.messages})
                (held_out if example.held_out else train).write(line + "\n")


def _publish(
    repository: FeedbackRepository,
    store: Store,
    candidate: _Candidate,
    line: Mapping[str, Any],
    adapters: Path,
) -> FeedbackRun:
    """Decide about one candidate, and publish it."""
    run = FeedbackRun(candidate.tenant, candidate.adapter, time.time(), "refused")
    if line["status"] != "trained":
        return dataclasses.replace(run, reason=_anonymous(line["reason"], line["tenant"]))
    if not line["held_out"]:
        return dataclasses.replace(run, reason="no held-out example is left to evaluate on")
    before, after = line["before"]["loss"], line["after"]["loss"]
    run = dataclasses.replace(run, before=before, after=after)
    if not after < before:
        reason = f"held-out loss {after:.4f} is not below {before:.4f} of the live version"
        return dataclasses.replace(run, outcome="rejected", reason=reason)
    data = (adapters / f"{line['tenant']}{native.SUFFIX}").read_bytes()
    if not repository.has(candidate.tenant, candidate.examples):
        return dataclasses.replace(run, reason="its examples were deleted meanwhile")
    try:
        version = store.put(candidate.tenant, candidate.adapter, data)
    except StoreError as error:
        return dataclasses.replace(run, reason=f"the adapter could not be stored: {error}")
    if not repository.has(candidate.tenant, candidate.examples):  # deleted while it was stored
        store.delete(candidate.tenant, candidate.adapter)
        return dataclasses.replace(run, reason="its examples were deleted meanwhile")
    return dataclasses.replace(run, outcome="published", version=version.number)


def _anonymous(reason: str, name: str) -> str:
    """A reason without the number that stands for the adapter in its fleet."""
    return reason.replace(f"tenant {name!r}", "the adapter")


def summary(outcomes: Sequence[FeedbackRun]) -> dict[str, int]:
    """How many adapters had each outcome."""
    kinds = ("published", "rejected", "refused")
    return {kind: sum(run.outcome == kind for run in outcomes) for kind in kinds}
