import importlib.util
import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[2]


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_commands_say():
    make_cli = load(ROOT / "docs" / "make_cli.py")
    assert make_cli.PAGE.read_text() == make_cli.page(), "run make docs"


def test_the_figures_in_the_readme_are_those_that_were_measured():
    line = json.loads((ROOT / "benchmarks" / "results" / "demo.jsonl").read_text())
    readme = (ROOT / "README.md").read_text()
    before, after = line["exact_match"]
    for wanted in (
        f"| held-out exact match | {before:.1%} | {after:.1%} |",
        f"| trained values | | {line['trained']:,} |",
        f"| adapter file | | {line['bytes']:,} bytes |",
        *(
            f"| {name} would write | | {size:,} bytes |"
            for name, size in line["peft_bytes"].items()
        ),
        f"| training | | {line['training_seconds']} s |",
        f"| peak memory | | {line['peak_memory'] / 2**30:.2f} GiB |",
    ):
        assert wanted in readme


def test_the_page_on_mrpc_is_made_of_its_lines():
    bench = load(ROOT / "benchmarks" / "bench_mrpc_vera_against_head.py")
    lines = [json.loads(line) for line in bench.LINES.read_text().splitlines()]
    assert bench.PAGE.read_text() == bench.page(lines)
    cells = dict(re.findall(r"\| (head alone|VeRA) \| 3 \| ([\d.]+ ± [\d.]+)", bench.page(lines)))
    assert (
        f"accuracy {cells['VeRA']} against {cells['head alone']}"
        in (ROOT / "README.md").read_text()
    )


def test_the_page_of_benchmarks_is_made_of_its_lines():
    make = load(ROOT / "docs" / "make_benchmarks.py")
    layers, steps = make.read("layers"), make.read("steps")
    assert make.PAGE.read_text() == make.page(layers, steps, *map(make.read, make.OTHERS)), (
        "run make docs"
    )
    assert make.PICTURE.is_file()
    run = next(make.rows_of_models(steps))
    assert (run[0]["model"], run[0]["batch"]) == ("roberta-base", [16, 128])
    cost = {(line["method"], line["rank"]): f"{line['over_frozen']:.2f}" for line in run}
    wanted = (
        f"RoBERTa-base, query and value at rank 1024: a training step costs {cost['veratune', 1024]} times the frozen model's, "
        f"PEFT's VeRA {cost['peft-vera', 1024]}, its LoRA of rank 8 {cost['lora', 8]}"
    )
    assert wanted in (ROOT / "README.md").read_text(), wanted


def test_the_figures_of_serving_in_the_readme_are_those_that_were_measured():
    make = load(ROOT / "docs" / "make_benchmarks.py")
    lines = [line for line in make.read("serving") if line["dtype"] == "float32"]
    by = {line.get("workload", line["what"]): line for line in lines}
    held, many, talk = by["adapters in memory"], by["32 tenants"], by["conversation"]
    times = statistics.median(
        a / b for a, b in zip(many["turns"], by["one after the other"]["turns"], strict=True)
    )
    wanted = (
        f"32 tenants in one batch on two cores: {many['of_one_tenant']:.2f} of one tenant's speed, "
        f"{times:.1f} times one after the other; "
        f"{held['adapters']:,} adapters of SmolLM2-135M in {held['process_bytes'] / 2**20:,.0f} MiB, one from the store in {held['load']['p50_ms']:.1f} ms; "
        f"turn {talk['turns']} of a conversation begins after {talk['first_token_kept_ms'][-1] / 1e3:.2f} s, {talk['first_token_read_again_ms'][-1] / 1e3:.2f} if all is read again"
    )
    assert wanted in (ROOT / "README.md").read_text(), wanted


def test_the_pages_of_tables_are_made_of_their_lines():
    make = load(ROOT / "docs" / "make_reproduced.py")
    for page, (_, names) in make.PAGES.items():
        assert (ROOT / "docs" / f"{page}.md").read_text() == make.page(page), "run make docs"
        for name in names:
            assert (make.LINES / f"{name}.jsonl").is_file(), name
    assert (ROOT / "docs" / "recipes.md").read_text() == make.recipes(), "run make docs"
    lines = {
        line["method"]: line
        for line in map(json.loads, (make.LINES / "ddpm.jsonl").read_text().splitlines())
    }
    cells = [
        f"{name} {lines[method]['after']['loss']:.3f} ({lines[method]['trained']:,}{' values' if name == 'VeRA' else ''})"
        for name, method in (("VeRA", "VeRA, rank 64"), ("LoRA", "LoRA, rank 1"), ("full", "full"))
    ]
    wanted = f"epsilon MSE {lines['full']['before']['loss']:.3f} before, {', '.join(cells)}"
    assert wanted in (ROOT / "README.md").read_text(), wanted


def test_the_page_of_accuracy_per_byte_is_made_of_its_lines():
    make = load(ROOT / "docs" / "make_quality.py")
    assert (ROOT / "docs" / "quality.md").read_text() == make.page(), "run make docs"


def test_the_means_in_the_readme_are_those_of_the_page():
    page = (ROOT / "docs" / "language.md").read_text()
    measured = page[
        page.index("## table2") : page.index("Printed in the paper for", page.index("## table2"))
    ]
    means = {
        name: (values, mean)
        for name, values, mean in re.findall(
            r"^\| ([^|]+) \| ([\d,]+) \|.*\| ([\d.]+) \|$", measured, re.M
        )
    }
    wanted = "MiniLM, mean score: " + ", ".join(
        f"{said} {means[name][1]} ({means[name][0]} values)"
        for said, name in (
            ("full fine-tuning", "Full"), ("LoRA rank 8", "LoRA"), ("VeRA", "VeRA"), ("VeRA spread over all linear layers", "VeRA, only d, all linear")
        )
    )  # fmt: skip
    assert wanted in (ROOT / "README.md").read_text(), wanted


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
