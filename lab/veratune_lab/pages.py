"""Measured blocks of Markdown pages: between `<!-- measured: NAME -->` and `<!-- end -->`."""

from collections.abc import Callable, Mapping
from pathlib import Path


def fill(page: Path, blocks: Mapping[str, Callable[[], str]]) -> str:
    """A page's text with its blocks made anew.

    Args:
        page: The Markdown file.
        blocks: What makes the text of each block, by name.

    Raises:
        ValueError: The page does not have a block exactly once.
    """
    text = page.read_text()
    for name, make in blocks.items():
        before, start, rest = text.partition(f"<!-- measured: {name} -->\n")
        _, end, after = rest.partition("\n<!-- end -->")
        if not end or start in after:
            raise ValueError(f"{page.name} does not have the block {name!r} once")
        text = before + start + make() + end + after
    return text
