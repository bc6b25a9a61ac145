"""Experts as PEFT LoRA: `target_parameters`, one LoRA for each expert of a fused 3-D weight.

PEFT's ParamWrapper stacks the matrices of E experts at one rank r:

    lora_A (E r, n)   rows e r to (e + 1) r are A of expert e
    lora_B (m, r E)   columns e, E + e, 2 E + e, ... are B of expert e

The wrappers of one module are nested in the order of its weights: the last weight has the module's
own key, each earlier one `base_layer.` more. Source: peft 0.21.2, tuners/lora/layer.py.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veratune.errors import BaseModelError, UnsupportedError
from veratune.formats.lora_matrices import LoraPair
from veratune.formats.peft_files import KEY_PREFIX
from veratune.formats.reduction import padded
from veratune.layers.experts import ExpertWeight, expert_weights
from veratune.patterns import PART
from veratune.targets import layers_of


@dataclasses.dataclass(frozen=True)
class ExpertStack:
    """The LoRA of all experts of one fused weight.

    Attributes:
        parameter: The weight's path in the model.
        key: The path that PEFT gives its LoRA.
        rank: r, the same for every expert.
        A: Shape (E r, n), float32.
        B: Shape (m, r E), float32.
    """

    parameter: str
    key: str
    rank: int
    A: Tensor
    B: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under PEFT's names."""
        key = f"{KEY_PREFIX}{self.key}"
        return {f"{key}.lora_A.weight": self.A, f"{key}.lora_B.weight": self.B}


def is_expert(layer: str) -> bool:
    """Whether an adapter's layer is one expert of a fused weight, such as "experts.w1:3"."""
    return layer.partition(PART)[2].isdecimal()


def expert_stacks(pairs: Mapping[str, LoraPair], model: nn.Module | None) -> list[ExpertStack]:
    """Stack the LoRA pairs of experts as PEFT does, exactly.

    Experts without a pair get zeros, and lower ranks are filled with zeros to the highest one of
    the weight.

    Args:
        pairs: LoRA pairs of experts, by "path.weight:expert".
        model: The base model; the meta device will do.

    Raises:
        UnsupportedError: A missing model, or weights that are not 3-D (DBRX).
        BaseModelError: The model lacks a weight or has another size.
    """
    if not pairs:
        return []
    if model is None:
        raise UnsupportedError(
            f"layer '{next(iter(pairs))}' is one expert of a fused weight; its LoRA needs the base "
            "model's configuration: give --model"
        )
    by_weight: dict[str, dict[int, LoraPair]] = {}
    for layer, pair in pairs.items():
        path, _, expert = layer.partition(PART)
        by_weight.setdefault(path, {})[int(expert)] = pair
    out = []
    for path, module in layers_of(model):
        layouts = expert_weights(module)
        adapted = [w for w in layouts if f"{path}.{w.parameter}" in by_weight]
        for depth, layout in enumerate(reversed(adapted)):
            if "." in layout.parameter:
                raise UnsupportedError(
                    f"layer '{path}.{layout.parameter}' keeps its experts in one 2-D weight, which "
                    "PEFT's LoRA does not take apart; merge the adapter into a folder instead"
                )
            weight = f"{path}.{layout.parameter}"
            key = path + ".base_layer" * depth
            out.append(_stack(weight, key, layout, by_weight.pop(weight)))
    if by_weight:
        raise BaseModelError(
            f"the adapter has experts of '{next(iter(by_weight))}', {type(model).__name__} has not"
        )
    return out


def _stack(
    weight: str, key: str, layout: ExpertWeight, pairs: Mapping[int, LoraPair]
) -> ExpertStack:
    """The stacked LoRA of one weight."""
    rank = max(pair.rank for pair in pairs.values())
    A = torch.zeros(layout.experts, rank, layout.in_features)
    B = torch.zeros(layout.out_features, rank, layout.experts)
    for name, pair in padded({str(expert): pair for expert, pair in pairs.items()}, rank).items():
        expert = int(name)
        wanted = layout.out_features, layout.in_features
        if expert >= layout.experts or (pair.B.shape[0], pair.A.shape[1]) != wanted:
            raise BaseModelError(
                f"the adapter has expert {expert} of '{weight}' of shape "
                f"{(pair.B.shape[0], pair.A.shape[1])}; the model has {layout.experts} experts of "
                f"{wanted}"
            )
        A[expert], B[:, :, expert] = pair.A, pair.B
    return ExpertStack(weight, key, rank, A.flatten(0, 1), B.flatten(1))
