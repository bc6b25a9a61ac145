"""Merge an adapter into the weights, W <- W + ΔW, and take it out again bit for bit."""

import collections
import warnings

from torch import nn

from veratune.errors import AdapterNotFoundError, AdapterStateError, UnsupportedError
from veratune.layers.merging import MergeReport, total_rounding_error
from veratune.layers.weight_layer import VeraWeightLayer
from veratune.model_state import (
    adapted,
    check_known,
    known_names,
    merged_adapter,
    state_of,
    vera_layers,
)
from veratune.selection import use

_LOSS_TO_REPORT = 0.05  # of the norm of ΔW


def merge(model: nn.Module, name: str | None = None) -> list[MergeReport]:
    """Merge one adapter, W <- W + ΔW: inference then costs what the base model costs.

    The sum is taken in fp32 and rounded once to the base's dtype. The weights before are kept, so
    `unmerge` gives back their bits.

    Args:
        model: A model with adapters, or a wrapper of one.
        name: The adapter; default: the active one.

    Returns:
        What rounding lost in each layer. Warns when that is over a twentieth of ΔW.

    Raises:
        AdapterNotFoundError: There is no such adapter, or none is active.
        AdapterStateError: An adapter is merged already.
        UnsupportedError: A weight is quantized, sharded or tied. Then nothing is merged.
    """
    root = adapted(model)
    state = state_of(root)
    name = state.active if name is None else name
    if name is None:
        raise AdapterNotFoundError(
            f"no adapter is active; say which to merge: {known_names(state)}"
        )
    check_known(state, name)
    merged = merged_adapter(root)
    if merged is not None:
        raise AdapterStateError(f"adapter {merged!r} is merged already; unmerge it first")
    layers = [
        layer
        for layer in vera_layers(root)
        if isinstance(layer, VeraWeightLayer) and name in layer.vera
    ]
    _check_untied(root, layers, name)
    use(root, name)
    report = [entry for layer in layers for entry in layer.merge(name)]
    lost = total_rounding_error(report)
    if lost > _LOSS_TO_REPORT:
        warnings.warn(
            f"merging {name!r} rounded away {lost:.0%} of ΔW: the base model's dtype is too coarse "
            "for it. Load the base in float32 to merge without loss",
            stacklevel=2,
        )
    return report


def unmerge(model: nn.Module) -> None:
    """Give the base weights back bit for bit. Raises AdapterStateError if nothing is merged."""
    root = adapted(model)
    if merged_adapter(root) is None:
        raise AdapterStateError("no adapter is merged; there is nothing to unmerge")
    for layer in vera_layers(root):
        if isinstance(layer, VeraWeightLayer):
            layer.unmerge()


def _check_untied(root: nn.Module, layers: list[VeraWeightLayer], name: str) -> None:
    """Raise UnsupportedError where merging would change another module's weight too."""
    holders = collections.Counter(
        id(parameter)
        for module in root.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    for layer in layers:
        layer.check_mergeable(name)
        for vectors in layer.vectors(name):
            if holders[id(layer.weight_of(vectors.part.parameter))] > 1:
                raise UnsupportedError(
                    f"layer '{layer.name}' shares its weight with another module (a tied "
                    "embedding?), which merging would change too; untie them or exclude the layer"
                )
