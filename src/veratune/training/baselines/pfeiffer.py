"""Pfeiffer and AdapterDrop: one adapter layer at the end of every block, or of the upper ones."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from veratune.config import VeraConfig
from veratune.errors import ConfigError
from veratune.training.baselines.modules import (
    NAME,
    add_module,
    add_to_output,
    block_width,
    has_submodule,
    relu_bottleneck,
    transformer_blocks,
)

_FINAL_NORMS = ("output.LayerNorm", "output_layer_norm")


def add_pfeiffer(model: nn.Module, config: VeraConfig, options: Mapping[str, Any]) -> None:
    """Add one adapter layer A to the end of each block.

    A block that ends in a layer norm (BERT) computes LN(s + A(LN(s))) of the norm's input s; others
    compute y + A(y). Option `drop` leaves that many blocks bare from the bottom; None leaves half.

    Source: Pfeiffer et al., "AdapterFusion", 2021; Rücklé et al., "AdapterDrop", 2021.

    Raises:
        ConfigError: `drop` leaves no block.
    """
    blocks = transformer_blocks(model)
    drop = len(blocks) // 2 if options["drop"] is None else options["drop"]
    if drop >= len(blocks):
        raise ConfigError(
            f"drop is {drop}, but the model has {len(blocks)} blocks; leave at least one an adapter"
        )
    for path, block in blocks[drop:]:
        adapter = relu_bottleneck(block_width(block, path), options)
        norm = next((name for name in _FINAL_NORMS if has_submodule(block, name)), None)
        if norm is not None:
            add_module(block.get_submodule(norm), adapter, _inside_residual)
        else:
            add_module(block, adapter, add_to_output)


def _inside_residual(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Forward hook of a layer norm: LN(s + A(LN(s)))."""
    return type(module).forward(module, args[0] + module.get_submodule(NAME)(out))
