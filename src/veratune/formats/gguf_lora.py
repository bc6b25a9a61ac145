"""GGUF LoRA adapters (llama.cpp, Ollama): blk.N.attn_q.weight.lora_a (r, n) and .lora_b (m, r).

llama.cpp multiplies by `adapter.lora.alpha` / r of each tensor. Source: llama.cpp,
convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

from collections.abc import Mapping
from pathlib import Path

from veratune.adapter import Adapter
from veratune.errors import BaseModelError
from veratune.formats.atomic import new_folder
from veratune.formats.gguf_names import GgufNames, open_gguf
from veratune.formats.lora_matrices import LoraPair, most_common
from veratune.formats.vllm import refuse_all_but_linear

ADAPTER_NAME = "adapter.gguf"


def write_gguf_lora(
    adapter: Adapter,
    pairs: Mapping[str, LoraPair],
    folder: str | Path,
    names: GgufNames,
    base: str | Path | None = None,
) -> None:
    """Write adapter.gguf (float32, exact) and an Ollama Modelfile into a folder.

    Args:
        adapter: The adapter.
        pairs: Its LoRA pairs (see `lora_pairs`), possibly reduced.
        folder: The folder; absent or empty.
        names: The base model's GGUF names.
        base: The base model's GGUF file, if at hand: the adapter's sizes are checked against it.

    Raises:
        UnsupportedError: A layer without a GGUF tensor, a convolution, or a trained head.
        BaseModelError: The base GGUF lacks a tensor or has another size.
        OutputError: The folder is in use or cannot be written.
    """
    import gguf

    refuse_all_but_linear(adapter, pairs, "llama.cpp")
    tensors = {names.tensor(layer): pair for layer, pair in pairs.items()}
    if base is not None:
        check_sizes(tensors, base)
    alpha = most_common(pair.rank for pair in pairs.values())
    with new_folder(Path(folder)) as path:
        writer = gguf.GGUFWriter(path / ADAPTER_NAME, names.architecture)
        writer.add_type("adapter")
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for name, pair in sorted(tensors.items()):
            # One alpha serves all layers, so a layer of another rank takes the factor into B.
            B = names.permute(name, (pair.B * (pair.rank / alpha)).numpy())
            writer.add_tensor(f"{name}.weight.lora_a", pair.A.contiguous().numpy())
            writer.add_tensor(f"{name}.weight.lora_b", B)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        source = base or adapter.base_id or "BASE_MODEL"
        (path / "Modelfile").write_text(f"FROM {source}\nADAPTER ./{ADAPTER_NAME}\n")


def check_sizes(tensors: Mapping[str, LoraPair], base: str | Path) -> None:
    """Raise BaseModelError if a base GGUF lacks a tensor or has another size."""
    sizes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in open_gguf(base).tensors}
    for name, pair in tensors.items():
        wanted, size = (pair.B.shape[0], pair.A.shape[1]), sizes.get(f"{name}.weight")
        if size != wanted:
            raise BaseModelError(
                f"{base}: tensor '{name}.weight' is {size or 'missing'}; the adapter wants {wanted}"
            )
