"""veratune import"""

from collections.abc import Sequence
from pathlib import Path

from veratune.cli.parsing import Parser, new_parser, parse
from veratune.errors import AdapterFileError


def parser() -> Parser:
    out = new_parser(
        "import", "Read a PEFT VeRA checkpoint, or an adapter file, into veratune's own file."
    )
    out.add_argument(
        "source",
        type=str,
        help="folder of the PEFT checkpoint, or an adapter file (which is checked and copied)",
    )
    out.add_argument("--model", type=str | None, default=None, help="the base model's config.json or folder: a checkpoint does not "
                     "say its layers' sizes. Default: what the checkpoint names")  # fmt: skip
    out.add_argument("--out", type=str, required=True, help="adapter file to write")
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.analysis.count import empty_model
    from veratune.formats import native, peft

    source = Path(flags.source)
    if source.is_dir():
        adapter = peft.read(source, empty_model(flags.model or _named(source)))
    else:
        adapter = native.read(source)
    size = native.write(adapter, flags.out)
    print(
        f"{flags.out}: {len(adapter.shapes)} layers, {adapter.trained_values:,} values, {size:,} bytes"
    )
    return 0


def _named(folder: Path) -> str:
    from veratune.formats.peft_files import read_settings

    try:
        named = read_settings(folder).get("base_model_name_or_path")
    except AdapterFileError as error:
        raise AdapterFileError(f"{folder}: {error}") from None
    if not named:
        raise AdapterFileError(
            f"{folder}: the checkpoint does not name its base model; give --model"
        )
    return str(named)
