"""The command veratune key."""

import sys
from collections.abc import Sequence

from veratune.cli.parsing import Parser, new_parser, parse


def parser() -> Parser:
    out = new_parser(
        "key",
        "Make a key for the server, which is printed once; the file keeps its hash. Without --tenants and --revoke: the keys that there are. "
        "A server that runs sees the change at the next request.",
    )
    out.add_argument(
        "--key-file",
        type=str,
        default="out/keys.json",
        help="the file of keys, made if it is not there",
    )
    out.add_argument(
        "--tenants",
        type=list[str],
        default=[],
        help="whose adapters the new key may use and change; the first is the one where none is said",
    )
    out.add_argument(
        "--revoke",
        type=str | None,
        default=None,
        help="strike out a key: itself, or 8 and more digits of its hash",
    )
    return out


def run(argv: Sequence[str]) -> int:
    flags = parse(parser(), argv)
    from veratune.errors import ConfigError
    from veratune.serving.keys import Keys

    if flags.tenants and flags.revoke is not None:
        raise ConfigError(
            "--tenants makes a key and --revoke strikes one out; one of them at a time is wanted"
        )
    keys = Keys(flags.key_file)
    if flags.tenants:
        print(keys.add(tuple(flags.tenants)))
    elif flags.revoke is not None:
        print(f"revoked, of {', '.join(keys.revoke(flags.revoke).tenants)}")
    elif not keys.callers:
        print(f"{flags.key_file} has no keys; --tenants NAME makes one", file=sys.stderr)
    else:
        for known, caller in keys.callers.items():
            print(f"{known[:12]}  {', '.join(caller.tenants)}")
    return 0
