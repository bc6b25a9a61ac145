"""Adapters from the server's own folders and from the Hugging Face Hub, where they are allowed.

A source is a folder, or the beginning of a hub address such as hf://user/.
"""

from collections.abc import Sequence
from pathlib import Path

from veratune.errors import AdapterFileError, DataError, UnsupportedError
from veratune.formats.hub import FILE_NAME, SCHEME, HubAddress, download, parse_address
from veratune.formats.lora_file import MAX_CONFIG_BYTES, pack_lora
from veratune.formats.peft_files import CONFIG_NAME, WEIGHTS_NAME


def read_source(path: str, sources: Sequence[str], max_bytes: int) -> bytes:
    """Read an adapter: a PEFT LoRA checkpoint, or veratune's own file.

    Args:
        path: A folder, a file, or hf://user/repo@revision.
        sources: What may be read.
        max_bytes: Largest file.

    Returns:
        The adapter as one file, for the store.

    Raises:
        UnsupportedError: No source allows the path.
        AdapterFileError: It is no adapter, or too large.
        DataError: The hub cannot be reached.
    """
    if path.startswith(SCHEME):
        return _from_hub(path, sources, max_bytes)
    place = _allowed(path, sources)
    if place.is_file():
        return _read(place, max_bytes)
    if (place / CONFIG_NAME).is_file():
        return pack_lora(
            _read(place / CONFIG_NAME, MAX_CONFIG_BYTES), _read(place / WEIGHTS_NAME, max_bytes)
        )
    return _read(place / FILE_NAME, max_bytes)


def _allowed(path: str, sources: Sequence[str]) -> Path:
    refused = UnsupportedError(
        "lora_path is in no folder that this server reads adapters from (--adapter-sources); send "
        "the files by PUT /v1/adapters/NAME"
    )
    try:
        place = Path(path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        raise refused from None
    roots = [Path(source).resolve() for source in sources if not source.startswith(SCHEME)]
    if not Path(path).is_absolute() or not any(place.is_relative_to(root) for root in roots):
        raise refused
    return place


def _from_hub(path: str, sources: Sequence[str], max_bytes: int) -> bytes:
    if not any(path.startswith(source) for source in sources if source.startswith(SCHEME)):
        raise UnsupportedError(
            "lora_path is a hub address that this server does not read (--adapter-sources); send "
            "the files by PUT /v1/adapters/NAME"
        )
    address = parse_address(path)
    if "#" in path:
        return _read(download(address), max_bytes)
    try:
        config = download(HubAddress(address.repo, address.revision, CONFIG_NAME))
    except DataError:
        return _read(download(address), max_bytes)
    weights = download(HubAddress(address.repo, address.revision, WEIGHTS_NAME))
    return pack_lora(_read(config, MAX_CONFIG_BYTES), _read(weights, max_bytes))


def _read(path: Path, max_bytes: int) -> bytes:
    """A file's content. Its errors show no path."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise AdapterFileError(f"{path.name} cannot be read: {error.strerror}") from None
    if len(data) > max_bytes:
        raise AdapterFileError(f"{path.name} has over {max_bytes:,} bytes, the most that is read")
    return data
