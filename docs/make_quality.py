"""Write docs/quality.md from benchmarks/results (a test compares the page).

    python docs/make_quality.py [--from FOLDER]

With --from (where `python -m veratune_lab quality` left its results), take its lines first.
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
LINES = RESULTS / "reproduce" / "quality.jsonl"
RECIPES = RESULTS / "recipes.jsonl"
SEARCH = RESULTS / "quality_search.jsonl"
PICTURE = HERE / "pictures" / "quality-bytes.png"


def read(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; none where there is no file."""
    return [json.loads(text) for text in file.read_text().splitlines()] if file.is_file() else []


def take(folder: Path) -> None:
    """The lines of the scaled runs, and the picture, out of a folder of results."""
    from veratune_lab.quality.experiment import Quality
    from veratune_lab.quality.report import draw

    lines = [line for line in read(folder / "results.jsonl") if line["scale"] == "scaled"]
    order = [cell.name for cell in Quality().cells("scaled")]
    lines.sort(key=lambda line: (order.index(line["cell"]), line["seed"]))
    LINES.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for picture in draw(Quality(), lines, folder):
        PICTURE.write_bytes(picture.read_bytes())


def page() -> str:
    """The whole page."""
    from veratune_lab.quality.experiment import Quality
    from veratune_lab.quality.report import document

    text = document(Quality(), read(LINES), read(RECIPES), read(SEARCH))
    if PICTURE.is_file():
        shown = "![Score against the bytes of the file](pictures/quality-bytes.png)\n\n"
        text = text.replace("## Differences", shown + "## Differences", 1)
    return text


if __name__ == "__main__":
    if "--from" in sys.argv:
        take(Path(sys.argv[sys.argv.index("--from") + 1]))
    (HERE / "quality.md").write_text(page())
