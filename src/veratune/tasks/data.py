"""Rows of data from local files, folders and Hugging Face data sets."""

import codecs
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from datasets import Dataset, Features, IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable
from huggingface_hub.errors import HfHubHTTPError

from veratune.errors import DataError, near

# What the file's ending says about its content: the builder of `datasets`, and its options.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"delimiter": "\t"}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}
_HEAD = 100  # rows of a stream that are read to know its columns
# Data sets of so many examples are encoded through the cache, whose key alone takes 0.1 s.
CACHED_FROM = 2000
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}


@dataclasses.dataclass(frozen=True)
class Stream:
    """Rows that are read one after the other.

    Attributes:
        rows: The rows.
        head: The first of them, with their columns and types.
    """

    rows: IterableDataset
    head: Dataset


def load_examples(source: str, split: str = "train", config: str | None = None) -> Dataset:
    """The rows of one split.

    source: a file (jsonl, json, csv, tsv, parquet, txt), a folder of such files named after their
    splits, or the id of a Hugging Face data set. config: that data set's configuration, such as
    "mrpc" of "glue". Raises DataError: not found, another format, no such split, unreadable, or
    empty.
    """
    path = _local_file(source, split, config)
    examples = _from_hub(source, split, config) if path is None else _read_file(path)
    if len(examples) == 0:
        raise DataError(f"{path or source}: the data set is empty; at least one row is wanted")
    return examples


def stream_examples(source: str, split: str = "train", config: str | None = None) -> Stream:
    """The rows of one split as they are read, with bounded memory.

    Args:
        source: As for `load_examples`.
        split: The split.
        config: Configuration of the data set id.

    Raises:
        DataError: As for `load_examples`, as far as the first rows show it.
    """
    path = _local_file(source, split, config)
    stream = _from_hub(source, split, config, True) if path is None else _read_file(path, True)
    head = _read_head(path or source, stream)
    return Stream(stream, Dataset.from_list(head))


def _read_head(source: Path | str, stream: IterableDataset) -> list[Any]:
    try:
        head = list(stream.take(_HEAD))
    except Exception as error:  # every builder has its own exceptions for bad content
        cause = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise DataError(f"{source}: cannot be read: {cause}") from error
    if not head:
        raise DataError(f"{source}: the data set is empty; at least one row is wanted")
    return head


def _local_file(source: str, split: str, config: str | None) -> Path | None:
    """The local file of a split; None for a data set id."""
    path = Path(source)
    if path.is_dir():
        path = _in_folder(path, split)
    if path.is_file():
        if config is not None:
            raise DataError(
                f"{path} is a file; a configuration ({config!r}) is only for data set ids"
            )
        return path
    if path.suffix in READERS or path.is_absolute() or source.startswith((".", "~")):
        raise DataError(f"{source}: no such file or folder")
    return None


def small_dataset(
    columns: Mapping[str, Sequence[Any]], features: Features | None = None
) -> Dataset:
    """A data set in memory that nothing caches.

    `Dataset.from_dict` hashes the content for its cache's key, which takes longer than tokenizing
    a few examples.

    Args:
        columns: The values of each column.
        features: Their types; None infers them.
    """
    schema = None if features is None else features.arrow_schema
    table = InMemoryTable.from_pydict(dict(columns), schema=schema)
    return Dataset(table, fingerprint=generate_random_fingerprint())


def read_text(path: Path) -> str:
    """Read a text file as UTF-8.

    Raises:
        DataError: The file cannot be read, or has another encoding such as Latin-1.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 (byte {error.start:,} is {error.object[error.start]:#04x}); "
            f"convert it, such as with: iconv -f latin1 -t utf8 {path.name}"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def has_split(source: str, split: str) -> bool:
    """Whether a folder has a file for a split; asked before an optional split is loaded."""
    path = Path(source)
    try:
        return path.is_dir() and _in_folder(path, split).is_file()
    except DataError:
        return False


def pick_columns(
    examples: Dataset,
    roles: Mapping[str, tuple[str, ...]],
    wanted: Mapping[str, str],
    optional: frozenset[str] = frozenset(),
) -> dict[str, str]:
    """The column for each role: the one that was asked for, or the first usual name that is there.

    roles: usual column names by role; wanted: columns by role, as the user said. Returns column by
    role; optional roles may be absent. Raises DataError naming the missing column and the columns
    there are.
    """
    there = examples.column_names
    for role in wanted:
        if role not in roles:
            raise DataError(
                f"columns names the role {role!r}; this task has "
                f"{', '.join(roles)}{near(role, roles)}"
            )
    found = {}
    for role, names in roles.items():
        usual = tuple(dict.fromkeys((role, *names)))  # a role's own name is always a spelling
        if role in wanted:
            if wanted[role] not in there:
                raise DataError(
                    f"no column {wanted[role]!r} for {role}; the data has "
                    f"{', '.join(there)}{near(wanted[role], there)}"
                )
            found[role] = wanted[role]
        else:
            column = next(
                (name for name in usual if name in there and name not in wanted.values()), None
            )
            if column is not None:
                found[role] = column
            elif role not in optional:
                raise DataError(
                    f"no column for {role} (looked for {', '.join(usual)}); the data has "
                    f"{', '.join(there)}: say which with "
                    f"--columns.{role} NAME"
                )
    return found


def _in_folder(folder: Path, split: str) -> Path:
    for name in SPLITS.get(split, (split,)):
        for ending in READERS:
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
    files = sorted(p.name for p in folder.iterdir() if p.suffix in READERS)
    raise DataError(
        f"{folder}: no file for the split {split!r}; it has {', '.join(files) or 'no data files'}"
    )


@overload
def _read_file(path: Path) -> Dataset: ...
@overload
def _read_file(path: Path, streaming: Literal[True]) -> IterableDataset: ...
def _read_file(path: Path, streaming: bool = False) -> Dataset | IterableDataset:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of file; {', '.join(READERS)} can be read")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; at least one row is wanted")
    builder, options = reader
    if builder != "parquet":
        _check_utf8(path)
    try:
        return load_dataset(
            builder, data_files=str(path), split="train", streaming=streaming, **options
        )
    except Exception as error:  # every builder has its own exceptions for bad content
        cause = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        if "corresponds to no data" in cause:  # a file with a header and no rows
            raise DataError(f"{path}: the data set is empty; at least one row is wanted") from None
        raise DataError(f"{path}: cannot be read as {builder}: {cause}") from error


def _check_utf8(path: Path) -> None:
    """Refuse a file in another encoding, which the builders of datasets report in several ways."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}: not UTF-8 (near byte {at + error.start:,}: {error.reason}); "
                    f"convert it, such as with: iconv -f latin1 -t utf8 {path.name}"
                ) from None
            at += len(chunk)


@overload
def _from_hub(source: str, split: str, config: str | None) -> Dataset: ...
@overload
def _from_hub(
    source: str, split: str, config: str | None, streaming: Literal[True]
) -> IterableDataset: ...
def _from_hub(
    source: str, split: str, config: str | None, streaming: bool = False
) -> Dataset | IterableDataset:
    try:
        loaded = load_dataset(source, config, split=split, streaming=streaming)
    except (DatasetNotFoundError, HfHubHTTPError, ConnectionError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{source!r} is no local file or folder, and as a data set id it could not be fetched: "
            f"{reason}. "
            "Without network, pass the path of a local file or folder"
        ) from error
    except ValueError as error:
        raise DataError(f"data set {source!r}: {str(error).splitlines()[0]}") from error
    assert isinstance(loaded, Dataset | IterableDataset)
    return loaded
