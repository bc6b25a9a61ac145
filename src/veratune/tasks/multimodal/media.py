"""Images and sound in rows of data: paths, bytes, data URLs and, if allowed, web addresses."""

import base64
import binascii
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from datasets import Audio, Dataset, Features, Image, LargeList, List

from veratune.tasks.data import load_examples

Media = dict[str, Any]  # {"bytes": bytes or None, "path": text or None}, as data sets store it
FOLDER = "media_folder"  # the column of the folder that relative paths start from
_SECONDS = 30.0  # for one download
_CHUNK = 2**16


def load_media_examples(source: str, split: str, config: str | None) -> Dataset:
    """The rows of one split, with encoded media and the folder of relative paths.

    Args:
        source: A file, a folder of splits, or a data set id.
        split: The split.
        config: Configuration of the data set id.

    Returns:
        The rows. Images and sound stay encoded; local data has the column `media_folder`.

    Raises:
        DataError: The data cannot be found or read.
    """
    examples = load_examples(source, split, config)
    features = cast(Features, _undecoded(examples.features))
    if features != examples.features:
        examples = examples.cast(features)
    path = Path(source)
    if path.exists() and FOLDER not in examples.column_names:
        folder = str(path if path.is_dir() else path.parent)
        examples = examples.add_column(FOLDER, [folder] * len(examples))
    return examples


def media_of(value: Any, folder: str, max_bytes: int, allow_urls: bool) -> Media:
    """Find an image or sound that a row names. Files are not read, only measured.

    Args:
        value: A path, a data: URL, an http(s) URL, bytes, or {bytes, path}.
        folder: The folder that a relative path starts from; "" for the working folder.
        max_bytes: Most bytes of the encoded media.
        allow_urls: Fetch http(s) URLs.

    Returns:
        {bytes, path}: one of them is None.

    Raises:
        ValueError: The file is missing, is too large, or the value is of another kind.
    """
    path = None
    if isinstance(value, Mapping):
        if not set(value) <= {"bytes", "path"}:
            raise ValueError(f"the fields {', '.join(value)}; bytes or path is wanted")
        path, value = value.get("path"), value.get("bytes")
        value = path if value is None else value
    if isinstance(value, str) and value.startswith("data:"):
        value = _from_data_url(value, max_bytes)
    elif isinstance(value, str) and value.startswith(("http://", "https://")):
        if not allow_urls:
            raise ValueError(
                f"{value[:80]} is a web address, which is not fetched; give the file's path, or "
                "set --allow-urls"
            )
        value = _fetch(value, max_bytes)
    if isinstance(value, bytes):
        _check_size(len(value), max_bytes)
        return {"bytes": value, "path": None}
    if not isinstance(value, str) or not value:
        raise ValueError("it is missing" if value is None else f"{value!r:.80} is no path or bytes")
    file = Path(folder) / value
    if not file.is_file():
        raise ValueError(f"{value}: no such file in {folder or 'the working folder'}")
    _check_size(file.stat().st_size, max_bytes)
    return {"bytes": None, "path": str(file)}


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ValueError(f"{size:,} bytes; at most {max_bytes:,} are read")


def _from_data_url(url: str, max_bytes: int) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"{head[:40]!r} is no data: URL in base64")
    _check_size(len(data) * 3 // 4, max_bytes)
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"a data: URL whose base64 is broken ({error})") from None


def _fetch(url: str, max_bytes: int) -> bytes:
    """What a web address holds, bounded in bytes and time."""
    deadline, data = time.monotonic() + _SECONDS, b""
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as response:
            while chunk := response.read1(_CHUNK):
                data += chunk
                _check_size(len(data), max_bytes)
                if time.monotonic() > deadline:
                    raise ValueError(f"{url[:80]}: not read in {_SECONDS:.0f} seconds")
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(f"{url[:80]}: cannot be fetched ({error})") from None
    return data


def _undecoded(feature: Any) -> Any:
    """A feature with encoded images and sound in place of decoded ones."""
    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, Audio):
        return Audio(sampling_rate=feature.sampling_rate, decode=False)
    if isinstance(feature, Mapping):
        kind = Features if isinstance(feature, Features) else dict
        return kind({name: _undecoded(inner) for name, inner in feature.items()})
    if isinstance(feature, List | LargeList):
        return type(feature)(_undecoded(cast(Any, feature).feature))
    return feature
