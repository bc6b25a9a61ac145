"""The checkpoint of a fleet's active tenants: one safetensors file per worker."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from veratune.errors import OutputError
from veratune.training.fleet.run import TenantRun


@dataclasses.dataclass
class ActiveState:
    """One active tenant in a checkpoint.

    Attributes:
        run: The run's counters and scores, as JSON types.
        values, exp_avg, exp_avg_sq: Its rows, shape (width,).
        best: The row of its best evaluation, or None.
    """

    run: dict[str, Any]
    values: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    best: Tensor | None


def write_state(
    path: Path,
    runs: Sequence[TenantRun],
    tensors: dict[str, Tensor],
    best: Tensor | None,
) -> None:
    """Write the rows of active tenants, atomically.

    Args:
        tensors: "values", "exp_avg" and "exp_avg_sq" of all slots, shape (slots, width).
        best: The best rows of all slots, or None.
    """
    slots = torch.tensor([run.slot for run in runs], dtype=torch.long)
    stored = {name: t.index_select(0, slots.to(t.device)).cpu() for name, t in tensors.items()}
    if best is not None:
        stored["best"] = best.index_select(0, slots.to(best.device)).cpu()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        safetensors.torch.save_file(
            stored, temporary, {"runs": json.dumps([run.state() for run in runs])}
        )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path}: the checkpoint cannot be written ({error.strerror})") from error


def read_state(path: Path, width: int) -> dict[str, ActiveState]:
    """Active tenants of a checkpoint by name; empty if there is none. Raises OutputError for a
    damaged one.
    """
    if not path.is_file():
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            runs = json.loads((file.metadata() or {})["runs"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise OutputError(
            f"{path}: the checkpoint is damaged ({error}); delete it to start its tenants again"
        ) from None
    if any(t.shape != (len(runs), width) for t in tensors.values()):
        raise OutputError(f"{path}: the checkpoint is of another model or other settings")
    best = tensors.get("best")
    return {
        run["name"]: ActiveState(
            run,
            tensors["values"][i],
            tensors["exp_avg"][i],
            tensors["exp_avg_sq"][i],
            None if best is None else best[i],
        )
        for i, run in enumerate(runs)
    }
