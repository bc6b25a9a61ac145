"""Weight differences of two checkpoints of one architecture, read layer by layer."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from veratune.config import VeraConfig
from veratune.errors import BaseModelError, DataError
from veratune.layers.kinds import is_conv1d
from veratune.targets import base_module, find_sites

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Checkpoint:
    """The weights of a folder that save_pretrained wrote, read one at a time.

    Args:
        folder: It holds model.safetensors, or shards and their index.

    Raises:
        DataError: There are no safetensors weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            if (folder / _INDEX).is_file():
                index = json.loads((folder / _INDEX).read_text())["weight_map"]
                self._files = {str(name): Path(str(file)).name for name, file in index.items()}
            else:
                with safe_open(folder / _SINGLE, "pt") as opened:
                    self._files = dict.fromkeys(opened.keys(), _SINGLE)
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise DataError(f"{folder}: no readable model.safetensors: {error}") from None

    def tensor(self, name: str) -> Tensor:
        """A weight by the model's name for it; a missing or extra backbone prefix is understood.

        Raises:
            BaseModelError: The checkpoint lacks it.
        """
        found = name if name in self._files else self._other_prefix(name)
        try:
            with safe_open(self.folder / self._files[found], "pt") as opened:
                return opened.get_tensor(found)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.folder}: cannot read '{found}': {error}") from None

    def _other_prefix(self, name: str) -> str:
        same = [
            stored
            for stored in self._files
            if stored.endswith(f".{name}") or name.endswith(f".{stored}")
        ]
        if len(same) != 1:
            raise BaseModelError(f"{self.folder}: the checkpoint has no weight '{name}'")
        return same[0]


def weight_differences(
    model: nn.Module, config: VeraConfig, base: Path, tuned: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """The weights (m, n) before and after of every layer that `config` targets.

    Args:
        model: The architecture; the meta device will do.
        config: Its targets name the layers; fused layers are taken whole.
        base: Folder of the base model.
        tuned: Folder of the fine-tuned model.

    Returns:
        (base, tuned) weights by layer.

    Raises:
        BaseModelError: A checkpoint lacks a layer, or the two differ in shape.
        DataError: A folder without safetensors weights.
    """
    before, after = Checkpoint(base), Checkpoint(tuned)
    out = {}
    for site in find_sites(model, config):
        name = f"{site.module}.{site.part.parameter}"
        pair = before.tensor(name), after.tensor(name)
        if pair[0].shape != pair[1].shape:
            raise BaseModelError(
                f"weight '{name}' is {tuple(pair[0].shape)} in {base} and {tuple(pair[1].shape)} "
                "in "
                f"{tuned}; both must be of one architecture"
            )
        transposed = is_conv1d(base_module(model, site.module))
        out[site.name] = (pair[0].T, pair[1].T) if transposed else pair
    return out
