"""Which adapter is an input for? Routing over eight tasks, and what it does to the tasks' scores.

    python benchmarks/bench_routing.py --model SMOLLM2 --encoder MINILM --data DATA --work out/routing

Each task has one VeRA adapter. Half of its examples have an instruction before the input, half have
the bare input. Finished adapters in --work are not trained again, and finished lines are not
measured again. Writes results/routing.jsonl: which adapter the server's router chose for each
held-out input, by the base's own embedding and by the encoder's; and the loss and exactness of
held-out answers under the base, the adapter chosen by the encoder, the right and a wrong adapter.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LINES = Path(__file__).parent / "results" / "routing.jsonl"
FORMS = ("instruction", "bare")
EMBEDS = ("base", "encoder")
Row = Mapping[str, Any]


def words(*names: str) -> Callable[[Row], str]:
    """The answer word of a row's label."""
    return lambda row: names[row["label"]]


# Task -> its folder, its instruction, its input, and its answer.
TASKS: dict[str, tuple[str, str, Callable[[Row], str], Callable[[Row], str]]] = {
    "restaurants": (
        "e2e_nlg",
        "Write a sentence with these facts:",
        lambda row: row["mr"],
        lambda row: row["ref"],
    ),
    "alpaca": ("alpaca_9k", "", lambda row: row["instruction"], lambda row: row["output"]),
    "sst2": (
        "glue_sst2",
        "Is this film review positive or negative?",
        lambda row: row["sentence"].strip(),
        words("negative", "positive"),
    ),
    "cola": (
        "glue_cola",
        "Is this sentence grammatical? Answer acceptable or unacceptable.",
        lambda row: row["sentence"],
        words("unacceptable", "acceptable"),
    ),
    "qnli": (
        "glue_qnli",
        "Does the text answer the question? Answer yes or no.",
        lambda row: f"{row['question']}\n{row['sentence']}",
        words("yes", "no"),
    ),
    "mrpc": (
        "glue_mrpc",
        "Do both sentences mean the same? Answer equivalent or different.",
        lambda row: f"{row['sentence1']}\n{row['sentence2']}",
        words("different", "equivalent"),
    ),
    "rte": (
        "glue_rte",
        "Does the second sentence follow from the first? Answer true or unknown.",
        lambda row: f"{row['sentence1']}\n{row['sentence2']}",
        words("true", "unknown"),
    ),
    "stsb": (
        "glue_stsb",
        "How similar are both sentences, from 0 to 5?",
        lambda row: f"{row['sentence1']}\n{row['sentence2']}",
        lambda row: str(round(row["label"])),
    ),
}
OPEN_ENDED = ("restaurants", "alpaca")  # no answer word: scored by the loss alone


def prompt_of(task: str, row: Row, form: str) -> str:
    """The user's message."""
    instruction, text = TASKS[task][1], TASKS[task][2](row)
    return f"{instruction}\n{text}" if instruction and form == "instruction" else text


def short_rows(task: str, data: Path, split: str, count: int, skip: int = 0) -> list[Row]:
    """Rows of a task in a fixed random order, without long ones."""
    from veratune.tasks.data import load_examples

    rows = load_examples(str(data / TASKS[task][0]), split)
    order = list(range(len(rows)))
    random.Random(7).shuffle(order)
    found: list[Row] = []
    for number in order:
        row = rows[number]
        if len(TASKS[task][2](row)) <= 240 and len(TASKS[task][3](row)) <= 160:
            found.append(row)
        if len(found) == skip + count:
            break
    found = found[skip:]
    assert len(found) == count, (task, split, len(found))
    return found


def examples(task: str, flags: argparse.Namespace, split: str) -> list[dict[str, str]]:
    """Prompts and completions of a task: of a split "train", or of "held_out" in both forms."""
    last = "train" if task == "alpaca" else "validation"
    if split == "train":
        rows = short_rows(task, flags.data, "train", flags.rows)
        pairs = [(row, FORMS[i % 2]) for i, row in enumerate(rows)]
    else:
        skip = flags.rows if last == "train" else 0
        rows = short_rows(task, flags.data, last, flags.held_out, skip)
        pairs = [(row, form) for form in FORMS for row in rows]
    return [
        {"prompt": prompt_of(task, row, form), "completion": TASKS[task][3](row), "form": form}
        for row, form in pairs
    ]


def train_adapter(task: str, flags: argparse.Namespace) -> None:
    """Train the adapter of a task unless it is there."""
    from veratune.config import VeraConfig
    from veratune.training.run import train
    from veratune.training.settings import TrainSettings

    folder = flags.work / task
    if (folder / "results.json").is_file():
        return
    start = time.process_time()
    rows = folder.with_suffix(".jsonl")
    lines = [{k: e[k] for k in ("prompt", "completion")} for e in examples(task, flags, "train")]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = TrainSettings(
        model=flags.model,
        task="instruction",
        data=str(rows),
        out=str(folder),
        lr=flags.lr,
        epochs=flags.epochs,
        batch_size=8,
        padding_free=True,
        max_length=256,
        keep="last",
        device="cpu",
        preview=0,
    )
    train(settings, VeraConfig(rank=256, targets=("query", "value")))
    print(task, "trained", round(time.process_time() - start), "CPU seconds", flush=True)


def route(
    embeds: str, flags: argparse.Namespace, done: Container[tuple[str, str, str]]
) -> Iterator[dict[str, Any]]:
    """What the router chooses for the held-out inputs of each task and form, and for MT-Bench."""
    from transformers import AutoModel, AutoTokenizer

    from veratune.serving.routing.embedder import Embedder
    from veratune.serving.routing.router import Router
    from veratune.serving.store.sqlite import SqliteStore

    path = flags.model if embeds == "base" else flags.encoder
    model = AutoModel.from_pretrained(path, dtype="float32").eval()
    embedder = Embedder(model, AutoTokenizer.from_pretrained(path))
    store = flags.work / f"{embeds}.db"
    store.unlink(missing_ok=True)
    router = Router(SqliteStore(store), embedder, refresh_seconds=1e9)
    for task in TASKS:
        router.store.put("bench", task, (flags.work / task / "adapter.safetensors").read_bytes())
        prompts = [example["prompt"] for example in examples(task, flags, "train")]
        router.put("bench", task, prompts)
    questions = (flags.data / "mt_bench" / "mt_bench_questions.jsonl").read_text().splitlines()
    inputs = {("mt_bench", ""): [json.loads(line)["turns"][0] for line in questions]}
    for task in TASKS:
        for example in examples(task, flags, "held_out"):
            inputs.setdefault((task, example["form"]), []).append(example["prompt"])
    for (task, form), texts in inputs.items():
        if (embeds, task, form) in done:
            continue
        start = time.process_time()
        chosen = [router.choose("bench", [[text]]) for text in texts]
        yield {
            "what": "route",
            "embeds": embeds,
            "task": task,
            "form": form,
            "chosen": chosen,
            "cpu_ms": round(1e3 * (time.process_time() - start) / len(texts), 1),
        }


def score(
    task: str, form: str, flags: argparse.Namespace, model: Any, chosen: Sequence[str | None]
) -> dict[str, Any]:
    """Loss and exactness of a task's held-out answers under four models.

    An answer is exact if each of its tokens, the end of the turn included, is the likeliest one:
    greedy decoding would give it.
    """
    import datasets
    import torch

    import veratune as vt
    from veratune.tasks.text.language import Instruction

    instruction = Instruction(max_length=512)
    tokenizer = instruction.load_processor(flags.model)
    rows = [
        {"prompt": example["prompt"], "completion": example["completion"]}
        for example in examples(task, flags, "held_out")
        if example["form"] == form
    ][: flags.scored]
    encoded = instruction.encode(datasets.Dataset.from_list(rows), tokenizer)
    names = list(TASKS)
    wrong = names[(names.index(task) + len(names) // 2) % len(names)]
    losses: dict[str, list[float]] = {kind: [] for kind in ("base", "auto", "right", "wrong")}
    exact: dict[str, list[bool]] = {kind: [] for kind in losses}
    tokens: list[int] = []
    for row, choice in zip(encoded, chosen, strict=False):
        kinds = {"base": None, "auto": choice, "right": task, "wrong": wrong}
        adapters = list(dict.fromkeys(kinds.values()))
        labels = torch.tensor(row["labels"])[1:]
        answer = labels != -100
        count = int(answer.sum())  # the answer is the end of the row
        assert answer[-count:].all()
        ids = torch.tensor([row["input_ids"]] * len(adapters))
        with torch.no_grad(), vt.rows(model, adapters):
            logits = model(ids, logits_to_keep=count + 1).logits[:, :-1]
        for kind, adapter in kinds.items():
            own = logits[adapters.index(adapter)]
            loss = torch.nn.functional.cross_entropy(own, labels[answer], reduction="sum")
            losses[kind].append(round(loss.item(), 4))
            exact[kind].append(bool((own.argmax(-1) == labels[answer]).all()))
        tokens.append(count)
    found = {"what": "score", "task": task, "form": form, "wrong": wrong, "tokens": tokens}
    return {**found, "losses": losses, "exact": exact}


def read() -> list[dict[str, Any]]:
    """The lines that were measured."""
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def measure(flags: argparse.Namespace) -> None:
    """Append the lines that are not there."""
    import veratune as vt
    from veratune.analysis.machine import describe_machine
    from veratune.tasks.text.language import Instruction

    done = {(line.get("embeds"), line["task"], line["form"]) for line in read()}

    def add(line: dict[str, Any]) -> None:
        sizes = {"train_rows": flags.rows, "held_out_rows": flags.held_out, "epochs": flags.epochs}
        text = json.dumps({**line, **sizes, "beside": flags.beside, **describe_machine()})
        with LINES.open("a") as file:
            file.write(f"{text}\n")
        print(text[:150], flush=True)

    for embeds in EMBEDS:
        if flags.only in (None, embeds) and (embeds, "stsb", "bare") not in done:
            for line in route(embeds, flags, done):
                add(line)
    left = [
        (task, form)
        for task in TASKS
        for form in FORMS
        if flags.only in (None, task) and (None, task, form) not in done
    ]
    if not left:
        return
    instruction = Instruction(max_length=512)
    model = instruction.load_model(flags.model, instruction.load_processor(flags.model)).eval()
    chosen = {
        (line["task"], line["form"]): line["chosen"]
        for line in read()
        if line.get("embeds") == "encoder"
    }
    for task in TASKS:
        vt.load(model, str(flags.work / task / "adapter.safetensors"), name=task)
    for task, form in left:
        add(score(task, form, flags, model, chosen[task, form]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=20)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--lr", type=float, default=4e-2)
    parser.add_argument("--beside", default="nothing")
    parser.add_argument("--scored", type=int, default=10, help="of a task's held-out inputs")
    parser.add_argument(
        "--only", choices=(*TASKS, *EMBEDS), help="one task's scores, or one model's choices"
    )
    flags = parser.parse_args()
    flags.work.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        train_adapter(task, flags)
    measure(flags)


if __name__ == "__main__":
    main()
