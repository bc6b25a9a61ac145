"""Every code block of README and docs: Python is executed, veratune lines go through the real parser.

A Python block that cannot run here says why: <!-- not run: needs a running server -->.
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch

import veratune as vt
from tests import fakes
from veratune.cli.main import COMMANDS
from veratune.cli.parsing import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?P<mark><!--[^\n]*-->\n)?```(?P<kind>\w*)\n(?P<code>.*?)^```", re.S | re.M)
NOT_RUN = re.compile(r"<!-- not run: \w[^\n]+ -->")


def blocks(*kinds):
    for page in PAGES:
        text = page.read_text()
        for found in BLOCK.finditer(text):
            if found["kind"] in kinds:
                line = text[: found.start("code")].count("\n") + 1
                yield pytest.param(found["mark"] or "", found["code"], id=f"{page.name}:{line}")


def shell_lines():
    for block in blocks("", "bash", "sh", "console"):
        _, code = block.values
        lines = code.replace("\\\n", " ").splitlines()
        # A command is a lower-case word; a table or a drawing in a block is none.
        commands = [line for line in lines if re.match(r"(\$ )?veratune [a-z-]+\s", line)]
        for number, line in enumerate(commands):
            yield pytest.param(line.removeprefix("$ "), id=f"{block.id}-{number}")


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with the files that the snippets name, and the names that they take for granted."""
    monkeypatch.chdir(tmp_path)
    llama = fakes.llama()
    fakes.folder(llama, tmp_path / "SmolLM2-135M-Instruct")
    (tmp_path / "run").mkdir()
    vt.attach(llama, vt.VeraConfig(rank=4), name="house")
    vt.save(llama, "run/adapter.safetensors", name="house")
    row = '{"prompt": "turn on the light", "completion": "light on"}\n'
    (tmp_path / "train.jsonl").write_text(row * 8)
    bert = fakes.bert(labels=2)
    vt.save(vt.attach(bert, vt.VeraConfig(rank=4), name="bob"), "bob.safetensors", name="bob")
    batch = {"input_ids": torch.arange(12).reshape(3, 4)}
    return {"vt": vt, "torch": torch, "model": fakes.bert(labels=2), "batch": batch}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("mark", "code"), blocks("python"))
def test_python_runs(mark, code, workspace):
    compile(code, "snippet", "exec")
    if NOT_RUN.search(mark):
        return
    exec(code, workspace)


@pytest.mark.parametrize("line", shell_lines())
def test_commands_parse(line):
    _, name, *words = shlex.split(line, comments=True)
    assert name in COMMANDS
    module = importlib.import_module(f"veratune.cli.{name.replace('-', '_')}_")
    parser = module.parser()
    words = module.with_find_lr(words) if name == "train" else words
    flags = {word.partition("=")[0][2:] for word in words if word.startswith("--")}
    assert flags <= parser.flags(), flags - parser.flags()
    assert not any("_" in flag for flag in flags)
    if "..." not in words:  # a shortened line leaves required flags out
        parse(parser, words)
