"""The command veratune key."""

import sys
from collections.abc import Sequence

from veratune.cli.parsing import Parser, new_parser, parse


def parser() -> Parser:
    """The flags."""
    out = new_parser(
        "key",
        "Make an API key for the server. The key is printed once; the file keeps its hash. Without "
        "--tenants and --revoke: list the keys. A running server sees the change at the next "
        "request.",
    )
    out.add_argument(
        "--key_file",
        type=str,
        default="out/keys.json",
        help="the file of keys; created if it does not exist",
    )
    out.add_argument(
        "--tenants",
        type=list[str],
        default=[],
        help="make a key that may use and change these tenants' adapters; the first is its default",
    )
    out.add_argument(
        "--revoke",
        type=str | None,
        default=None,
        help="remove a key: the key, or at least the first 8 digits of its hash",
    )
    return out


def run(argv: Sequence[str]) -> int:
    """Make, revoke or list keys."""
    flags = parse(parser(), argv)
    from veratune.errors import ConfigError
    from veratune.serving.keys import Keys

    if flags.tenants and flags.revoke is not None:
        raise ConfigError("--tenants makes a key and --revoke removes one; give one of them")
    keys = Keys(flags.key_file)
    if flags.tenants:
        print(keys.add(tuple(flags.tenants)))
    elif flags.revoke is not None:
        print(f"revoked, of {', '.join(keys.revoke(flags.revoke).tenants)}")
    elif not keys.callers:
        print(f"{flags.key_file} has no keys; make one with --tenants NAME", file=sys.stderr)
    else:
        for digest, caller in keys.callers.items():
            print(f"{digest[:12]}  {', '.join(caller.tenants)}")
    return 0
