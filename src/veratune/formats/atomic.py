"""Atomic writes: a file or folder appears complete or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from veratune.errors import OutputError


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically: temporary file, fsync, rename.

    Args:
        path: The file. Missing parent folders are created.
        data: Its content.

    Raises:
        OutputError: No space, no folder or no permission. The previous file is unchanged.
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
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{path}: could not write {len(data):,} bytes: {reason}; the previous file is unchanged"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left of its atomic writes into a folder.

    Args:
        folder: The folder, which nobody else writes into at the moment.
    """
    for path in folder.glob(".*.tmp"):
        if path.is_file():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Create a folder atomically: the block fills a temporary one, which is then renamed.

    Args:
        path: The folder. It must be absent or empty.

    Yields:
        The temporary folder to write into.

    Raises:
        OutputError: `path` holds something already, or cannot be written. On any error nothing new
            is left behind.
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
    """Raise OutputError if an output folder is not empty or not a folder.

    Args:
        path: The folder.
        hint: What the user can do, as the end of the message.
    """
    try:
        entry = next(path.iterdir(), None) if path.exists() else None
    except OSError as error:
        raise OutputError(
            f"{path}: not a folder that can be written: {error.strerror or error}"
        ) from error
    if entry is not None:
        raise OutputError(
            f"{path}: the output folder is not empty (it holds '{entry.name}'); {hint}"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
