"""save and load: an adapter between a model and the disk."""

from pathlib import Path

from torch import nn

from veratune.adapter import Adapter, extract, install
from veratune.basis.basis import Basis
from veratune.errors import AdapterFileError, InvalidNameError
from veratune.formats import hub, native, peft
from veratune.formats.peft_files import CONFIG_NAME, is_checkpoint


def save(model: nn.Module, path: str | Path, name: str | None = None) -> int:
    """Write one adapter of a model to a file of its own. Returns the file's size in bytes.

    name: default the active adapter, or the only one. Saving while merged saves the adapter all the
    same. Raises AdapterNotFoundError for an unknown name, OutputError if the file cannot be
    written; then nothing changed.
    """
    path = Path(path)
    if path.suffix != native.SUFFIX:
        raise InvalidNameError(f"{path}: an adapter's file is called something{native.SUFFIX}")
    return native.write(extract(model, name), path)


def load(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    trainable: bool = False,
    check_base: bool = True,
    basis: Basis | None = None,
) -> str:
    """Put an adapter from a file into a model and make it the active one. Returns its name.

    path: a veratune file, the folder of a PEFT VeRA checkpoint, or hf://user/repo@revision. name:
    default the file's own, without its suffix (the repository's name for the hub). trainable:
    whether to train it further. check_base: see `veratune.adapter.install`. basis: the LoRA that
    the adapter was trained over, from `read_lora`. Raises AdapterFileError (damaged, tampered with,
    another basis), BaseModelError (another base model) or AdapterStateError (the name is taken);
    then the model is as it was.
    """
    name = name or default_name(path)
    install(
        model,
        read(path, model),
        name,
        trainable=trainable,
        check_base=check_base,
        basis=basis,
    )
    return name


def default_name(path: str | Path) -> str:
    """The adapter's name for a file (without suffix) or a hub address (the repository's name)."""
    if hub.is_address(path):
        return hub.parse_address(str(path)).repo.rpartition("/")[2].replace(".", "-")
    return Path(path).stem


def read(path: str | Path, model: nn.Module) -> Adapter:
    """Read an adapter from a veratune file, a PEFT folder or the hub; `model` gives a PEFT
    checkpoint its sizes.
    """
    path = hub.download(str(path)) if hub.is_address(path) else Path(path)
    if path.is_dir():
        if not is_checkpoint(path):
            raise AdapterFileError(
                f"{path}: a folder without {CONFIG_NAME}; give an adapter file or a PEFT checkpoint"
            )
        return peft.read(path, model)
    return native.read(path)
