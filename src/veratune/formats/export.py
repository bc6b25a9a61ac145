"""One entry for every exit: an adapter, a format, a place."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from torch import nn

from veratune.adapter import Adapter
from veratune.errors import ConfigError, UnsupportedError
from veratune.formats import native, peft
from veratune.formats.diffusers import write_image_lora
from veratune.formats.gguf_lora import write_gguf_lora
from veratune.formats.gguf_names import names_of_gguf, names_of_model, open_gguf
from veratune.formats.lora_matrices import LoraPair, lora_pairs
from veratune.formats.mlx import write_mlx
from veratune.formats.peft_lora import write_pairs
from veratune.formats.reduction import LayerError, reduce_rank
from veratune.formats.vllm import write_vllm

Format = Literal[
    "safetensors", "peft", "peft-lora", "vllm", "gguf-lora", "diffusers", "kohya", "mlx-lm"
]
FORMATS = get_args(Format)
EXACT_ONLY = ("safetensors", "peft")  # formats that hold vectors, whose rank is fixed


@dataclasses.dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        errors: Each layer's error, if ranks were reduced.
        command: A command that loads it in the other program; empty for most.
    """

    errors: list[LayerError]
    command: str = ""


def export(
    adapter: Adapter,
    to: Format,
    out: str | Path,
    *,
    model: nn.Module | None = None,
    gguf: str | Path | None = None,
    storage: native.Storage | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Write an adapter for another program.

    Args:
        adapter: The adapter.
        to: The format.
        out: A file (safetensors, diffusers, kohya) or a folder that is absent or empty.
        model: The base model; the meta device will do. Needed for parts of fused layers, for
            convolutions and for gguf-lora.
        gguf: The base model's GGUF file, against which gguf-lora is checked.
        storage: The dtype of the vectors (safetensors alone).
        rank: Reduce every layer to at most this rank.
        tolerance: Reduce every layer to the least rank of this relative error.

    Returns:
        The errors of the reduction, and a command.

    Raises:
        ConfigError: A setting that the format does not have.
        UnsupportedError: The format cannot hold the adapter.
        OutputError: The output cannot be written.
    """
    if storage is not None and to != "safetensors":
        raise ConfigError(f"--dtype is for --to safetensors; {to} is written in float32")
    reduces = rank is not None or tolerance is not None
    if reduces and to in EXACT_ONLY:
        raise ConfigError(f"--reduce and --tolerance are for LoRA formats; {to} keeps the vectors")
    if to == "safetensors":
        native.write(adapter, out, storage)
        return Exported([])
    if to == "peft":
        peft.write_vera(adapter, out, model)
        return Exported([])
    pairs: Mapping[str, LoraPair] = lora_pairs(adapter, model)
    errors: list[LayerError] = []
    if reduces:
        pairs, errors = reduce_rank(pairs, rank=rank, tolerance=tolerance)
    command = ""
    if to == "peft-lora":
        write_pairs(adapter, pairs, out, model)
    elif to == "vllm":
        command = write_vllm(adapter, pairs, out)
    elif to == "mlx-lm":
        write_mlx(adapter, pairs, out)
        command = f"mlx_lm.generate --model {adapter.base_id} --adapter-path {out} --prompt TEXT"
    elif to == "gguf-lora":
        if gguf is not None:
            names = names_of_gguf(open_gguf(gguf), gguf)
        elif model is not None:
            names = names_of_model(model)
        else:
            raise UnsupportedError(
                "gguf-lora needs the base model's family and head counts: give --model"
            )
        write_gguf_lora(adapter, pairs, out, names, gguf)
        command = f"llama-server --model {gguf or 'BASE.gguf'} --lora {out}/adapter.gguf"
    elif to in ("diffusers", "kohya"):
        write_image_lora(adapter, pairs, out, to)  # type: ignore[arg-type]
    else:
        raise ConfigError(f"unknown format {to!r}; there are {', '.join(FORMATS)}")
    return Exported(errors, command)
