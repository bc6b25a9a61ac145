"""veratune merge"""

from collections.abc import Sequence

from veratune.cli.eval_ import add_loading, load
from veratune.cli.parsing import Parser, new_parser, parse


def parser() -> Parser:
    out = new_parser(
        "merge",
        "Write the base model with an adapter inside its weights: a plain model, at the base's own speed.",
    )
    add_loading(out)
    out.add_argument(
        "--out", type=str, required=True, help="folder for the merged model; it must be empty"
    )
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from pathlib import Path

    from veratune.attach import detach
    from veratune.errors import ConfigError
    from veratune.formats.atomic import new_folder
    from veratune.layers.base import total_rounding_error
    from veratune.merging import merge

    if flags.adapter is None:
        raise ConfigError("merge needs --adapter: there is nothing to merge without one")
    folder = Path(flags.out)
    with new_folder(folder) as place:
        loaded = load(flags)
        report = merge(loaded.model)
        detach(loaded.model, keep_merged=True)
        loaded.task.save(loaded.model, loaded.processor, place)
    print(
        f"{folder}: {len(report)} weights merged in {flags.base_dtype}; rounding changed {total_rounding_error(report):.2%} of ΔW"
    )
    return 0
