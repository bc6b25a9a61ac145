"""Write a base model with an adapter merged into its weights: W + ΔW, a plain model."""

import os
from pathlib import Path

import safetensors

from veratune.attach import detach
from veratune.errors import OutputError
from veratune.inference.adapted import LoadedModel
from veratune.layers.merging import MergeReport
from veratune.merging import merge


def save_merged(loaded: LoadedModel, folder: Path) -> list[MergeReport]:
    """Merge the adapter into the weights and write the plain model into a folder.

    Args:
        loaded: The model with its adapter; afterwards it is the merged plain model.
        folder: An empty folder. Its files get the process's umask.

    Returns:
        The rounding error of each merged weight.

    Raises:
        OutputError: The folder cannot be written, such as on a full disk.
        VeratuneError: The adapter cannot be merged.
    """
    report = merge(loaded.model)
    detach(loaded.model, keep_merged=True)
    try:
        loaded.task.save(loaded.model, loaded.processor, folder)
    except (OSError, safetensors.SafetensorError) as error:
        # safetensors reports a full disk as an error of its own.
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise OutputError(
            f"the merged model could not be written: {reason}; nothing was left there"
        ) from error
    _apply_umask(folder)
    return report


def _apply_umask(folder: Path) -> None:
    """Give every file the permissions that open() would: safetensors and others choose 0600."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~umask)
