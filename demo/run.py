"""The demo: teach SmolLM2-135M the commands of a smart home with VeRA and with LoRA, and compare them.

    make demo        (python demo/run.py --record also writes benchmarks/results/demo.jsonl)

Everything is offline: the model comes in a pip package, the sentences are in this folder.
"""

import contextlib
import dataclasses
import io
import json
import os
import platform
import re
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
OUT = HERE.parent / "out" / "demo"
RESULTS = HERE.parent / "benchmarks" / "results" / "demo.jsonl"
PICTURE = HERE.parent / "docs" / "pictures" / "demo.svg"
MODEL, RUN, LORA_RUN = OUT / "smollm2", OUT / "run", OUT / "lora"
HELD_OUT = HERE / "heldout.jsonl"
LR, LORA_LR = 5e-2, 5e-3  # the best that benchmarks/bench_demo.py tried
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
console = Console(highlight=False, record=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """One method's column of the table."""

    scores: dict[str, float]
    example: str
    trained: int
    bytes: int
    seconds: float


def unpack_model() -> None:
    from veratune_lab.paper.language_models import smollm2

    console.print("Unpacking SmolLM2-135M (first run only) ...")
    with contextlib.redirect_stderr(io.StringIO()):
        smollm2(MODEL)


def settings_for(out: Path, **changes: Any) -> Any:
    from veratune.training.settings import TrainSettings

    return TrainSettings(
        model=str(MODEL),
        task="instruction",
        data=str(HERE / "train.jsonl"),
        eval_data=str(HELD_OUT),
        out=str(out),
        batch_size=8,
        epochs=3,
        max_length=128,
        device="cpu",
        keep="last",
        **changes,
    )


def score(loaded: Any) -> tuple[dict[str, float], str]:
    """Held-out scores, and the completion of one held-out prompt."""
    from veratune.inference.evaluate import evaluate
    from veratune.inference.generate import generate_completions

    prompt = json.loads(HELD_OUT.read_text().splitlines()[1])["prompt"]
    conversation = [{"role": "user", "content": prompt}]
    with contextlib.redirect_stderr(io.StringIO()):
        scores = evaluate(loaded, str(HELD_OUT), generate=True, max_new_tokens=40, batch_size=32)
        example = next(
            generate_completions(loaded.model, loaded.processor, [conversation], max_new_tokens=40)
        )
    return scores, example


def train_vera() -> tuple[Row, Row]:
    """Train the VeRA adapter. Returns the base model's row and the adapter's."""
    from veratune import VeraConfig, use
    from veratune.cli.train_ import preview_on
    from veratune.inference.adapted import load_with_adapter
    from veratune.training.run import train

    console.print("Fine-tuning with VeRA on 160 sentences ...")
    vera = VeraConfig(rank=64, targets=("all-linear",), vectors="d")
    result = train(settings_for(RUN, lr=LR), vera, preview_on(console))
    with contextlib.redirect_stderr(io.StringIO()):
        loaded = load_with_adapter(str(MODEL), result.path, device="cpu")
    use(loaded.model, None)
    base = Row(*score(loaded), trained=0, bytes=0, seconds=0.0)
    use(loaded.model, "default")
    return base, Row(*score(loaded), result.trained, result.bytes, result.seconds)


def train_lora() -> Row:
    """Train PEFT's LoRA on the same batches."""
    from veratune import VeraConfig
    from veratune.inference.adapted import load_with_adapter
    from veratune.training.methods import build_method
    from veratune.training.run import train

    console.print("Fine-tuning with LoRA (PEFT, rank 8) on the same sentences ...")
    settings = settings_for(LORA_RUN, lr=LORA_LR, method="peft:lora", options=LORA, preview=0)
    result = train(settings, VeraConfig())
    with contextlib.redirect_stderr(io.StringIO()):
        loaded = load_with_adapter(str(MODEL), None, task="instruction", device="cpu")
    method = build_method("peft:lora", VeraConfig(), LORA)
    method.prepare(loaded.model, (), {})
    method.read(loaded.model, LORA_RUN)
    loaded.model.eval()
    return Row(*score(loaded), result.trained, result.bytes, result.seconds)


def table_of(base: Row, vera: Row, lora: Row) -> Table:
    table = Table(title="SmolLM2-135M: sentence -> JSON command", title_justify="left")
    for column, side in (
        ("", "left"),
        ("base model", "right"),
        ("VeRA", "right"),
        ("LoRA", "right"),
    ):
        table.add_column(column, justify=side)
    rows = (base, vera, lora)
    table.add_row("held-out exact match", *(f"{row.scores['exact_match']:.1%}" for row in rows))
    table.add_row("held-out loss", *(f"{row.scores['loss']:.3f}" for row in rows))
    table.add_section()
    table.add_row("trained values", "", f"{vera.trained:,}", f"{lora.trained:,}")
    table.add_row("adapter file (bytes)", "", f"{vera.bytes:,}", f"{lora.bytes:,}")
    table.add_row("training (s)", "", f"{vera.seconds:,.0f}", f"{lora.seconds:,.0f}")
    return table


def record(base: Row, vera: Row, lora: Row, seconds: float, memory: int) -> None:
    import torch
    import transformers

    line = {
        "rows": {
            name: dataclasses.asdict(row)
            for name, row in (("base", base), ("vera", vera), ("lora", lora))
        },
        "lr": LR,
        "lora": {"lr": LORA_LR, **LORA},
        "seed": 0,
        "demo_seconds": round(seconds),
        "peak_memory": memory,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    RESULTS.write_text(json.dumps(line) + "\n")
    picture = console.export_svg(title="make demo")
    # rich's picture loads its font from another host; any monospaced font will do.
    PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.S))


def main() -> None:
    start = time.perf_counter()
    OUT.mkdir(parents=True, exist_ok=True)
    for folder in (RUN, LORA_RUN):
        shutil.rmtree(folder, ignore_errors=True)
    warnings.filterwarnings("ignore")
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    unpack_model()
    from veratune.training.result import peak_memory

    base, vera = train_vera()
    lora = train_lora()
    prompt = json.loads(HELD_OUT.read_text().splitlines()[1])["prompt"]
    console.print(f"\nPrompt: {prompt}")
    for name, row in (("base", base), ("VeRA", vera), ("LoRA", lora)):
        console.print(f"{name}: {row.example!r}", markup=False)
    console.print()
    console.print(table_of(base, vera, lora))
    seconds = time.perf_counter() - start
    console.print(f"whole demo: {seconds:,.0f} s, peak memory {peak_memory() / 2**30:.2f} GiB")
    if "--record" in sys.argv:
        record(base, vera, lora, seconds, peak_memory())
    console.print("Chat with the adapter: make chat      Serve it beside three others: make serve")


if __name__ == "__main__":
    main()
