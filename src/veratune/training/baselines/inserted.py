"""What other methods add to a model: adapter layers after Houlsby, Pfeiffer, Lin and AdapterDrop, DyLoRA, LoRA-FA.

Each is a small module that hangs on a layer of the model, and changes what that layer gives back by a forward hook:
nothing of the model itself is replaced.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veratune.config import VeraConfig
from veratune.errors import ConfigError, TargetError, near
from veratune.targets import find_sites

NAME = "inserted"

# The projections that end a block's two halves, as families name them: BERT, RoBERTa, ViT, DINOv2; Llama, Qwen, Mistral, Gemma; GPT-2;
# DistilBERT; OPT, CLIP.
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
    """up(f(down(x))), with down (size, n) and up (n, size), both with a bias; layer_norm: of x, before.

    It starts near zero: weights are normal with standard deviation 0.01, biases zero.

    Source: Houlsby et al., "Parameter-efficient transfer learning for NLP", 2019, section 2.1.
    """

    def __init__(
        self,
        width: int,
        size: int,
        activation: Callable[[Tensor], Tensor],
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if layer_norm else nn.Identity()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        self.activation = activation
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.activation(self.down(self.norm(x))))


class Lora(nn.Module):
    """alpha / r * B (A x), with A (r, inputs) and B (outputs, r); B starts at zero."""

    def __init__(self, inputs: int, outputs: int, r: int, alpha: float) -> None:
        super().__init__()
        self.r, self.alpha = r, alpha
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(r, inputs), a=5**0.5))
        self.lora_B = nn.Parameter(torch.zeros(outputs, r))

    def forward(self, x: Tensor) -> Tensor:
        k = self.rank_now()
        return F.linear(F.linear(x, self.lora_A[:k]), self.lora_B[:, :k]) * (self.alpha / k)

    def rank_now(self) -> int:
        return self.r


class DyLora(Lora):
    """LoRA whose rank is drawn anew, from 1 to r, in every training step, so that its first rows are good alone; r in evaluation.

    Source: Valipour et al., "DyLoRA", 2023, algorithm 1, with all of the drawn rows trained (not the last one alone).
    """

    def rank_now(self) -> int:
        return int(torch.randint(1, self.r + 1, ())) if self.training else self.r


class LoraFa(Lora):
    """LoRA with A frozen. A is stored all the same, as a buffer.

    Source: Zhang et al., "LoRA-FA", 2023.
    """

    def __init__(self, inputs: int, outputs: int, r: int, alpha: float) -> None:
        super().__init__(inputs, outputs, r, alpha)
        frozen = self.lora_A.detach()
        del self.lora_A
        self.register_buffer("lora_A", frozen)


def insert(method: str, model: nn.Module, config: VeraConfig, options: Mapping[str, Any]) -> None:
    """Add a method's modules to a model, which is frozen already; they ask for gradients.

    config: its targets are those of the LoRAs. options: size (of the bottleneck), reduction (the width divided by the size), drop (blocks
    from the bottom that stay bare) of adapter layers; r and lora_alpha of LoRAs. Raises ConfigError for other options, and
    TargetError for a model in which the places are not found.
    """
    make, defaults = _METHODS[method]
    for name, value in options.items():
        if name not in defaults:
            raise ConfigError(
                f"method {method!r} has no option {name!r}; it has {', '.join(defaults)}{near(name, defaults)}"
            )
        if not isinstance(value, int) or value < (0 if name == "drop" else 1):
            raise ConfigError(
                f"option {name} of method {method!r} is {value!r}; a whole number of at least 1 is wanted"
            )
    make(model, config, {**defaults, **options})


def _houlsby(model: nn.Module, config: VeraConfig, options: Mapping[str, Any]) -> None:
    """h + A(h) after the projection that ends the attention, and after the one that ends the MLP."""
    for path, block in _blocks(model):
        for names in (ATTENTION_OUT, MLP_OUT):
            layer = _inside(block, names, path)
            adapter = Bottleneck(_width(layer), _size(_width(layer), options), F.silu)
            _hang(layer, adapter, lambda module, args, out: out + module.get_submodule(NAME)(out))


def _pfeiffer(model: nn.Module, config: VeraConfig, options: Mapping[str, Any]) -> None:
    """One adapter a block, at its end. Blocks that end in a layer norm (BERT): LN(s + A(LN(s))) of its input s; others: s + A(s)."""
    blocks = _blocks(model)
    drop = len(blocks) // 2 if options["drop"] is None else options["drop"]
    if drop >= len(blocks):
        raise ConfigError(
            f"drop is {drop}, but the model has {len(blocks)} blocks; leave at least one an adapter"
        )
    for path, block in blocks[drop:]:
        width = _width(_inside(block, MLP_OUT, path))
        adapter = Bottleneck(width, _size(width, options), F.relu)
        norm = next(
            (
                block.get_submodule(n)
                for n in ("output.LayerNorm", "output_layer_norm")
                if _has(block, n)
            ),
            None,
        )
        if norm is not None:

            def after_norm(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
                return type(module).forward(module, args[0] + module.get_submodule(NAME)(out))

            _hang(norm, adapter, after_norm)
        else:
            _hang(block, adapter, _at_the_end)


def _lin(model: nn.Module, config: VeraConfig, options: Mapping[str, Any]) -> None:
    """y + A(y) of a block's output y, where A has a layer norm of its own.

    Source: Lin, Madotto and Fung, "Exploring versatile generative language model via parameter-efficient transfer learning", 2020.
    """
    for path, block in _blocks(model):
        width = _width(_inside(block, MLP_OUT, path))
        _hang(block, Bottleneck(width, _size(width, options), F.relu, layer_norm=True), _at_the_end)


def _at_the_end(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    first = out[0] if isinstance(out, tuple) else out
    first = first + module.get_submodule(NAME)(first)
    return (first, *out[1:]) if isinstance(out, tuple) else first


def _lora(
    kind: type[Lora], model: nn.Module, config: VeraConfig, options: Mapping[str, Any]
) -> None:
    r = options["r"]
    for path in dict.fromkeys(site.module for site in find_sites(model, config)):
        layer = model.get_submodule(path)
        _hang(layer, kind(*_sizes(layer, path), r, options["lora_alpha"] or r), _beside)


def _beside(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out + module.get_submodule(NAME)(args[0])


def _hang(layer: nn.Module, inserted: nn.Module, change: Callable[..., Any]) -> None:
    where = next(layer.parameters())
    layer.add_module(NAME, inserted.to(where.device))
    layer.register_forward_hook(change)


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer's blocks, in order: numbered modules that hold the end of an MLP."""
    found = [
        (p, m)
        for p, m in model.named_modules()
        if _BLOCK.fullmatch(p) and any(_has(m, name) for name in MLP_OUT)
    ]
    if not found:
        raise TargetError(
            f"{type(model).__name__} has no numbered blocks with one of {', '.join(MLP_OUT)}: adapter layers are known for BERT, RoBERTa, "
            "ViT, DistilBERT, GPT-2, OPT and Llama's family; use method vera or peft:NAME"
        )
    return found


def _inside(block: nn.Module, names: Sequence[str], path: str) -> nn.Module:
    """The one submodule of a block whose path ends in one of some names."""
    for name in names:
        for own, module in block.named_modules():
            last = own == name or own.endswith("." + name)
            if last and not (names is MLP_OUT and "attention" in own):
                return module
    raise TargetError(
        f"{path}: none of {', '.join(names)} in it, so there is no place for the adapter layer"
    )


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _sizes(layer: nn.Module, path: str) -> tuple[int, int]:
    """Input and output size of a linear layer, or of GPT-2's Conv1D."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if hasattr(layer, "nf"):
        weight = layer.get_parameter("weight")
        return weight.shape[0], weight.shape[1]
    raise TargetError(
        f"{path} is a {type(layer).__name__}; this LoRA is for linear layers, use method peft:lora"
    )


def _width(layer: nn.Module) -> int:
    return _sizes(layer, "the end of the block")[1]


def _size(width: int, options: Mapping[str, Any]) -> int:
    return options["size"] or max(1, width // options["reduction"])


# What each method adds, and its options with their defaults.
_METHODS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "houlsby": (_houlsby, {"size": None, "reduction": 16}),
    "pfeiffer": (_pfeiffer, {"size": None, "reduction": 16, "drop": 0}),
    "lin": (_lin, {"size": None, "reduction": 16}),
    "adapterdrop": (_pfeiffer, {"size": None, "reduction": 16, "drop": None}),
    "dylora": (functools.partial(_lora, DyLora), {"r": 8, "lora_alpha": None}),
    "lora-fa": (functools.partial(_lora, LoraFa), {"r": 8, "lora_alpha": None}),
}
INSERTED = tuple(_METHODS)
