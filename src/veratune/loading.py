"""Base models from a folder, a GGUF file or a hub id, and one clear error when they cannot be
had.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig, GgufConfig, PreTrainedModel

from veratune.errors import DataError, UnsupportedError

Quantize = Literal["4bit", "8bit"]


def load_pretrained(
    auto: Any, model: str, dtype: str = "float32", quantize: Quantize | None = None, **options: Any
) -> PreTrainedModel:
    """Load a base model with one of transformers' Auto classes.

    Args:
        auto: The Auto class, such as AutoModelForCausalLM.
        model: A folder that save_pretrained wrote, a .gguf file, or a hub id.
        dtype: Dtype of the frozen weights, by its name in torch.
        quantize: bitsandbytes' 4-bit NF4 or 8-bit; None for neither.
        options: Passed to `from_pretrained`.

    Returns:
        What `auto.from_pretrained` returns.

    Raises:
        DataError: The model cannot be loaded.
        UnsupportedError: `quantize` with a GGUF file, which is quantized already.
    """
    extra: dict[str, Any] = {}
    if model.endswith(".gguf"):
        if quantize:
            raise UnsupportedError(
                f"{model} is quantized already; "
                "convert it to a folder of safetensors to use --quantize"
            )
        extra["quantization_config"] = GgufConfig(dequantize=True)
    elif quantize == "4bit":
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    elif quantize == "8bit":
        extra["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    with loading_errors(model):
        return auto.from_pretrained(
            **pretrained_source(model), dtype=getattr(torch, dtype), **extra, **options
        )


def pretrained_source(model: str) -> dict[str, str]:
    """Arguments of `from_pretrained` that name a model: its folder and, for GGUF, the file in it.

    Raises:
        DataError: The GGUF file does not exist.
    """
    if model.endswith(".gguf"):
        path = Path(model)
        if not path.is_file():
            raise DataError(f"{model}: no such file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": model}


@contextlib.contextmanager
def loading_errors(model: str, config: str = "config.json") -> Iterator[None]:
    """Turn every error of loading a base model into one DataError that says what to do.

    Args:
        model: The model's folder, file or hub id.
        config: The file that a folder must hold; model_index.json for diffusers.

    Raises:
        DataError: The folder has no such file, or the block raised.
    """
    if Path(model).is_dir() and not (Path(model) / config).is_file():
        raise DataError(
            f"{model}: a folder without {config}; give a folder that save_pretrained wrote"
        )
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        hint = "" if Path(model).exists() else " Without network, pass the path of a local folder."
        raise DataError(f"base model {model!r} cannot be loaded: {reason[:300]}{hint}") from error
