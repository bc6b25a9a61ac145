"""mlx-lm adapter folders: y = W x + scale * (x lora_a) lora_b, with scale 1.

Source: mlx-lm 0.32, tuner/lora.py and tuner/utils.py.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch

from veratune.adapter import Adapter
from veratune.errors import UnsupportedError
from veratune.formats.atomic import new_folder
from veratune.formats.lora_matrices import LoraPair
from veratune.formats.reduction import padded
from veratune.formats.vllm import refuse_all_but_linear

_BLOCK = re.compile(r"model\.layers\.\d+\.(?P<key>.+)")


def write_mlx(adapter: Adapter, pairs: Mapping[str, LoraPair], folder: str | Path) -> None:
    """Write an mlx-lm adapter folder, exact: lower ranks are filled with zeros to the highest one.

    Args:
        adapter: The adapter.
        pairs: Its LoRA pairs (see `lora_pairs`), possibly reduced.
        folder: The folder; absent or empty.

    Raises:
        UnsupportedError: A layer outside the blocks, a convolution, or a trained head.
        OutputError: The folder is in use or cannot be written.
    """
    refuse_all_but_linear(adapter, pairs, "mlx-lm")
    keys = set()
    for layer in pairs:
        match = _BLOCK.fullmatch(layer)
        if match is None:
            raise UnsupportedError(
                f"mlx-lm adapts layers under 'model.layers', and the adapter has '{layer}'; merge "
                "the adapter instead"
            )
        keys.add(match["key"])
    rank = max(pair.rank for pair in pairs.values())
    tensors = {}
    for layer, pair in padded(pairs, rank).items():
        tensors[f"{layer}.lora_a"] = pair.A.T.contiguous()
        tensors[f"{layer}.lora_b"] = pair.B.T.contiguous()
    settings = {
        "fine_tune_type": "lora",
        "model": adapter.base_id,
        "num_layers": -1,  # all blocks
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    with new_folder(Path(folder)) as path:
        safetensors.torch.save_file(tensors, path / "adapters.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))
