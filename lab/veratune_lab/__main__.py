"""python -m veratune_lab NAME: a table or figure of the papers, or a benchmark."""

import sys
from collections.abc import Sequence

from veratune.cli.main import run_command

PROG = "python -m veratune_lab"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one experiment (`table2 --quick`) or benchmark (`bench step`). Returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] == "bench":
        from veratune_lab.bench import command as bench

        return run_command(f"{PROG} bench", bench.run, words[1:])
    from veratune_lab.paper import command as paper

    return run_command(PROG, paper.run, words)


if __name__ == "__main__":
    sys.exit(main())
