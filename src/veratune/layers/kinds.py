"""Kinds of layers that can be adapted, their sizes, and how they store their weight."""

import sys
from typing import cast

from torch import Tensor, nn

from veratune.errors import UnsupportedError


def is_linear(module: nn.Module) -> bool:
    """Whether this is nn.Linear, a subclass (quantized ones too), or Hugging Face's Conv1D.

    A subclass that returns a tuple is none: the router of PhiMoE returns weights and experts.
    """
    if isinstance(module, nn.Linear):
        returned = type(module).forward.__annotations__.get("return")
        return not str(returned).startswith("tuple")
    return is_conv1d(module)


def is_attention(module: nn.Module) -> bool:
    """Whether this is torch's nn.MultiheadAttention."""
    return isinstance(module, nn.MultiheadAttention)


def is_conv(module: nn.Module) -> bool:
    """Whether this is a Conv1d to Conv3d or a transposed one (Hugging Face's Conv1D is linear)."""
    return isinstance(module, nn.modules.conv._ConvNd)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, asked without importing transformers."""
    known = sys.modules.get("transformers.pytorch_utils")
    return known is not None and isinstance(module, known.Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return cast(int, module.nf), cast(int, module.nx)


def stores_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores Wᵀ (in_features, out_features), as Conv1D does."""
    return is_conv1d(module)


def weight_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """W (out_features, in_features) of a linear layer's stored weight, or the reverse."""
    return weight.t() if stores_transposed(module) else weight


def check_weight(module: nn.Module, parameter: str, path: str) -> None:
    """Raise UnsupportedError unless a layer's weight is a parameter.

    A weight that is computed at each call (weight_norm, pruning) has no place for W + ΔW.

    Args:
        module: The layer.
        parameter: Name of the weight in it, such as "weight" or "out_proj.weight".
        path: Path of the layer in the model.

    Raises:
        UnsupportedError: the weight is parametrized or pruned.
    """
    owner, _, name = parameter.rpartition(".")
    holder = module.get_submodule(owner)
    weight = holder._parameters.get(name)
    if weight is None:
        raise UnsupportedError(
            f"layer '{path}' computes its {parameter} at each call (weight_norm, a parametrization "
            "or pruning); make it permanent (torch.nn.utils.parametrize.remove_parametrizations, "
            "torch.nn.utils.remove_weight_norm or prune.remove), or exclude the layer"
        )


def check_initialized(model: nn.Module) -> None:
    """Raise UnsupportedError if a lazy layer of the model has no sizes yet."""
    for path, module in model.named_modules():
        if any(nn.parameter.is_lazy(p) for p in module._parameters.values()):
            raise UnsupportedError(
                f"layer '{path}' is a {type(module).__name__} without sizes yet; "
                "run the model once, then attach"
            )
