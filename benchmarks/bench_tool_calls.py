"""Fine-tuning on tool calls: SmolLM2-135M turns sentences of E2E into calls of a function, VeRA beside LoRA.

    python benchmarks/bench_tool_calls.py --model FOLDER --data e2e_nlg --work out/tool_calls

A row is a sentence of E2E as the user's message, the tool's JSON schema, and the call whose arguments are the sentence's
slots. The chat template is qwen2_5 of TRL, in the format of Hermes. Finished runs in --work are not repeated. Writes
one line a run to results/tool_calls.jsonl: held-out loss and exact match of the whole call, before and after.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from veratune.inference.generate import exact_match, generate_completions
from veratune.tasks.text.language import Instruction

LINES = Path(__file__).parent / "results" / "tool_calls.jsonl"
SLOTS = [
    "name",
    "eatType",
    "food",
    "priceRange",
    "customer rating",
    "area",
    "familyFriendly",
    "near",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add_place",
        "description": "Add a place to the guide",
        "parameters": {
            "type": "object",
            "properties": {slot: {"type": "string"} for slot in SLOTS},
        },
    },
}
METHODS: dict[str, dict[str, Any]] = {
    "VeRA": {"lr": 4e-2},
    "LoRA": {"method": "peft:lora", "options": {"r": 8, "lora_alpha": 8}, "lr": 1e-3},
}


def write_rows(source: Any, path: Path, count: int) -> str:
    """The first sentence of each of `count` different meanings, as a conversation with a tool call."""
    seen: dict[str, str] = {}
    for row in source:
        seen.setdefault(row["mr"], row["ref"])
        if len(seen) == count:
            break
    with path.open("w") as file:
        for meaning, sentence in seen.items():
            slots = dict(re.findall(r"([\w ]+)\[([^\]]*)\]", meaning))
            call = {
                "type": "function",
                "function": {
                    "name": "add_place",
                    "arguments": {k.strip(): v for k, v in slots.items()},
                },
            }
            messages = [
                {"role": "system", "content": "You fill the guide."},
                {"role": "user", "content": sentence},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ]
            file.write(
                json.dumps({"messages": messages, "tools": [TOOL]}, ensure_ascii=False) + "\n"
            )
    return str(path)


class ExactMatch(TrainerCallback):
    """Completes the held-out prompts greedily when training begins and when it ends."""

    def __init__(self, settings: Any, held_out: str, before: bool) -> None:
        self.task = Instruction(chat_template=settings.chat_template)
        self.tokenizer = self.task.load_processor(settings.model)
        self.conversations = self.task.conversations(self.task.load_examples(held_out))
        self.wants_before = before
        self.before: float | None = None
        self.after: float | None = None
        self.completions: list[str] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if self.wants_before:
            self.before = self._score(model)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self.after = self._score(model)

    def _score(self, model: Any) -> float:
        model.eval()
        prompts = [c.messages[: c.assistant_turns[-1]] for c in self.conversations]
        tools = [c.tools for c in self.conversations]
        found = list(
            generate_completions(
                model, self.tokenizer, prompts, max_new_tokens=80, batch_size=8, tools=tools
            )
        )
        wanted = self.task.last_completions(self.conversations, self.tokenizer)
        self.completions = found[:2]
        return exact_match(found, wanted)


def run(
    method: str, seed: int, flags: argparse.Namespace, train_rows: str, held_out: str
) -> dict[str, Any]:
    from veratune.analysis.machine import describe_machine
    from veratune.config import VeraConfig
    from veratune.training.run import train
    from veratune.training.settings import TrainSettings

    folder = flags.work / f"{method}-{seed}"
    settings = TrainSettings(
        model=flags.model, task="instruction", data=train_rows, eval_data=held_out, out=str(folder), seed=seed,
        chat_template="qwen2_5", padding_free=True, batch_size=flags.batch, epochs=flags.epochs, max_length=512, keep="last",
        device="cpu", preview=0, **METHODS[method],
    )  # fmt: skip
    targets = ("query", "value")
    vera = (
        VeraConfig(rank=256, targets=targets) if method == "VeRA" else VeraConfig(targets=targets)
    )
    matches = ExactMatch(
        settings, held_out, before=flags.complete_before and seed == 0 and method == "VeRA"
    )
    start = time.process_time()
    result = train(settings, vera, callbacks=[matches])
    return {
        "method": method, "seed": seed, "lr": settings.lr, "epochs": settings.epochs, "batch": flags.batch, "targets": "query, value",
        "train_rows": flags.rows, "held_out_rows": flags.held_out, "trained": result.trained, "bytes": result.bytes,
        "loss_before": result.before["loss"], "loss_after": result.after["loss"],
        "exact_match_before": matches.before, "exact_match_after": matches.after, "completions": matches.completions, "steps": result.steps,
        "cpu_seconds": round(time.process_time() - start, 1), "beside": flags.beside, **describe_machine(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--held-out", type=int, default=24)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--complete-before", action="store_true")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--beside", default="nothing")
    flags = parser.parse_args()
    from veratune.tasks.data import load_examples

    flags.work.mkdir(parents=True, exist_ok=True)
    rows = write_rows(load_examples(flags.data, "train"), flags.work / "train.jsonl", flags.rows)
    held_out = write_rows(
        load_examples(flags.data, "validation"), flags.work / "held_out.jsonl", flags.held_out
    )
    for seed in range(flags.seeds):
        for method in METHODS:
            if (flags.work / f"{method}-{seed}" / "results.json").is_file():
                continue
            line = run(method, seed, flags, rows, held_out)
            with LINES.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
