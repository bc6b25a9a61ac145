"""The model card (README.md) of an adapter on the hub."""

import re
from collections.abc import Mapping

import yaml

from veratune.adapter import Adapter

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def model_card(
    adapter: Adapter,
    repo: str,
    *,
    file_bytes: int,
    dataset: str = "",
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
    peft_lora: bool = False,
) -> str:
    """The model card of an adapter.

    Args:
        adapter: The adapter.
        repo: "user/repo".
        file_bytes: Size of the adapter's file.
        dataset: The data set that it was trained on. A hub id is linked.
        before: Metrics of the base model.
        after: Metrics with the adapter.
        peft_lora: Whether the repository holds the PEFT LoRA folder too.

    Returns:
        Markdown with a YAML header.
    """
    header: dict[str, object] = {
        "base_model": adapter.base_id,
        "base_model_relation": "adapter",
        "library_name": "veratune",
        "tags": ["veratune", "vera"] + (["peft", "lora"] if peft_lora else []),
    }
    if _HUB_ID.fullmatch(dataset):
        header["datasets"] = [dataset]
    config = adapter.config
    rows = [
        ("Base model", adapter.base_id),
        ("Method", f"VeRA, rank {config.rank}, {len(adapter.shapes)} layers, basis {config.basis}"),
        ("Trained values", f"{adapter.trained_values:,}"),
        ("File", f"{file_bytes:,} bytes"),
    ]
    if dataset:
        rows.append(("Data set", dataset))
    if adapter.task.get("name"):
        rows.append(("Task", str(adapter.task["name"])))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {repo.rpartition('/')[2]}",
        f"A VeRA adapter for `{adapter.base_id}`: y = W x + b * (B (d * (A x))).",
        f"| | |\n|---|---|\n{table}",
    ]
    if after:
        base = {name: f"{value:.4f}" for name, value in (before or {}).items()}
        lines = "\n".join(
            f"| {name} | {base.get(name, '')} | {value:.4f} |" for name, value in after.items()
        )
        parts.append(f"## Metrics\n\n| | base model | with adapter |\n|---|---|---|\n{lines}")
    parts.append(
        "## How to load it\n\n```python\nimport veratune as vt\n\n"
        f'vt.load(model, "hf://{repo}")\n```\n\n'
        f"`veratune serve --adapters name=hf://{repo}` serves it."
    )
    if peft_lora:
        parts.append(
            "In PEFT, as a LoRA with the same outputs:\n\n```python\nfrom peft import PeftModel\n\n"
            f'PeftModel.from_pretrained(model, "{repo}", subfolder="peft-lora")\n```'
        )
    parts.append(
        "In vLLM: `veratune export adapter.safetensors --to vllm --out folder`, which prints the "
        "`vllm serve` line."
    )
    return "\n\n".join(parts) + "\n"
