"""A folder of principal directions, so that a large model's are computed once on a machine."""

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

SMALLEST = 2**20  # values of a weight below which computing is as fast as reading
_HEADER = 1024  # bytes that a file has beside its tensors, at most


def default_folder() -> Path:
    """`principal` in $VERATUNE_CACHE, else in veratune's folder of the user's cache."""
    chosen = os.environ.get("VERATUNE_CACHE")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(chosen) if chosen else Path(cache) / "veratune") / "principal"


class DirectionCache:
    """(A, B) by the bits of the weight that they come from.

    A file that is damaged, or a folder that cannot be written, is as good as none: the directions
    are computed again. Files may be deleted at any time.

    Args:
        folder: Where the files are; default `default_folder()`.
        max_bytes: Bound of the folder's size; the files written longest ago go first.
    """

    def __init__(self, folder: Path | None = None, max_bytes: int = 2**34) -> None:
        self.folder = default_folder() if folder is None else folder
        self.max_bytes = max_bytes

    def key(self, weight: Tensor, definition: str) -> str:
        """A hash of a weight's shape, dtype and bits, and of what is computed from it."""
        digest = hashlib.sha256(f"{definition}:{list(weight.shape)}:{weight.dtype}".encode())
        bits = weight.detach().to("cpu").contiguous().view(torch.uint8)
        digest.update(bits.numpy().data)
        return digest.hexdigest()

    def get(self, key: str, rank: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """The stored (A, B) of a weight of this shape (m, n); None without a sound file."""
        file, (m, n) = self.folder / f"{key}.safetensors", shape
        try:
            if file.stat().st_size > 4 * rank * (m + n) + _HEADER:
                return None
            stored = safetensors.torch.load_file(file)
        except (OSError, safetensors.SafetensorError):
            return None
        sound = (
            set(stored) == {"A", "B"}
            and stored["A"].shape == (rank, n)
            and stored["B"].shape == (m, rank)
            and all(t.dtype == torch.float32 and bool(t.isfinite().all()) for t in stored.values())
        )
        return (stored["A"], stored["B"]) if sound else None

    def put(self, key: str, A: Tensor, B: Tensor) -> None:
        """Store (A, B): written to a temporary file, then renamed."""
        if 4 * (A.numel() + B.numel()) > self.max_bytes:
            return
        data = safetensors.torch.save({"A": A.contiguous(), "B": B.contiguous()})
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                Path(name).replace(self.folder / f"{key}.safetensors")
            except OSError:
                Path(name).unlink(missing_ok=True)
            self._shrink()

    def _shrink(self) -> None:
        """Delete the oldest files beyond `max_bytes`."""
        found = [(file.stat(), file) for file in self.folder.glob("*.safetensors")]
        excess = sum(stat.st_size for stat, _ in found) - self.max_bytes
        for stat, file in sorted(found, key=lambda entry: entry[0].st_mtime_ns):
            if excess <= 0:
                return
            file.unlink(missing_ok=True)
            excess -= stat.st_size
