"""Write docs/cli.md from the commands' own help: python docs/make_cli.py (a test compares the two)."""

import importlib
import os
from pathlib import Path

PAGE = Path(__file__).parent / "cli.md"


def page() -> str:
    """The reference of every command and flag."""
    from veratune.cli.main import COMMANDS, overview

    os.environ["COLUMNS"] = "100"  # the width that help is wrapped to
    lines = [
        "# The command line",
        "",
        "Made from the commands' own help by `make docs`.",
        "",
        "```",
        overview(),
        "```",
        "",
    ]
    for name in COMMANDS:
        module = importlib.import_module(f"veratune.cli.{name.replace('-', '_')}_")
        for form in getattr(module, "FORMS", [None]):
            parser = module.parser() if form is None else module.parser(form)
            lines += [
                f"## veratune {name} {form or ''}".rstrip(),
                "",
                "```",
                parser.format_help().rstrip(),
                "```",
                "",
            ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
