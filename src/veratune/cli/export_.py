"""The command veratune export."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import PositiveInt

from veratune.cli.parsing import Parser, new_parser, parse
from veratune.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from veratune.adapter import Adapter
    from veratune.formats.reduction import LayerError

HELP = """safetensors: veratune's own file, in another dtype;
peft: a PEFT VeRA folder; peft-lora: a PEFT LoRA folder; vllm: a LoRA folder for vLLM;
gguf-lora: a folder with a LoRA for llama.cpp and an Ollama Modelfile;
diffusers, kohya: a LoRA file for image programs; mlx-lm: an mlx-lm adapter folder"""


def parser() -> Parser:
    out = new_parser("export", "Write an adapter for another program.")
    out.add_argument("file", type=str, help="adapter file")
    out.add_argument(
        "--to",
        type=Literal[
            "safetensors", "peft", "peft-lora", "vllm", "gguf-lora", "diffusers", "kohya", "mlx-lm"
        ],
        required=True,
        help=" ".join(HELP.split()),
    )
    out.add_argument(
        "--out",
        type=str,
        required=True,
        help="a file (safetensors, diffusers, kohya) or an empty folder (the others)",
    )
    out.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="the base model's config.json, folder, .gguf file or id; needed for gguf-lora, for "
        "parts of fused layers, for convolutions, for experts and for the bases lora and principal "
        "(principal reads its weights)",
    )
    out.add_argument(
        "--lora",
        type=str | None,
        default=None,
        help="the LoRA (PEFT folder or file) that the adapter was trained over (basis lora); needs "
        "--model",
    )
    out.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16", "float16", "int8"] | None,
        default=None,
        help="storage of the vectors (safetensors)",
    )
    out.add_argument(
        "--reduce",
        type=PositiveInt | None,
        default=None,
        help="reduce every layer to this rank by SVD (LoRA formats); prints the error",
    )
    out.add_argument(
        "--tolerance",
        type=float | None,
        default=None,
        help="reduce every layer to the least rank of this relative error, such as 0.01",
    )
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.cli.base_models import empty_base
    from veratune.formats import native
    from veratune.formats.export import EXACT_ONLY, export

    adapter = native.read(flags.file)
    model = None if flags.model is None else empty_base(flags.model)
    kind, exact = adapter.config.basis, flags.to in EXACT_ONLY
    if flags.lora is not None and (kind != "lora" or exact):
        raise ConfigError(
            f"--lora is for an adapter with basis lora and a LoRA format; this is {flags.to} of "
            f"basis {kind}"
        )
    if kind == "principal" and not exact:
        adapter = with_principal_basis(flags.file, flags.model)
    elif kind == "lora" and not exact:
        adapter = _with_lora(adapter, flags.lora, model)
    gguf = flags.model if flags.model and Path(flags.model).suffix == ".gguf" else None
    written = export(
        adapter,
        flags.to,
        flags.out,
        model=model,
        gguf=gguf,
        storage=flags.dtype,
        rank=flags.reduce,
        tolerance=flags.tolerance,
    )
    if written.errors:
        print_errors(written.errors)
    print(flags.out)
    if written.command:
        print(written.command)
    return 0


def with_principal_basis(file: str, model: str | None) -> "Adapter":
    """Read an adapter of basis principal with its A and B, from the base model's weights."""
    from veratune.adapter import extract
    from veratune.inference.adapted import ADAPTER_NAME, load_with_adapter

    if model is None:
        raise ConfigError(
            "the adapter has basis='principal', whose A and B are computed from the base model's "
            "weights; give the base model: --model"
        )
    return extract(load_with_adapter(model, file, device="cpu").model, ADAPTER_NAME)


def _with_lora(adapter: "Adapter", lora: str | None, model: "nn.Module | None") -> "Adapter":
    """The adapter with A and B, which are those of the LoRA that it was trained over."""
    from veratune.errors import BasisError
    from veratune.formats.lora import read_lora

    if lora is None or model is None:
        raise ConfigError(
            "the adapter was trained over a LoRA, whose matrices it does not hold; give that LoRA "
            "and the base model: --lora, --model"
        )
    basis = read_lora(lora, model)
    if basis.fingerprint() != adapter.lora_fingerprint:
        raise BasisError(f"{lora}: the adapter was trained over another LoRA; fingerprints differ")
    return dataclasses.replace(adapter, bound=basis)


def print_errors(errors: "Sequence[LayerError]") -> None:
    """Print each layer's rank and relative error, and the error over all layers."""
    from veratune.formats.reduction import total_error

    width = max(len(entry.layer) for entry in errors)
    for entry in errors:
        print(f"{entry.layer:<{width}}  rank {entry.rank:>4}  relative error {entry.error:.2e}")
    print(f"{'all layers':<{width}}  relative error {total_error(list(errors)):.2e}")
