"""veratune key"""

from collections.abc import Sequence

from veratune.cli.parsing import Parser, new_parser, parse


def parser() -> Parser:
    out = new_parser("key", "Make a key for the server. It is printed once; the file keeps its hash.")
    out.add_argument("--key_file", type=str, default="out/keys.json", help="the file of keys, made if it is not there")
    out.add_argument(
        "--tenants",
        type=list[str],
        required=True,
        help="whose adapters it may use and change; the first is the one where none is said",
    )
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.serving.keys import Keys

    print(Keys(flags.key_file).add(tuple(flags.tenants)))
    return 0
