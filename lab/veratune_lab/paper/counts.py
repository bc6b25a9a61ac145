"""What can be counted without training: table 1, the counts of tables 2 to 5 and 13, and the settings of tables 8 to 11."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

from veratune.config import VeraConfig
from veratune.targets import find_sites
from veratune_lab.paper import fewshot, glue, instruct, table3
from veratune_lab.paper.experiment import Cell, Experiment, Line, Place, Scale, table

# Table 1: adapted layers and width; then, by rank, the printed values and bytes of LoRA and of VeRA.
MODELS = {"RoBERTa-base": (24, 768), "RoBERTa-large": (48, 1024), "GPT-3": (192, 12288)}
TABLE1: dict[tuple[str, int], tuple[str, str, str, str]] = {
    ("RoBERTa-base", 1): ("36.8K", "144KB", "18.4K", "72KB"), ("RoBERTa-base", 16): ("589.8K", "2MB", "18.8K", "74KB"),
    ("RoBERTa-base", 256): ("9437.1K", "36MB", "24.5K", "96KB"), ("RoBERTa-large", 1): ("98.3K", "384KB", "49.2K", "192KB"),
    ("RoBERTa-large", 16): ("1572.8K", "6MB", "49.5K", "195KB"), ("RoBERTa-large", 256): ("25165.8K", "96MB", "61.4K", "240KB"),
    ("GPT-3", 1): ("4.7M", "18MB", "2.4M", "9.1MB"), ("GPT-3", 16): ("75.5M", "288MB", "2.8M", "10.5MB"),
    ("GPT-3", 256): ("1207.9M", "4.6GB", "8.7M", "33MB"),
}  # fmt: skip


def wrong1(model: str, rank: int) -> str:
    """What is wrong with the print of VeRA's values."""
    layers, width = MODELS[model]
    if model == "GPT-3":
        return f"the frozen pair is counted too: {layers * (width + rank) + 2 * width * rank:,} values with its 2 d r."
    if (model, rank) == ("RoBERTa-large", 16):
        return "49.5K is printed where 48 (1024 + 16) is 49,920."
    return ""


class _Counted(Experiment):
    """Cells that are arithmetic alone: equal at every scale."""

    seeds = {"quick": 1, "scaled": 1, "full": 1}


def counted(name: str, **values: Any) -> Cell:
    """A cell whose line is known."""

    def run(place: Place, seed: int, folder: Path) -> Line:
        return {}

    return Cell(name=name, shown=values, run=run)


class Table1(_Counted):
    name = "table1"
    about = "trainable values and bytes of LoRA and VeRA, RoBERTa and GPT-3 (VeRA, table 1): exact"

    def cells(self, scale: Scale) -> list[Cell]:
        cells = []
        for (model, rank), printed in TABLE1.items():
            layers, width = MODELS[model]
            lora, vera = 2 * layers * width * rank, layers * (width + rank)
            cells.append(counted(
                f"{model}, rank {rank}", model=model, rank=rank, layers=layers, width=width,
                lora=lora, lora_bytes=4 * lora, lora_printed=printed[0], lora_bytes_printed=printed[1],
                vera=vera, vera_bytes=4 * vera, vera_printed=printed[2], vera_bytes_printed=printed[3],
                vera_with_pair=vera + 2 * width * rank, wrong=wrong1(model, rank),
            ))  # fmt: skip
        return cells

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        rows = [
            [line["model"], line["rank"], method, f"{line[key]:,}", line[f"{key}_printed"], f"{line[f'{key}_bytes']:,}", line[f"{key}_bytes_printed"]]
            for line in lines
            for method, key in (("LoRA", "lora"), ("VeRA", "vera"))
        ]  # fmt: skip
        wrong = [f"- {line['cell']}: {line['wrong']}" for line in lines if line["wrong"]]
        return "\n".join([
            f"# {self.name}: {self.about}", "", table(["model", "rank", "method", "values", "printed", "bytes", "printed"], rows),
            "L layers of width d: LoRA 2 L d r, VeRA L (d + r) values of four bytes; KB and MB are 1,024 and 1,048,576 bytes in the print.", "",
            "Where the print of VeRA is another:", "", *wrong, "",
        ])  # fmt: skip


LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


def _roberta(large: bool) -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**(LARGE if large else {})))


def _gpt2(width: int, layers: int, heads: int) -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=width, n_layer=layers, n_head=heads))


def _llama(width: int, inner: int, layers: int, heads: int) -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
        )
    )


def _vit(large: bool) -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**(LARGE if large else {})))


QV = ("query", "value")
ALL = ("all-linear",)
# Table, model, how it is built, targets, then by method its rank, the printed count, and what is wrong with the print.
COUNTS: list[tuple[str, str, Any, tuple[str, ...], dict[str, tuple[int, str, str]]]] = [
    ("table2", "RoBERTa-base", functools.partial(_roberta, False), QV, {"LoRA": (8, "0.3M", ""), "VeRA": (1024, "0.043M", "")}),
    ("table2", "RoBERTa-large", functools.partial(_roberta, True), QV, {"LoRA": (8, "0.8M", ""), "VeRA": (256, "0.061M", "")}),
    ("table3", "GPT-2 medium", functools.partial(_gpt2, 1024, 24, 16), QV, {
        "LoRA": (4, "0.35M", "0.1% of the model; rank 4 has 393,216"), "VeRA": (1024, "0.098M", "")}),
    ("table3", "GPT-2 large", functools.partial(_gpt2, 1280, 36, 20), QV, {
        "LoRA": (4, "0.77M", "0.1% of the model; rank 4 has 737,280"), "VeRA": (1024, "0.17M", "")}),
    ("table4", "Llama 7B", functools.partial(_llama, 4096, 11008, 32, 32), ALL, {"LoRA": (64, "159.9M", ""), "VeRA": (1024, "1.6M", "")}),
    ("table4", "Llama 13B", functools.partial(_llama, 5120, 13824, 40, 40), ALL, {"LoRA": (64, "250.3M", ""), "VeRA": (1024, "2.4M", "")}),
    ("table5", "ViT-B", functools.partial(_vit, False), QV, {"LoRA": (8, "294.9K", ""), "VeRA": (256, "24.6K", "")}),
    ("table5", "ViT-L", functools.partial(_vit, True), QV, {"LoRA": (8, "786.4K", ""), "VeRA": (256, "61.4K", "")}),
    ("table13", "Llama 7B", functools.partial(_llama, 4096, 11008, 32, 32), ALL, {
        "LoRA": (64, "159.9M", ""), "VeRA": (256, "1.4M", "the rank is not said: 256 gives it, 1024 has 1,589,248")}),
]  # fmt: skip


class Counts(_Counted):
    name = "counts"
    about = "trainable values of tables 2 to 5 and 13, counted on the models themselves (without weights)"

    def cells(self, scale: Scale) -> list[Cell]:
        return [
            Cell(
                name=f"{source}, {model}: {method}",
                shown={"table": source, "model": model, "method": method, "rank": rank, "printed": printed, "wrong": wrong},
                run=functools.partial(self._run, build, targets, method, rank),
            )
            for source, model, build, targets, methods in COUNTS
            for method, (rank, printed, wrong) in methods.items()
        ]  # fmt: skip

    @staticmethod
    def _run(
        build: Any,
        targets: tuple[str, ...],
        method: str,
        rank: int,
        place: Place,
        seed: int,
        folder: Path,
    ) -> Line:
        with torch.device("meta"):
            model = build()
        sites = find_sites(model, VeraConfig(rank=rank, targets=targets))
        values = sum(s.shape[0] + rank if method == "VeRA" else rank * sum(s.shape) for s in sites)
        return {"layers": len(sites), "trained": values, "bytes": 4 * values}

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        rows = [
            [
                line["table"],
                line["model"],
                line["method"],
                line["rank"],
                line["layers"],
                f"{line['trained']:,}",
                line["printed"],
                line["wrong"],
            ]
            for line in lines
        ]
        head = ["table", "model", "method", "rank", "matrices", "values", "printed", "the print"]
        return f"# {self.name}: {self.about}\n\n{table(head, rows)}"


class _Settings(_Counted):
    """A table of hyperparameters: what `--full` of another table runs with."""

    of: str
    printed: str

    def page(self, lines: Sequence[Line], scale: Scale) -> str:
        if not lines:
            return f"# {self.name}: {self.about}\n"
        keys = [k for k in lines[0] if k in lines[0]["settings_shown"]]
        rows = [
            [
                line["cell"],
                *(f"{line[key]:g}" if isinstance(line[key], float) else line[key] for key in keys),
            ]
            for line in lines
        ]
        return "\n".join([
            f"# {self.name}: {self.about}", "", table(["run", *keys], rows),
            f"As printed, and as `python -m veratune_lab {self.of} --full` runs them. {self.printed}", "",
        ])  # fmt: skip


def settings_cell(name: str, settings: Mapping[str, Any]) -> Cell:
    return counted(name, **settings, settings_shown=list(settings))


class Table8(_Settings):
    name, of = "table8", "table2"
    about = "settings on GLUE (VeRA, table 8)"
    printed = "AdamW, 6% warmup, linear decay, Kaiming uniform, d from 0.1. The large model's 128 are four GPUs with 32 each. Not said: weight decay, dropout, clipping."

    def cells(self, scale: Scale) -> list[Cell]:
        return [
            settings_cell(f"{model.rpartition('/')[2]}, {glue.GLUE[task].title}", {
                "rank": glue.PAPER_RANK[model], "epochs": epochs, "head_lr": head_lr, "lr": lr, **glue.PAPER_MODEL[model],
            })
            for model, tasks in glue.PAPER.items() for task, (epochs, head_lr, lr) in tasks.items()
        ]  # fmt: skip


class Table9(_Settings):
    name, of = "table9", "table4"
    about = "settings of instruction tuning (VeRA, table 9)"
    printed = "Not said: the sequence's length (here 512), LoRA's alpha (16) and dropout, seeds, decoding."

    def cells(self, scale: Scale) -> list[Cell]:
        return [settings_cell(method, settings) for method, settings in instruct.TABLE9.items()]


class Table10(_Settings):
    name, of = "table10", "table3"
    about = "settings on E2E (VeRA, table 10)"
    printed = "Not said: seeds, and where d starts (here 0.1)."

    def cells(self, scale: Scale) -> list[Cell]:
        return [
            settings_cell(model.rpartition("/")[2], settings)
            for model, settings in table3.TABLE10.items()
        ]


class Table11(_Settings):
    name, of = "table11", "table5"
    about = "learning rates of the vision transformers (VeRA, table 11)"
    printed = "AdamW, linear decay, weight decay 0.01, VeRA rank 256, LoRA rank 8, 10 epochs. Not said: batch size, resolution, augmentation, seeds."

    def cells(self, scale: Scale) -> list[Cell]:
        return [
            settings_cell(f"{model.rpartition('/')[2]}, {data}, {method}", {"lr": lr, "head_lr": head_lr})
            for model, sets in fewshot.PAPER.items() for data, methods in sets.items() for method, (lr, head_lr) in methods.items()
        ]  # fmt: skip
