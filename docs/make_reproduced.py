"""Write docs/vision.md and docs/language.md, and a sentence of docs/recipes.md, from benchmarks/results/reproduce (a test compares the pages).

    python docs/make_reproduced.py [--from FOLDER ...]

With --from (where `python -m veratune_lab` left its results), take lines and pictures from there first.
"""

import json
import shutil
import statistics
import sys
from pathlib import Path

from PIL import Image

from veratune_lab.pages import fill

HERE = Path(__file__).parent
LINES = HERE.parent / "benchmarks" / "results" / "reproduce"
PICTURES = HERE / "pictures"
SIZE = (
    "at the size that two CPU cores can run (`--quick` is smaller, `--full` is the papers' own). Made by `make docs` from "
    "`benchmarks/results/reproduce`, a line for each run. Several runs shared the machine, so their minutes say little."
)
VISION = (
    "# Vision\n\n"
    f"What `python -m veratune_lab NAME` measures, {SIZE} One seed, where nothing else is said: differences of a point or two between methods mean nothing.\n"
)
LANGUAGE = (
    "# Language\n\n"
    f"The tables and figures of the VeRA paper, each with the command `python -m veratune_lab NAME`, {SIZE} The models here are small and so are the "
    "training sets: what can be compared is methods with one another, in a table, not a figure here with one in print. [Recipes](recipes.md) says what follows for use.\n"
)
PAGES = {
    "vision": (VISION, ("table5", "efficientnet-fewshot", "cifar-jpeg", "conv-mnist", "conv-intel", "detection", "ddpm", "lora-styles")),
    "language": (
        LANGUAGE,
        (
            "table1", "counts", "table2", "table3", "table4", "table6", "table7", "table12", "figure2", "figure3", "figure4", "figure5", "figure6",
            "recipes",
        ),
    ),
}  # fmt: skip
# Pictures of single runs that are shown too: experiment -> (file in its runs, name here, what it is).
RUNS = {
    "table5": [
        (
            "",
            "table5-norms.png",
            "Norms of the trained vectors by layer (the paper's figure 3), flowers.",
        )
    ],
    "detection": [
        (
            "raccoon:-VeRA,-rank-64-0/boxes.png",
            "detection-boxes.png",
            "Test images: annotated, and found with VeRA.",
        )
    ],
    "conv-intel": [
        (
            "report:-full-0/confusion.png",
            "conv-intel-confusion.png",
            "Confusion matrix of the report's network, trained in full.",
        )
    ],
}


def take(folders: list[Path]) -> None:
    """Lines of the scaled runs, and pictures, out of folders of `python -m veratune_lab`; an experiment may be spread over several."""
    from veratune_lab.paper.experiment import Place
    from veratune_lab.paper.registry import experiment

    LINES.mkdir(parents=True, exist_ok=True)
    PICTURES.mkdir(exist_ok=True)
    for name in [name for _, names in PAGES.values() for name in names]:
        own = [folder / name for folder in folders if (folder / name / "results.jsonl").is_file()]
        if not own:
            continue
        texts = [
            text for folder in own for text in (folder / "results.jsonl").read_text().splitlines()
        ]
        lines = [line for line in map(json.loads, texts) if line["scale"] == "scaled"]
        order = [cell.name for cell in experiment(name).cells("scaled")]
        lines.sort(key=lambda line: (line["seed"], order.index(line["cell"])))
        (LINES / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for folder in own:
            place = Place(out=folder)
            for picture in (
                experiment(name).draw(lines, place) if len(own) > 1 else folder.glob("*.png")
            ):
                shutil.copy(picture, PICTURES / f"{name}-{picture.name}")
        if name == "table5":
            from veratune.analysis.inspect import plot
            from veratune.formats import native

            plot(
                native.read(own[0] / "runs" / "scaled" / "flowers:-VeRA-0" / "adapter.safetensors"),
                PICTURES / "table5-norms.png",
            )
        for file, kept, _ in RUNS.get(name, []):
            if file and (own[0] / "runs" / "scaled" / file).is_file():
                with Image.open(own[0] / "runs" / "scaled" / file) as picture:
                    picture.thumbnail((1100, 1100))  # photographs are large as PNG
                    picture.save(PICTURES / kept)


def page(which: str) -> str:
    """All tables and pictures of one page."""
    from veratune_lab.paper.registry import experiment

    about, names = PAGES[which]
    out = [about]
    for name in names:
        file = LINES / f"{name}.jsonl"
        if not file.is_file():
            continue
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        out.append("#" + experiment(name).page(lines, "scaled"))
        told = {kept: what for _, kept, what in RUNS.get(name, [])}
        for picture in sorted(PICTURES.glob(f"{name}-*.png")):
            out += [
                f"![{name}](pictures/{picture.name})",
                "",
                *([told[picture.name], ""] if picture.name in told else []),
            ]
    return "\n".join(out)


def recipes() -> str:
    """docs/recipes.md with its measured sentence: medians of table2, method by method."""
    from veratune_lab.paper.glue import GLUE, score_of
    from veratune_lab.paper.registry import experiment

    lines = [json.loads(line) for line in (LINES / "table2.jsonl").read_text().splitlines()]
    chosen = experiment("table2").chosen(lines)
    parts = []
    for task in ("stsb", "sst2", "qnli"):
        title = GLUE[task].title
        found = {
            method: f"{statistics.median(map(score_of, chosen[f'{title}: {method}'])):.1f}"
            for method in ("VeRA, only d, all linear", "VeRA", "LoRA")
        }
        parts.append(
            f"{title} {found['VeRA, only d, all linear']} (VeRA {found['VeRA']}, LoRA {found['LoRA']})"
        )
    sizes = {of[0]["method"]: of[0]["trained"] for of in chosen.values() if of}
    text = (
        f"{'; '.join(parts)}, with {sizes['VeRA, only d, all linear']:,} values against VeRA's {sizes['VeRA']:,} and the {sizes['LoRA']:,} of LoRA "
        "rank 8, medians of two or three seeds."
    )
    return fill(HERE / "recipes.md", {"d alone": lambda: text})


if __name__ == "__main__":
    if "--from" in sys.argv:
        take([Path(word) for word in sys.argv[sys.argv.index("--from") + 1 :]])
    for which in PAGES:
        (HERE / f"{which}.md").write_text(page(which))
    (HERE / "recipes.md").write_text(recipes())
