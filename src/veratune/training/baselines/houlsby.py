"""Houlsby: an adapter layer after the attention's and the MLP's last projection of every block."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from veratune.config import VeraConfig
from veratune.training.baselines.modules import (
    ATTENTION_OUT,
    MLP_OUT,
    add_module,
    add_to_output,
    linear_sizes,
    silu_bottleneck,
    submodule_ending_in,
    transformer_blocks,
)


def add_houlsby(model: nn.Module, config: VeraConfig, options: Mapping[str, Any]) -> None:
    """Add h + A(h) after the two projections that end each block's halves.

    Source: Houlsby et al., "Parameter-efficient transfer learning for NLP", 2019.
    """
    for path, block in transformer_blocks(model):
        for names in (ATTENTION_OUT, MLP_OUT):
            layer = submodule_ending_in(block, names, path)
            width = linear_sizes(layer, path)[1]
            add_module(layer, silu_bottleneck(width, options), add_to_output)
