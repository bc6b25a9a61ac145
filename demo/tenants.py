"""More adapters for the demo's server: the same house, for people who want its commands in another form.

python demo/tenants.py        (`make serve` does; an adapter that is there already is not trained again)
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from rich.console import Console

HERE = Path(__file__).parent
OUT = HERE.parent / "out" / "demo"
Command = Mapping[str, Any]


def yaml(command: Command) -> str:
    """A line for each slot."""
    return "\n".join(f"{name}: {value}" for name, value in command.items())


def shell(command: Command) -> str:
    """House ACTION --SLOT 'VALUE'"""
    slots = [f"--{name} '{value}'" for name, value in command.items() if name != "action"]
    return " ".join(["house", str(command["action"]), *slots])


def polite(command: Command) -> str:
    """A sentence that says what will be done."""
    slots = [f"{name} {value}" for name, value in command.items() if name != "action"]
    return f"With pleasure: {command['action']}, {', '.join(slots)}."


FORMS: dict[str, Callable[[Command], str]] = {"yaml": yaml, "shell": shell, "polite": polite}


def main() -> None:
    warnings.filterwarnings("ignore")
    from veratune import VeraConfig
    from veratune.training.run import train
    from veratune.training.settings import TrainSettings

    console = Console(highlight=False)
    rows = [json.loads(line) for line in (HERE / "train.jsonl").read_text().splitlines()]
    for name, form in FORMS.items():
        out = OUT / "tenants" / name
        if (out / "results.json").is_file():
            continue
        console.print(f"Fine-tuning the adapter {name!r} on {len(rows)} sentences ...")
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        data = out.with_suffix(".jsonl")
        data.write_text(
            "".join(
                json.dumps({**row, "completion": form(json.loads(row["completion"]))}) + "\n"
                for row in rows
            )
        )
        settings = TrainSettings(
            model=str(OUT / "smollm2"), task="instruction", data=str(data), out=str(out), lr=4e-2, batch_size=8, epochs=2, max_length=128,
            device="cpu", keep="last", mixed_precision="bf16", preview=0,
        )  # fmt: skip
        result = train(settings, VeraConfig(rank=256, targets=("query", "value")))
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        console.print(f"{result.path}: {result.bytes:,} bytes, {result.seconds:.0f} s")


if __name__ == "__main__":
    main()
