"""Write docs/vision.md and its pictures from benchmarks/results/reproduce: python docs/make_vision.py (a test compares the page).

With --from FOLDER (where `veratune reproduce` left its results), take lines and pictures from there first.
"""

import json
import shutil
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
LINES = HERE.parent / "benchmarks" / "results" / "reproduce"
PAGE, PICTURES = HERE / "vision.md", HERE / "pictures"
NAMES = ("table5", "efficientnet-fewshot", "cifar-jpeg", "conv-mnist", "conv-intel", "detection", "ddpm", "lora-styles")
# Pictures of single runs that are shown too: experiment -> (file in its runs, name here, what it is).
RUNS = {
    "table5": [("", "table5-norms.png", "Norms of the trained vectors by layer (the paper's figure 3), flowers.")],
    "detection": [
        ("raccoon:-VeRA,-rank-64-0/boxes.png", "detection-boxes.png", "Test images: annotated, and found with VeRA.")
    ],
    "conv-intel": [
        (
            "report:-full-0/confusion.png",
            "conv-intel-confusion.png",
            "Confusion matrix of the report's network, trained in full.",
        )
    ],
}


def take(folder: Path) -> None:
    """Lines of the scaled runs, and pictures, out of a folder of `veratune reproduce`."""
    for name in NAMES:
        own = folder / name
        if not (own / "results.jsonl").is_file():
            continue
        lines = [line for line in (own / "results.jsonl").read_text().splitlines() if json.loads(line)["scale"] == "scaled"]
        LINES.mkdir(parents=True, exist_ok=True)
        PICTURES.mkdir(exist_ok=True)
        (LINES / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        for picture in own.glob("*.png"):
            shutil.copy(picture, PICTURES / f"{name}-{picture.name}")
        if name == "table5":
            from veratune.analysis.inspect import plot
            from veratune.formats import native

            plot(
                native.read(own / "runs" / "scaled" / "flowers:-VeRA-0" / "adapter.safetensors"), PICTURES / "table5-norms.png"
            )
        for file, kept, _ in RUNS.get(name, []):
            if file and (own / "runs" / "scaled" / file).is_file():
                with Image.open(own / "runs" / "scaled" / file) as picture:
                    picture.thumbnail((1100, 1100))  # photographs are large as PNG
                    picture.save(PICTURES / kept)


def page() -> str:
    """All tables and pictures."""
    from veratune.reproduce.registry import experiment

    out = [
        "# Vision", "",
        "What `veratune reproduce NAME` measures, at the size that two CPU cores can run (`--quick` is smaller, `--full` is the papers' own). "
        "Made by `make docs` from `benchmarks/results/reproduce`, a line for each run. One seed, where nothing else is said: differences of "
        "a point or two between methods mean nothing. Several runs shared the machine, so their minutes say little.", "",
    ]  # fmt: skip
    for name in NAMES:
        file = LINES / f"{name}.jsonl"
        if not file.is_file():
            continue
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        out.append("#" + experiment(name).page(lines, "scaled"))
        told = {kept: what for _, kept, what in RUNS.get(name, [])}
        for picture in sorted(PICTURES.glob(f"{name}-*.png")):
            out += [f"![{name}](pictures/{picture.name})", "", *([told[picture.name], ""] if picture.name in told else [])]
    return "\n".join(out)


if __name__ == "__main__":
    if "--from" in sys.argv:
        take(Path(sys.argv[sys.argv.index("--from") + 1]))
    PAGE.write_text(page())
