"""The command veratune merge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace

from veratune.cli.eval_ import add_loading, load
from veratune.cli.parsing import Parser, new_parser, parse
from veratune.errors import ConfigError


def parser() -> Parser:
    out = new_parser(
        "merge",
        "Write the base model with an adapter merged into its weights: W + ΔW, a plain model.",
    )
    add_loading(out)
    out.add_argument(
        "--to",
        type=Literal["folder", "gguf"],
        default="folder",
        help="folder: safetensors, as save_pretrained writes them; gguf: a model for llama.cpp and "
        "Ollama, made from the base model's GGUF",
    )
    out.add_argument(
        "--gguf-base",
        type=str | None,
        default=None,
        help="the base model's .gguf file (gguf). Default: --model, if it is one",
    )
    out.add_argument(
        "--gguf-dtype",
        type=Literal["f32", "f16", "q8_0"],
        default="f16",
        help="of the merged weights (gguf)",
    )
    out.add_argument(
        "--out",
        type=str,
        required=True,
        help="folder for the merged model, which must be empty; a new file with --to gguf",
    )
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    if flags.adapter is None:
        raise ConfigError("merge needs --adapter: there is nothing to merge without one")
    if flags.to == "gguf":
        return _to_gguf(flags)
    if flags.gguf_base is not None:
        raise ConfigError("--gguf-base is for --to gguf")
    from veratune.formats.atomic import new_folder
    from veratune.inference.merge import save_merged
    from veratune.layers.merging import total_rounding_error

    folder = Path(flags.out)
    with new_folder(folder) as place:
        report = save_merged(load(flags), place)
    print(
        f"{folder}: {len(report)} weights merged in {flags.base_dtype}; rounding changed "
        f"{total_rounding_error(report):.2%} of ΔW"
    )
    return 0


def _to_gguf(flags: Namespace) -> int:
    """Merge into the base model's GGUF."""
    from veratune.cli.base_models import empty_base
    from veratune.cli.export_ import with_principal_basis
    from veratune.formats import native
    from veratune.formats.gguf_merge import merge_gguf
    from veratune.formats.lora_matrices import lora_pairs

    base = flags.gguf_base or (flags.model if flags.model.endswith(".gguf") else None)
    if base is None:
        raise ConfigError(
            f"--to gguf takes the vocabulary from the base model's GGUF, and --model {flags.model} "
            "is none; give --gguf-base FILE.gguf"
        )
    adapter = native.read(flags.adapter)
    if adapter.config.basis == "lora":
        raise ConfigError(
            "--to gguf takes no adapter over a LoRA; export it with --to gguf-lora --lora LORA"
        )
    if adapter.config.basis == "principal":
        adapter = with_principal_basis(flags.adapter, flags.model)
    pairs = lora_pairs(adapter, empty_base(flags.model))
    count = merge_gguf(adapter, pairs, base, flags.out, flags.gguf_dtype)
    print(f"{flags.out}: {count} weights merged, in {flags.gguf_dtype}")
    return 0
