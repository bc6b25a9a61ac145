"""The folder of a training run: its settings, its results, and the checkpoints to resume from."""

import dataclasses
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import yaml

from veratune.config import VeraConfig
from veratune.errors import ConfigError, OutputError
from veratune.formats.atomic import refuse_used, write_atomic
from veratune.training.methods import Method, has_whole_file
from veratune.training.settings import TrainSettings

RUN = "run.yaml"
RESULTS = "results.json"
BEFORE = "before.json"
HISTORY = "history.json"  # what Trainer logged: losses and learning rates by step
CHECKPOINTS = "checkpoints"
# Settings that may change when a run is resumed.
FREE = frozenset({"resume", "preview", "report_to", "out"})
_STATE = "trainer_state.json"


def is_first_process() -> bool:
    """Whether this process writes files: the only one, or rank 0 of several."""
    return int(os.environ.get("RANK", "0")) == 0


def check_out(settings: TrainSettings, vera: VeraConfig) -> None:
    """Check that a new run's folder is empty, or that a resumed run's settings are unchanged.

    Raises:
        OutputError: The folder is in use, or there is no run to resume.
        ConfigError: A setting differs from the run's.
    """
    out = Path(settings.out)
    if not settings.resume:
        refuse_used(out, "choose another, empty it, or go on with --resume true")
        return
    run = out / RUN
    if not run.is_file():
        raise OutputError(
            f"{out}: there is no run to resume (no {RUN}); leave --resume out to start one"
        )
    now = run_settings(settings, vera)
    # A setting that is newer than the run had its default.
    defaults = {
        f.name: f.default
        for kind in (TrainSettings, VeraConfig)
        for f in dataclasses.fields(kind)
        if f.name in now and f.default is not dataclasses.MISSING
    }
    before = defaults | yaml.safe_load(run.read_text())
    for key in sorted(set(before) | set(now)):
        if key not in FREE | {"head"} and _plain(before.get(key)) != _plain(now.get(key)):
            raise ConfigError(
                f"{out}: the run was started with {key} = {before.get(key)!r}, "
                f"not {now.get(key)!r}; resume it unchanged"
            )


def write_settings(settings: TrainSettings, vera: VeraConfig) -> None:
    """Write a new run's settings into its folder, as --config reads them."""
    if not settings.resume:
        text = yaml.safe_dump(run_settings(settings, vera), sort_keys=False)
        write_atomic(Path(settings.out) / RUN, text.encode())


def run_settings(settings: TrainSettings, vera: VeraConfig) -> dict[str, Any]:
    """The run's settings and the adapter's in one mapping."""
    adapter = {k: v for k, v in vera.to_dict().items() if k not in ("seed", "dtype")}
    return {k: v for k, v in settings.to_dict().items() if k not in FREE} | adapter


def last_checkpoint(folder: Path, method: Method) -> Path | None:
    """The latest checkpoint whose files are all whole; None without one.

    Trainer writes its state last, so a checkpoint that was cut off has none. A disk that filled up
    can also leave a truncated optimizer or random state beside it.
    """
    checkpoints = sorted(
        folder.glob("checkpoint-*"), key=lambda p: int(p.name.rsplit("-", 1)[-1]), reverse=True
    )
    return next((path for path in checkpoints if _is_whole(path, method)), None)


def _is_whole(checkpoint: Path, method: Method) -> bool:
    try:
        json.loads((checkpoint / _STATE).read_text())
    except (OSError, ValueError):
        return False
    states = [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]
    return all(_is_whole_zip(path) for path in states) and has_whole_file(method, checkpoint)


def _is_whole_zip(path: Path) -> bool:
    """Whether a file that torch.save wrote, a zip archive, is complete: all checksums agree."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _plain(value: Any) -> Any:
    """A setting as YAML reads it back: tuples become lists."""
    return list(value) if isinstance(value, tuple) else value
