"""The names and the row order of a model's weights in GGUF (llama.cpp, Ollama)."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from veratune.errors import AdapterFileError, UnsupportedError

# transformers' model_type -> GGUF's architecture.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "granite": "granite",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}
# GGUF stores q and k of these with the rotary pairs interleaved.
_PERMUTED = {"llama", "granite"}


@dataclasses.dataclass(frozen=True)
class GgufNames:
    """Maps layers of a transformers model to tensors of its GGUF.

    Attributes:
        architecture: GGUF's name of the model family.
        blocks: Number of transformer blocks.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
    """

    architecture: str
    blocks: int
    heads: int
    kv_heads: int

    def tensor(self, layer: str) -> str:
        """The tensor of a layer, without ".weight". Raises UnsupportedError if there is none."""
        import gguf

        arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        name = gguf.get_tensor_name_map(arch, self.blocks).get_name(layer)
        if name is None:
            raise UnsupportedError(
                f"layer '{layer}' has no tensor in a GGUF of architecture '{self.architecture}'"
            )
        return str(name)

    def permute(self, tensor: str, rows: np.ndarray) -> np.ndarray:
        """Rows (m, ...) of a weight in GGUF's order: rotary halves become interleaved pairs."""
        last = tensor.rpartition(".")[2]
        heads = {"attn_q": self.heads, "attn_k": self.kv_heads}.get(last)
        if heads is None or self.architecture not in _PERMUTED:
            return rows
        split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def names_of_model(model: nn.Module) -> GgufNames:
    """The names for a transformers model (the meta device will do). Raises UnsupportedError."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", "")
    if kind not in ARCHITECTURES:
        raise UnsupportedError(
            f"model family '{kind or type(model).__name__}' has no GGUF name map here; there are "
            f"{', '.join(ARCHITECTURES)}"
        )
    heads = config.num_attention_heads
    return GgufNames(
        ARCHITECTURES[kind],
        config.num_hidden_layers,
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
    )


def open_gguf(path: str | Path) -> Any:
    """A gguf.GGUFReader. Raises AdapterFileError if the file is not GGUF."""
    import gguf

    try:
        return gguf.GGUFReader(str(path))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise AdapterFileError(f"{path}: not a readable GGUF file ({error})") from None


def names_of_gguf(reader: Any, path: str | Path) -> GgufNames:
    """The names for a base model's GGUF file. Raises UnsupportedError."""

    def field(name: str, default: int | None = None) -> Any:
        entry = reader.get_field(name)
        if entry is None and default is None:
            raise AdapterFileError(f"{path}: the GGUF file has no entry {name}")
        return default if entry is None else entry.contents()

    architecture = field("general.architecture")
    if architecture not in ARCHITECTURES.values():
        raise UnsupportedError(
            f"{path}: architecture '{architecture}' has no name map here; there are "
            f"{', '.join(sorted(set(ARCHITECTURES.values())))}"
        )
    heads = field(f"{architecture}.attention.head_count")
    kv_heads = field(f"{architecture}.attention.head_count_kv", heads)
    return GgufNames(architecture, field(f"{architecture}.block_count"), heads, kv_heads)
