"""Which examples belong to which tenant: a column of one data set, or a folder with a file per
tenant.
"""

import abc
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import generate_random_fingerprint

from veratune.errors import DataError
from veratune.tasks.base import Task
from veratune.tasks.data import CACHED_FROM, READERS

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def name_error(name: object) -> str | None:
    """Why a value cannot be a tenant's name, or None. Names become file names and adapter names."""
    if isinstance(name, str) and _NAME.fullmatch(name):
        return None
    return (
        f"the tenant name {name!r} is not valid; letters, digits, '-' and '_' are wanted, "
        "at most 64, with a letter or digit first"
    )


class TenantData(abc.ABC):
    """The examples of many tenants. Only those that are asked for are in memory."""

    names: Sequence[str]

    @abc.abstractmethod
    def examples(self, name: str) -> Dataset:
        """All examples of one tenant. Raises DataError naming the tenant."""

    @abc.abstractmethod
    def __contains__(self, name: object) -> bool: ...

    @abc.abstractmethod
    def sample(self, limit: int) -> Dataset:
        """Examples of several tenants, from which a task learns its labels."""


class ColumnTenants(TenantData):
    """Tenants named by a column. The data set stays memory-mapped; an index of row numbers is
    held.
    """

    def __init__(self, examples: Dataset, column: str) -> None:
        if column not in examples.column_names:
            raise DataError(
                f"no column {column!r} for the tenant; the data has "
                f"{', '.join(examples.column_names)}: say which with --tenant-column"
            )
        values = np.asarray(["" if v is None else str(v) for v in examples[column]], dtype=object)
        self._names, codes = np.unique(values, return_inverse=True)
        self._rows = np.argsort(codes, kind="stable")
        counts = np.bincount(codes, minlength=len(self._names))
        self._ends = np.cumsum(counts)
        self._dataset = examples.remove_columns(column)
        self.names = [str(name) for name in self._names]
        self._codes = {name: code for code, name in enumerate(self.names)}

    def examples(self, name: str) -> Dataset:
        code = self._codes[name]
        start = int(self._ends[code - 1]) if code else 0
        rows = self._rows[start : int(self._ends[code])]
        # The cache's key of a selection takes longer than the selection.
        unread = generate_random_fingerprint() if len(rows) < CACHED_FROM else None
        return self._dataset.select(rows, new_fingerprint=unread)

    def __contains__(self, name: object) -> bool:
        return name in self._codes

    def sample(self, limit: int) -> Dataset:
        return self._dataset


class FolderTenants(TenantData):
    """Tenants named by files: FOLDER/alice.jsonl holds alice's examples."""

    def __init__(self, folder: Path, task: Task) -> None:
        files = sorted(path for path in folder.iterdir() if path.suffix in READERS)
        if not files:
            raise DataError(
                f"{folder}: no data files; one per tenant is wanted, such as alice.jsonl"
            )
        self._files: dict[str, Path] = {}
        for path in files:
            if path.stem in self._files:
                raise DataError(
                    f"{folder}: {self._files[path.stem].name} and {path.name} name the same tenant"
                )
            self._files[path.stem] = path
        self.names = list(self._files)
        self._task = task

    def examples(self, name: str) -> Dataset:
        return self._task.load_examples(str(self._files[name]))

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def sample(self, limit: int) -> Dataset:
        parts: list[Dataset] = []
        for name in self.names[:limit]:
            try:
                parts.append(self.examples(name))
            except DataError:
                continue  # that tenant is reported when its turn comes
        if not parts:
            raise DataError(f"none of the first {limit} tenants has a readable file")
        return concatenate_datasets(parts)


def load_tenants(source: str, task: Task, column: str, split: str = "train") -> TenantData:
    """Tenants from a file with a tenant column, a folder of split files with one, or a file per
    tenant.

    A folder is one file per tenant unless it has a file for the split.
    """
    path = Path(source)
    if path.is_dir() and not task.has_split(source, split):
        return FolderTenants(path, task)
    return ColumnTenants(task.load_examples(source, split), column)


def in_order(names: Sequence[str], rank: int, world: int) -> Iterator[str]:
    """The names that worker `rank` of `world` trains."""
    return iter(names[rank::world])
