"""The wheel, built and installed into a clean environment: what a user gets from pip."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import transformers as hf
import yaml

import veratune as vt

ROOT = Path(__file__).parents[1]


def run(*words, **changes):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        check=True,
        env=environment | changes,
    ).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, ROOT)
    (built,) = folder.glob("veratune-*.whl")
    return built


def test_what_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"veratune"}
    assert "veratune/py.typed" in names
    assert "veratune/cli/recipes/paper.yaml" in names
    assert "veratune/serving/http/page.html" in names
    sources = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_an_installed_wheel_imports_and_counts(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index"]
    run(*pip, "--no-deps", "--disable-pip-version-check", wheel)
    # The dependencies are those of this environment: nothing is downloaded.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(python, "-c", "import veratune; print(veratune.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    command = tmp_path / "venv" / "bin" / "veratune"
    assert "train-fleet" in run(command, "--help")
    hf.RobertaConfig().to_json_file(tmp_path / "config.json", use_diff=False)
    config = tmp_path / "config.json"
    out = run(command, "count", "--model", config, "--rank", 1024, "--json")
    assert json.loads(out)["trainable"] == 43_008


def test_the_citation_names_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == vt.__version__
