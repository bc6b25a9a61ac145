import importlib.util
import json
import re
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
    make_readme = load(ROOT / "docs" / "make_readme.py")
    assert make_readme.PAGE.read_text() == make_readme.page(), "run make docs"


def test_the_page_on_mrpc_is_made_of_its_lines():
    bench = load(ROOT / "benchmarks" / "bench_mrpc_vera_against_head.py")
    lines = [json.loads(line) for line in bench.LINES.read_text().splitlines()]
    assert bench.PAGE.read_text() == bench.page(lines)


def test_the_page_of_benchmarks_is_made_of_its_lines():
    make = load(ROOT / "docs" / "make_benchmarks.py")
    layers, steps = make.read("layers"), make.read("steps")
    assert make.PAGE.read_text() == make.page(layers, steps, *map(make.read, make.OTHERS)), (
        "run make docs"
    )
    assert make.PICTURE.is_file()
    run = next(make.rows_of_models(steps))
    assert (run[0]["model"], run[0]["batch"]) == ("roberta-base", [16, 128])


def test_the_pages_of_tables_are_made_of_their_lines():
    make = load(ROOT / "docs" / "make_reproduced.py")
    for page, (_, names) in make.PAGES.items():
        assert (ROOT / "docs" / f"{page}.md").read_text() == make.page(page), "run make docs"
        for name in names:
            assert (make.LINES / f"{name}.jsonl").is_file(), name
    assert (ROOT / "docs" / "recipes.md").read_text() == make.recipes(), "run make docs"


def test_the_page_of_accuracy_per_byte_is_made_of_its_lines():
    make = load(ROOT / "docs" / "make_quality.py")
    assert (ROOT / "docs" / "quality.md").read_text() == make.page(), "run make docs"


def test_the_figures_of_the_exits_are_those_that_were_measured():
    make = load(ROOT / "docs" / "make_exits.py")
    assert make.PAGE.read_text() == make.page(), "run make docs"


def test_the_figures_of_the_tasks_are_those_that_were_measured():
    make = load(ROOT / "docs" / "make_tasks.py")
    for path, text in make.pages().items():
        assert path.read_text() == text, f"{path.name}: run make docs"


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
