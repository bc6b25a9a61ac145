"""Files that are there whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from veratune.errors import OutputError


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new and never a part.

    A temporary file beside it is written, synced to disk and renamed. Raises OutputError (no space, no
    folder, no permission); then nothing new stays behind.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
        )
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        with contextlib.suppress(OSError):  # not every file system syncs folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{path}: could not write {len(data):,} bytes: {reason}; what was there before is untouched"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder of files that is there whole or not at all: fill the one that is given; at the end it becomes `path`.

    Raises OutputError if `path` is in use or cannot be written; whatever is raised, nothing new stays behind.
    """
    refuse_used(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        yield Path(temporary)
        os.chmod(temporary, 0o777 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{path}: could not be written: {error.strerror or error}; nothing was left there"
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_used(path: Path, hint: str = "choose another or empty it") -> None:
    """Raise OutputError if a folder for results holds something already, or is no folder. hint: what to do then."""
    try:
        found = next(path.iterdir(), None) if path.exists() else None
    except OSError as error:
        raise OutputError(
            f"{path}: not a folder that can be written: {error.strerror or error}"
        ) from error
    if found is not None:
        raise OutputError(
            f"{path}: the output folder is not empty (it holds '{found.name}'); {hint}"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
