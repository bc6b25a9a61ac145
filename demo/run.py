"""The demo: teach SmolLM2-135M a house's command language with VeRA, and show what it took.

    make demo        (python demo/run.py --record writes the figures to benchmarks/results/demo.jsonl)

Everything is offline: the model comes in a pip package, the sentences are in this folder.
"""

import contextlib
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
OUT = HERE.parent / "out" / "demo"
MODEL, RUN = OUT / "smollm2", OUT / "run"
RANK, TARGETS, LR = 256, ("query", "value"), 4e-2
console = Console(highlight=False)


def peft_bytes() -> dict[str, int]:
    """What PEFT writes for the same layers: measured by letting it write."""
    import peft
    from transformers import AutoModelForCausalLM

    targets = ["q_proj", "v_proj"]
    configs = {
        "PEFT LoRA, rank 8": peft.LoraConfig(r=8, target_modules=targets),
        f"PEFT VeRA, rank {RANK}": peft.VeraConfig(r=RANK, target_modules=targets),
    }
    sizes = {}
    for name, config in configs.items():
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = AutoModelForCausalLM.from_pretrained(MODEL)
            peft.get_peft_model(base, config).save_pretrained(folder)
            sizes[name] = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return sizes


def main() -> None:
    start = time.perf_counter()
    OUT.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(RUN, ignore_errors=True)
    warnings.filterwarnings("ignore")
    import logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from veratune_lab.paper.language_models import smollm2

    console.print("Unpacking the model (once) ...")
    with contextlib.redirect_stderr(io.StringIO()):
        smollm2(MODEL)

    import torch
    import transformers

    from veratune import VeraConfig, use
    from veratune.cli.train_ import preview_on
    from veratune.inference.evaluate import evaluate_with_base, load_with_adapter
    from veratune.inference.generate import generate_completions
    from veratune.tasks.data import load_examples
    from veratune.training.run import peak_memory, train
    from veratune.training.settings import TrainSettings

    settings = TrainSettings(
        model=str(MODEL), task="instruction", data=str(HERE / "train.jsonl"), eval_data=str(HERE / "heldout.jsonl"),
        out=str(RUN), lr=LR, batch_size=8, epochs=3, max_length=128, device="cpu", keep="last",
    )  # fmt: skip
    console.print("Fine-tuning SmolLM2-135M on 160 sentences ...")
    result = train(settings, VeraConfig(rank=RANK, targets=TARGETS), preview_on(console))

    console.print("Asking the base model and the adapted one 32 held-out sentences ...")
    with contextlib.redirect_stderr(io.StringIO()):
        loaded = load_with_adapter(str(MODEL), result.path, device="cpu")
        heldout = str(HERE / "heldout.jsonl")
        before, after = evaluate_with_base(
            loaded, heldout, generate=True, max_new_tokens=40, batch_size=32
        )
        sizes = peft_bytes()

    rows = load_examples(heldout)
    conversation = [{"role": "user", "content": rows[1]["prompt"]}]
    examples = {}
    for who, name in (("before", None), ("after", "default")):
        use(loaded.model, name)
        examples[who] = next(
            generate_completions(loaded.model, loaded.processor, [conversation], max_new_tokens=40)
        )
    console.print(
        f"\nAsked: {conversation[0]['content']}\nbefore: {examples['before']!r}\nafter:  {examples['after']!r}\n"
    )

    table = Table(title="VeRA on SmolLM2-135M: sentence -> JSON command", title_justify="left")
    for column, side in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(column, justify=side)
    table.add_row(
        "held-out exact match", f"{before['exact_match']:.1%}", f"{after['exact_match']:.1%}"
    )
    table.add_row("held-out loss", f"{before['loss']:.3f}", f"{after['loss']:.3f}")
    table.add_section()
    table.add_row("trained values", "", f"{result.trained:,}")
    table.add_row("adapter file", "", f"{result.bytes:,} bytes")
    for name, size in sizes.items():
        table.add_row(f"  {name} would write", "", f"{size:,} bytes")
    table.add_row("training", "", f"{result.seconds:,.0f} s")
    table.add_row("whole demo", "", f"{time.perf_counter() - start:,.0f} s")
    table.add_row("peak memory", "", f"{peak_memory() / 2**30:.2f} GiB")
    console.print(table)
    if "--record" in sys.argv:
        line = {
            "exact_match": [before["exact_match"], after["exact_match"]], "loss": [before["loss"], after["loss"]],
            "trained": result.trained, "bytes": result.bytes, "peft_bytes": sizes, "training_seconds": round(result.seconds),
            "demo_seconds": round(time.perf_counter() - start), "peak_memory": peak_memory(), "threads": torch.get_num_threads(),
            "machine": platform.machine(), "torch": torch.__version__, "transformers": transformers.__version__,
        }  # fmt: skip
        (HERE.parent / "benchmarks" / "results" / "demo.jsonl").write_text(json.dumps(line) + "\n")
    console.print("Talk to it:  make chat      Serve it, with others beside it:  make serve")


if __name__ == "__main__":
    main()
