"""veratune export"""

from collections.abc import Sequence
from typing import Literal

from veratune.cli.parsing import Parser, new_parser, parse


def parser() -> Parser:
    out = new_parser("export", "Write an adapter for other programs.")
    out.add_argument("file", type=str, help="adapter file")
    out.add_argument(
        "--to",
        type=Literal["peft", "peft-lora", "safetensors"],
        required=True,
        help="peft: a PEFT VeRA folder; peft-lora: a PEFT LoRA folder, exact; "
        "safetensors: veratune's own file, in another dtype",
    )
    out.add_argument(
        "--out",
        type=str,
        required=True,
        help="an empty folder (peft, peft-lora) or a file (safetensors)",
    )
    out.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="the base model's config.json, folder or id; needed for parts of fused layers and for "
        "convolutions",
    )
    out.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16", "float16", "int8"] | None,
        default=None,
        help="storage of the vectors (safetensors)",
    )
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.errors import ConfigError
    from veratune.formats import native, peft, peft_lora

    if flags.dtype is not None and flags.to != "safetensors":
        raise ConfigError(f"--dtype is for --to safetensors; {flags.to} is written in float32")
    adapter = native.read(flags.file)
    if flags.to == "safetensors":
        native.write(adapter, flags.out, flags.dtype)
    else:
        from veratune.analysis.count import empty_model

        model = None if flags.model is None else empty_model(flags.model)
        write = peft.write_vera if flags.to == "peft" else peft_lora.write_lora
        write(adapter, flags.out, model)
    print(flags.out)
    return 0
