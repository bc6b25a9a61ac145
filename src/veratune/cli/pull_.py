"""veratune pull"""

from collections.abc import Sequence
from pathlib import Path

from veratune.cli.parsing import Parser, new_parser, parse


def parser() -> Parser:
    out = new_parser("pull", "Download an adapter from the Hugging Face Hub and check it.")
    out.add_argument("repo", type=str, help="hf://USER/NAME@REVISION; the revision may be left out")
    out.add_argument("--out", type=str, required=True, help="adapter file to write")
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.formats import hub, native
    from veratune.formats.atomic import write_atomic

    path = hub.download(flags.repo)
    adapter = native.read(path)
    data = path.read_bytes()
    write_atomic(Path(flags.out), data)
    print(f"{flags.out}: {len(adapter.shapes)} layers, {len(data):,} bytes")
    return 0
