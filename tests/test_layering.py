"""Every file imports only from the rooms below it, and nobody imports a package's __init__."""

import ast
import importlib
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "veratune"

# From the ground up: a file may import from its own room and from those before it.
ROOMS = [
    "errors", "lru", "config", "ops", "basis", "layers", "patterns", "families", "targets", "base_weights", "stacked",
    "model_state", "fingerprint", "fast_path", "batch_rows", "selection", "merging", "compatibility", "attach", "adapter", "mixing",
    "formats", "files", "analysis", "pretrained", "loading", "scoring", "tasks", "inference", "training", "integrations",
    "serving", "fleet", "cli", "__main__",
]  # fmt: skip
STRANGERS = {("training", "serving"), ("serving", "training")}
FILES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")


def room(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "veratune":
            package = SOURCE.joinpath(*node.module.split(".")[1:]).is_dir()
            found += [f"{node.module}.{a.name}" for a in node.names] if package else [node.module]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] == "veratune"]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_downward(path):
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for module in imports(path):
        if module == "veratune.__version__":
            continue
        assert room(module) in ROOMS, (
            f"{path.name} imports {module}, a room that is not in the list"
        )
        assert ROOMS.index(room(module)) <= ROOMS.index(own), (
            f"{own}/{path.name} imports upward: {module}"
        )
        assert (own, room(module)) not in STRANGERS
        target = SOURCE.joinpath(*module.split(".")[1:]).with_suffix(".py")
        assert target.is_file(), (
            f"{path.name} imports {module} from a package's __init__ instead of a file"
        )


def test_no_pickle():
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"(?<!safetensors\.)torch\.load", text), path
        assert "import pickle" not in text, path


def test_the_mathematics_needs_no_heavy_package():
    allowed = {"torch", "numpy", "safetensors", "jaxtyping", "veratune", "bitsandbytes", "re2"}
    # File formats of other programs: imported inside the function that needs them.
    formats = {"gguf", "huggingface_hub", "httpx2", "cryptography", "yaml"}
    standard = __import__("sys").stdlib_module_names
    for own in ROOMS[: ROOMS.index("analysis")]:
        for path in [SOURCE / f"{own}.py", *(SOURCE / own).rglob("*.py")]:
            if path.is_file():
                for node in ast.walk(ast.parse(path.read_text())):
                    names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                    names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
                    for name in names:
                        assert name.partition(".")[0] in allowed | set(standard) | (
                            formats if own == "formats" else set()
                        ), f"{path} imports {name}"


@pytest.mark.parametrize(
    "path",
    sorted(
        p
        for room in ("demo", "benchmarks", "docs")
        for p in (SOURCE.parents[1] / room).glob("*.py")
    ),
    ids=lambda p: p.name,
)
def test_scripts_import_what_is_there(path):
    """Also where they import late, inside a function that no test runs."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "veratune":
            module = importlib.import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), (
                    f"{path.name} imports {name.name} from {node.module}"
                )
