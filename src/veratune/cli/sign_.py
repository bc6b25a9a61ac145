"""veratune sign"""

from collections.abc import Sequence

from veratune.cli.parsing import Parser, new_parser, parse


def parser() -> Parser:
    out = new_parser("sign", "Sign an adapter file with an Ed25519 key: FILE.sig beside it.")
    out.add_argument("file", type=str, help="adapter file")
    out.add_argument("--key", type=str, required=True, help="Ed25519 private key, PEM")
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.formats import native, signature

    native.read(flags.file)
    print(signature.sign(flags.file, flags.key))
    return 0
