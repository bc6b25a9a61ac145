"""Lin: an adapter layer with its own layer norm at the end of every block."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from veratune.config import VeraConfig
from veratune.training.baselines.modules import (
    add_module,
    add_to_output,
    block_width,
    relu_bottleneck,
    transformer_blocks,
)


def add_lin(model: nn.Module, config: VeraConfig, options: Mapping[str, Any]) -> None:
    """Add y + A(LN(y)) to each block's output y.

    Source: Lin, Madotto and Fung, "Exploring versatile generative language model via
    parameter-efficient transfer learning", 2020.
    """
    for path, block in transformer_blocks(model):
        adapter = relu_bottleneck(block_width(block, path), options, layer_norm=True)
        add_module(block, adapter, add_to_output)
