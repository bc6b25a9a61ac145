"""Adapters of a model's backbone, such as those of a sentence encoder, on the model with a head."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from veratune.adapter import Adapter, check_fits

T = TypeVar("T")


def at_backbone(model: nn.Module, adapter: Adapter) -> Adapter:
    """Give the layers of an adapter of `model`'s backbone their names in `model`.

    A sentence encoder is trained on a BertModel; a server loads BertForSequenceClassification,
    whose `bert` is that model. Layers whose matrices depend on their name (sharing="unique") keep
    it.

    Args:
        model: A transformers model, whose `base_model_prefix` names its backbone.
        adapter: Any adapter.

    Returns:
        The renamed adapter, checked against the backbone's weights; any other adapter as it is.

    Raises:
        BaseModelError: The layers are the backbone's, the weights are not.
    """
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if isinstance(prefix, str) and prefix else None
    if not isinstance(backbone, nn.Module) or adapter.head or adapter.config.sharing == "unique":
        return adapter
    paths = dict(model.named_modules())
    first = next(iter(adapter.shapes)).partition(":")[0]
    if first in paths or f"{prefix}.{first}" not in paths:
        return adapter
    check_fits(backbone, adapter)

    def renamed(values: Mapping[str, T]) -> dict[str, T]:
        return {f"{prefix}.{layer}": value for layer, value in values.items()}

    return dataclasses.replace(
        adapter,
        shapes=renamed(adapter.shapes),
        d=renamed(adapter.d),
        b=renamed(adapter.b),
        kernels=renamed(adapter.kernels),
        layer_ranks=renamed(adapter.ranks),
        base_fingerprint=None,  # of the backbone alone, and checked above
    )
