"""save_pretrained and from_pretrained of an adapted Hugging Face model.

`attach` gives an adapted model a `save_pretrained` that writes the base model as transformers does
and each adapter beside it, in the folder `veratune`. transformers alone loads the base model from
there; `from_pretrained` loads both.
"""

import functools
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veratune.adapter import extract, install
from veratune.errors import AdapterFileError, UnsupportedError
from veratune.formats import native
from veratune.formats.atomic import write_atomic
from veratune.layers.head import VeraHead
from veratune.layers.wrapper import VeraLayer
from veratune.model_state import (
    ON_ADAPTED,
    ON_PLAIN,
    active,
    adapters,
    merged_adapter,
)
from veratune.selection import use

FOLDER = "veratune"
INDEX = "adapters.json"
_MAX_INDEX = 1_000_000  # bytes
_METHOD = "save_pretrained"


def watch_saving(model: nn.Module) -> None:
    """Let a transformers model's `save_pretrained` write its adapters too."""
    method = getattr(type(model), _METHOD, None)
    if method is not None and "state_dict" in inspect.signature(method).parameters:
        model.__dict__[_METHOD] = functools.partial(_save_pretrained, model)


def stop_watching(model: nn.Module) -> None:
    """Undo `watch_saving`."""
    model.__dict__.pop(_METHOD, None)


def from_pretrained(path: str | Path, **options: Any) -> nn.Module:
    """Load a model that `save_pretrained` wrote while it had adapters, with its adapters.

    Args:
        path: The folder, or a hub id.
        options: Passed to transformers' `from_pretrained`, such as dtype or device_map.

    Returns:
        A model of the class that was saved; its adapters do not require gradients, and the one
        that was active is. A folder without adapters gives the plain model.

    Raises:
        AdapterFileError: The list of adapters, or an adapter's file, is damaged.
        BaseModelError: An adapter was trained on another base model.
        UnsupportedError: The model's class is not one of transformers'.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise UnsupportedError(
            f"{path}: its config.json names the class {name!r}, which transformers does not have; "
            "load the base model yourself, then each file in its folder veratune with "
            "veratune.load"
        )
    index = _file(path, INDEX)
    entries = _read_index(index) if index is not None else {"adapters": [], "active": None}
    model: nn.Module = kind.from_pretrained(path, **options)
    for adapter in entries["adapters"]:
        file = _file(path, adapter + native.SUFFIX)
        if file is None:
            raise AdapterFileError(
                f"{path}: {FOLDER}/{INDEX} lists the adapter {adapter!r}, but its file is missing"
            )
        install(model, native.read(file), adapter)
    if entries["adapters"]:
        use(model, entries["active"])
    return model


def _save_pretrained(model: nn.Module, save_directory: str | Path, **options: Any) -> Any:
    """The class's own save_pretrained; adapters go beside the base model, a merged one into it."""
    merged, names = merged_adapter(model), list(adapters(model))
    state = options.pop("state_dict", None)
    state = _plain_state(model, merged, model.state_dict() if state is None else state)
    if options.get("push_to_hub"):
        raise UnsupportedError(
            "save_pretrained(push_to_hub=True) would push the base model without its adapters; "
            "save to a folder and upload that, or detach first"
        )
    result = type(model).save_pretrained(model, save_directory, state_dict=state, **options)  # type: ignore[attr-defined]
    folder = Path(save_directory) / FOLDER
    if merged is not None:
        (folder / INDEX).unlink(missing_ok=True)
        warnings.warn(
            f"save_pretrained wrote the plain model with adapter {merged!r} merged in, and no "
            "adapter beside it",
            stacklevel=2,
        )
        return result
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        native.write(extract(model, name), folder / (name + native.SUFFIX))
    index = json.dumps({"version": 1, "adapters": names, "active": active(model)})
    write_atomic(folder / INDEX, index.encode())
    warnings.warn(
        f"save_pretrained wrote the base model, and {len(names)} adapters in {folder}; "
        "transformers "
        "alone loads the bare base model, veratune.from_pretrained loads both",
        stacklevel=2,
    )
    return result


def _plain_state(
    model: nn.Module, merged: str | None, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """A state dict without vectors: the base model's, or the merged model's."""
    out = {key: value for key, value in state.items() if ".vera." not in f".{key}"}
    if merged is None:
        return out
    for path, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, VeraLayer):
            continue
        if isinstance(layer, VeraHead):
            source = layer.vera[merged] if merged in layer.vera else layer.base
        else:
            source = layer.base
        out |= {f"{path}.{key}": value for key, value in source.state_dict().items()}
    return out


def _read_index(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_INDEX:
        raise AdapterFileError(f"{path}: over {_MAX_INDEX} bytes, which no list of adapters has")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version, names, chosen = found["version"], found["adapters"], found["active"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{path}: not a list of adapters ({error})") from None
    if version != 1:
        raise AdapterFileError(f"{path}: version {version!r}; this veratune reads version 1")
    plain = isinstance(names, list) and all(_is_name(name) for name in names)
    if not plain or (chosen is not None and chosen not in names):
        raise AdapterFileError(f"{path}: its adapters are not a list of names, or `active` is none")
    return {"adapters": names, "active": chosen}


def _is_name(name: object) -> bool:
    """Whether a name can be a file's without leaving the folder."""
    return isinstance(name, str) and bool(name) and not set(name) & set("/\\.\0")


def _file(path: str | Path, name: str) -> Path | None:
    """A file of the folder `veratune`, from the disk or the hub; None if it is not there."""
    if Path(path).is_dir():
        file = Path(path) / FOLDER / name
        return file if file.is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(
        str(path),
        f"{FOLDER}/{name}",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


ON_ADAPTED.append(watch_saving)
ON_PLAIN.append(stop_watching)
