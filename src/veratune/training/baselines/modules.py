"""Where and how a baseline's modules are added to a model: by forward hooks, replacing nothing."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from veratune.errors import TargetError

NAME = "inserted"  # the submodule that a baseline adds to a layer

# The projections that end a block's two halves. BERT, RoBERTa, ViT and DINOv2; Llama, Qwen, Mistral
# and Gemma; GPT-2; DistilBERT; OPT and CLIP.
ATTENTION_OUT = (
    "attention.output.dense",
    "self_attn.o_proj",
    "attn.c_proj",
    "attention.out_lin",
    "self_attn.out_proj",
)
MLP_OUT = ("output.dense", "mlp.down_proj", "mlp.c_proj", "mlp.fc2", "ffn.lin2", "fc2")
_BLOCK = re.compile(r"(?:.*\.)?\d+")


class Bottleneck(nn.Module):
    """An adapter layer, up(f(down(x))), with biases; it starts near zero.

    Weights are normal with standard deviation 0.01; biases are zero.

    Source: Houlsby et al., "Parameter-efficient transfer learning for NLP", 2019, section 2.1.
    """

    def __init__(
        self,
        width: int,
        size: int,
        activation: Callable[[Tensor], Tensor],
        layer_norm: bool = False,
    ) -> None:
        """Build the layer.

        Args:
            width: Size n of x.
            size: Size of the bottleneck: down is (size, n), up is (n, size).
            activation: f.
            layer_norm: Normalise x first.
        """
        super().__init__()
        self.norm = nn.LayerNorm(width) if layer_norm else nn.Identity()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        self.activation = activation
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.activation(self.down(self.norm(x))))


def add_module(layer: nn.Module, module: nn.Module, hook: Callable[..., Any]) -> None:
    """Add a module to a layer under NAME, with a forward hook that changes the layer's output."""
    where = next(layer.parameters())
    layer.add_module(NAME, module.to(where.device))
    layer.register_forward_hook(hook)


def add_to_output(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    """Forward hook: y + A(y) of a layer's output y, the first one if there are several."""
    first = out[0] if isinstance(out, tuple) else out
    first = first + module.get_submodule(NAME)(first)
    return (first, *out[1:]) if isinstance(out, tuple) else first


def transformer_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer's blocks in order: numbered modules that hold the end of an MLP.

    Raises:
        TargetError: The model has none.
    """
    blocks = [
        (path, module)
        for path, module in model.named_modules()
        if _BLOCK.fullmatch(path) and any(has_submodule(module, name) for name in MLP_OUT)
    ]
    if not blocks:
        raise TargetError(
            f"{type(model).__name__} has no numbered blocks with one of {', '.join(MLP_OUT)}: "
            "adapter layers are known for BERT, RoBERTa, ViT, DistilBERT, GPT-2, OPT and Llama's "
            "family; use method vera or peft:NAME"
        )
    return blocks


def submodule_ending_in(block: nn.Module, names: Sequence[str], path: str) -> nn.Module:
    """The first submodule of a block whose path ends in one of `names`.

    Raises:
        TargetError: There is none.
    """
    for name in names:
        for inner, module in block.named_modules():
            ends = inner == name or inner.endswith("." + name)
            if ends and not (names is MLP_OUT and "attention" in inner):
                return module
    raise TargetError(
        f"{path}: none of {', '.join(names)} in it, so there is no place for the adapter layer"
    )


def has_submodule(module: nn.Module, path: str) -> bool:
    """Whether a module has a submodule of that path."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def linear_sizes(layer: nn.Module, path: str) -> tuple[int, int]:
    """Input and output size of a linear layer or of GPT-2's Conv1D.

    Raises:
        TargetError: The layer is another one.
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if hasattr(layer, "nf"):
        weight = layer.get_parameter("weight")
        return weight.shape[0], weight.shape[1]
    raise TargetError(
        f"{path} is a {type(layer).__name__}; this LoRA is for linear layers, use method peft:lora"
    )


def block_width(block: nn.Module, path: str) -> int:
    """Size of a block's output."""
    return linear_sizes(submodule_ending_in(block, MLP_OUT, path), path)[1]


def bottleneck_size(width: int, options: Mapping[str, Any]) -> int:
    """Size of the bottleneck: option `size`, or the width divided by option `reduction`."""
    return options["size"] or max(1, width // options["reduction"])


def silu_bottleneck(width: int, options: Mapping[str, Any]) -> Bottleneck:
    """Houlsby's adapter layer."""
    return Bottleneck(width, bottleneck_size(width, options), F.silu)


def relu_bottleneck(width: int, options: Mapping[str, Any], layer_norm: bool = False) -> Bottleneck:
    """Pfeiffer's adapter layer; Lin's with `layer_norm`."""
    return Bottleneck(width, bottleneck_size(width, options), F.relu, layer_norm)
