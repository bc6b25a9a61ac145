"""Merge an adapter into a base model's GGUF file: W + ΔW, in float32, float16 or Q8_0."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from veratune.adapter import Adapter
from veratune.errors import OutputError
from veratune.formats.gguf_lora import check_sizes
from veratune.formats.gguf_names import names_of_gguf, open_gguf
from veratune.formats.lora_matrices import LoraPair
from veratune.formats.vllm import refuse_all_but_linear

GgufDtype = Literal["f32", "f16", "q8_0"]


def merge_gguf(
    adapter: Adapter,
    pairs: Mapping[str, LoraPair],
    base: str | Path,
    out: str | Path,
    dtype: GgufDtype = "f16",
) -> int:
    """Write a GGUF model with an adapter merged into its weights.

    Each weight is dequantized to float32, ΔW is added, and the sum is rounded once to `dtype`. The
    other entries (vocabulary, chat template, hyperparameters) are the base's. Vectors stay float32.

    Args:
        adapter: The adapter.
        pairs: Its LoRA pairs (see `lora_pairs`).
        base: The base model's GGUF file.
        out: The file to write; it must not exist.
        dtype: Of the weights. A weight whose rows are no multiple of 32 stays float16 in q8_0.

    Returns:
        The number of merged weights.

    Raises:
        UnsupportedError: The architecture or a layer has no name map, or a trained head.
        BaseModelError: The base lacks a tensor or has another size.
        OutputError: The file exists or cannot be written.
    """
    import gguf

    refuse_all_but_linear(adapter, pairs, "GGUF")
    out = Path(out)
    if out.exists():
        raise OutputError(f"{out}: the file exists; choose another")
    reader = open_gguf(base)
    names = names_of_gguf(reader, base)
    tensors = {names.tensor(layer): pair for layer, pair in pairs.items()}
    check_sizes(tensors, base)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(temporary, names.architecture)
        _copy_metadata(reader, writer, dtype)
        for tensor in reader.tensors:
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            name = tensor.name.removesuffix(".weight")
            if name in tensors:
                weight = weight + names.permute(name, tensors[name].delta().numpy())
            kind = _type_of(weight, dtype)
            writer.add_tensor(tensor.name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(out)
    except OSError as error:
        raise OutputError(f"{out}: could not be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(tensors)


def _copy_metadata(reader: Any, writer: Any, dtype: GgufDtype) -> None:
    """Every entry of the base's but those about its file type."""
    import gguf

    kinds = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    replaced = {
        gguf.Keys.General.ARCHITECTURE,
        gguf.Keys.General.FILE_TYPE,
        gguf.Keys.General.QUANTIZATION_VERSION,
    }
    for entry in reader.fields.values():
        if entry.name in replaced or entry.name.startswith("GGUF."):
            continue
        array = entry.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(
            entry.name,
            entry.contents(),
            entry.types[0],
            sub_type=entry.types[-1] if array else None,
        )
    writer.add_file_type(kinds[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _type_of(weight: np.ndarray, dtype: GgufDtype) -> Any:
    """The GGUF type of a tensor: vectors stay float32."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    if weight.ndim < 2 or dtype == "f32":
        return kinds.F32
    if dtype == "q8_0" and weight.shape[-1] % 32 == 0:
        return kinds.Q8_0
    return kinds.F16
