"""The command veratune train-feedback."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from veratune.cli.parsing import Parser, new_parser, parse, print_json, split
from veratune.cli.train_ import SKIPPED
from veratune.config import VeraConfig
from veratune.errors import ConfigError
from veratune.training.fleet.settings import FleetSettings
from veratune.training.settings import TrainSettings

_SET_HERE = {"data", "eval_data", "task", "resume", "keep", "train_on"}  # by the command itself


def parser() -> Parser:
    out = new_parser(
        "train-feedback",
        "Train all adapters with enough new feedback as one fleet, and publish those that are "
        "better on held-out feedback.",
    )
    out.add_argument("--config", type=str, help="YAML file of these settings; flags override it")
    out.add_argument("--json", type=bool, default=False, help="print the result as one JSON object")
    out.add_argument("--feedback", type=str, required=True, help="feedback.db of veratune serve")
    out.add_argument(
        "--min-examples", type=int, default=20, help="new examples that start training"
    )
    out.add_class_arguments(FleetSettings, skip={"continue_from", "tenant_column"})
    out.add_class_arguments(TrainSettings, skip=_SET_HERE)
    out.add_class_arguments(VeraConfig, skip=SKIPPED)
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    fleet, vera = split(flags, FleetSettings), split(flags, VeraConfig)
    flags.data, flags.task = "", "instruction"
    settings = split(flags, TrainSettings)
    if fleet.store is None:
        raise ConfigError("--store is wanted: where adapters are read and published")
    if not Path(flags.feedback).is_file():
        raise ConfigError(f"--feedback {flags.feedback}: there is no such file")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("train-feedback runs in one process; start it without torchrun")
    from veratune.fleet.feedback import summary, train_on_feedback
    from veratune.fleet.fleet import open_store
    from veratune.serving.feedback.models import FeedbackRun
    from veratune.serving.feedback.repository import FeedbackRepository

    def show(run: FeedbackRun) -> None:
        version = f" as version {run.version}" if run.version else ""
        reason = f": {run.reason}" if run.reason else ""
        print(f"{run.tenant}/{run.adapter} {run.outcome}{version}{reason}", file=sys.stderr)

    repository, store = FeedbackRepository(flags.feedback), open_store(fleet.store)
    try:
        outcomes = train_on_feedback(
            repository, store, settings, vera, fleet, flags.min_examples, show
        )
    finally:
        store.close()
        repository.close()
        out = Path(settings.out)  # it holds tenants' examples
        shutil.rmtree(out.with_name(f"{out.name}-data"), ignore_errors=True)
    if flags.json:
        print_json(summary(outcomes))
    elif not outcomes:
        print(f"no adapter has {flags.min_examples} new examples")
    return 0
