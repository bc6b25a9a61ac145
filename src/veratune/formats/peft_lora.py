"""PEFT LoRA checkpoints: every adapter is a LoRA of rank r, exactly."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veratune.adapter import Adapter
from veratune.formats.expert_lora import ExpertStack, expert_stacks, is_expert
from veratune.formats.lora_matrices import (
    LoraPair,
    lora_pairs,
    most_common,
    stored_transposed,
)
from veratune.formats.peft_files import KEY_PREFIX, write_checkpoint


def write_lora(adapter: Adapter, folder: str | Path, model: nn.Module | None = None) -> None:
    """Write an Adapter as a PEFT LoRA checkpoint: lora_A = A, lora_B = s diag(b) B diag(d).

    Args:
        adapter: The adapter. Its heads become `modules_to_save`.
        folder: The checkpoint's folder; absent or empty.
        model: The base model (the meta device will do): needed for parts of fused layers, for
            convolutions and for experts.

    Raises:
        UnsupportedError: A layer that PEFT's LoRA cannot adapt, or a missing model.
        BaseModelError: The model lacks a layer.
        OutputError: The folder is in use or cannot be written.
    """
    write_pairs(adapter, lora_pairs(adapter, model), folder, model)


def write_pairs(
    adapter: Adapter,
    pairs: Mapping[str, LoraPair],
    folder: str | Path,
    model: nn.Module | None = None,
) -> None:
    """Write an adapter's LoRA pairs, possibly of a reduced rank, as a PEFT LoRA checkpoint."""
    experts = expert_stacks({k: pair for k, pair in pairs.items() if is_expert(k)}, model)
    linear = {layer: pair for layer, pair in pairs.items() if not is_expert(layer)}
    tensors = pair_tensors(linear)
    for stack in experts:
        tensors |= stack.tensors()
    tensors |= {f"{KEY_PREFIX}{name}": tensor for name, tensor in adapter.head.items()}
    settings = lora_settings(adapter, linear, experts)
    write_checkpoint(folder, settings | {"fan_in_fan_out": stored_transposed(model)}, tensors)


def pair_tensors(pairs: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """The tensors of LoRA pairs under PEFT's keys; a convolution's A is (r, in, k, ...)."""
    tensors = {}
    for layer, pair in pairs.items():
        A, B = pair.A, pair.B
        if pair.kernel:
            A = A.reshape(pair.rank, -1, *pair.kernel)
            B = B.reshape(*B.shape, *(1 for _ in pair.kernel))
        tensors[f"{KEY_PREFIX}{layer}.lora_A.weight"] = A
        tensors[f"{KEY_PREFIX}{layer}.lora_B.weight"] = B
    return tensors


def lora_settings(
    adapter: Adapter, pairs: Mapping[str, LoraPair], experts: Sequence[ExpertStack] = ()
) -> dict[str, Any]:
    """PEFT's LoraConfig of LoRA pairs and of experts, alpha = r."""
    ranks = {layer: pair.rank for layer, pair in pairs.items()}
    ranks |= {stack.parameter: stack.rank for stack in experts}
    rank = most_common(ranks.values())
    # PEFT matches these keys as regular expressions at the end of a layer's name.
    others = {layer: own for layer, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "base_model_name_or_path": adapter.base_id or None,
        "target_modules": list(pairs),
        "target_parameters": [stack.parameter for stack in experts] or None,
        "modules_to_save": list(adapter.config.head) or None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
    }
