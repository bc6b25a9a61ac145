"""Files that are there whole or not at all."""

import contextlib
import os
import tempfile
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
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
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


def empty_folder(path: Path) -> Path:
    """Make a folder for results. Raises OutputError if it exists and holds something."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        found = next(path.iterdir(), None)
    except OSError as error:
        raise OutputError(f"{path}: not a folder that can be written: {error.strerror or error}") from error
    if found is not None:
        raise OutputError(f"{path}: the output folder is not empty (it holds '{found.name}'); choose another or empty it")
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
