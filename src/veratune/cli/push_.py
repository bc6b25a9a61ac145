"""veratune push"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from veratune.cli.parsing import Parser, new_parser, parse


def parser() -> Parser:
    out = new_parser("push", "Upload an adapter file and its model card to the Hugging Face Hub.")
    out.add_argument("file", type=str, help="adapter file")
    out.add_argument("repo", type=str, help="repository, USER/NAME; created if it is missing")
    out.add_argument("--private", type=bool, default=False, help="make a new repository private")
    out.add_argument(
        "--peft-lora", type=bool, default=False, help="upload a PEFT LoRA folder beside the file"
    )
    out.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="the base model's config.json, folder or id, for --peft-lora of fused layers or "
        "convolutions",
    )
    out.add_argument("--dataset", type=str, default="", help="data set, for the model card")
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.cli.base_models import empty_base

    model = None if flags.model is None else empty_base(flags.model)
    from veratune.formats.publish import publish

    with tempfile.TemporaryDirectory() as folder:
        page = publish(
            Path(flags.file),
            flags.repo,
            Path(folder) / "files",
            private=flags.private,
            peft_lora=flags.peft_lora,
            model=model,
            dataset=flags.dataset,
        )
    print(page)
    return 0
