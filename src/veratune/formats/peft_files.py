"""The files of a PEFT checkpoint: their names, and how they are read and written.

A checkpoint is a folder with `adapter_config.json` and `adapter_model.safetensors`. Every tensor of
a layer is called `base_model.model.<layer>.<what>`. Source: peft 0.21.2, utils/save_and_load.py.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from veratune.errors import AdapterFileError
from veratune.formats.atomic import new_folder

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
_PICKLE_NAME = "adapter_model.bin"
_MAX_CONFIG_BYTES = 2**24


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a PEFT configuration."""
    return (folder / CONFIG_NAME).exists()


def read_settings(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises AdapterFileError if it is missing or not a JSON object."""
    path = folder / CONFIG_NAME
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise AdapterFileError(
                f"{CONFIG_NAME} has {path.stat().st_size:,} bytes; at most {_MAX_CONFIG_BYTES:,}"
                " are read"
            )
        settings = json.loads(path.read_text())
    except OSError as error:
        raise AdapterFileError(f"no PEFT checkpoint: {CONFIG_NAME}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{CONFIG_NAME} is not JSON ({error})") from None
    if not isinstance(settings, dict):
        raise AdapterFileError(f"{CONFIG_NAME} is not a JSON object")
    return settings


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read adapter_model.safetensors. Raises AdapterFileError if it is missing or damaged."""
    try:
        return safetensors.torch.load((folder / WEIGHTS_NAME).read_bytes())
    except OSError as error:
        hint = f"; it holds {_PICKLE_NAME}, a pickle, which is never read: save it as safetensors"
        raise AdapterFileError(
            f"{WEIGHTS_NAME}: {error.strerror}{hint if (folder / _PICKLE_NAME).exists() else ''}"
        ) from None
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise AdapterFileError(
            f"{WEIGHTS_NAME} is not a whole safetensors file ({error})"
        ) from None


def write_checkpoint(
    folder: str | Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a PEFT checkpoint. Raises OutputError; then nothing is written."""
    data = safetensors.torch.save(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, {"format": "pt"}
    )
    with new_folder(Path(folder)) as path:
        (path / WEIGHTS_NAME).write_bytes(data)
        (path / CONFIG_NAME).write_text(json.dumps(settings, indent=2, sort_keys=True))
