"""Baselines by name: Houlsby, Pfeiffer, AdapterDrop, Lin, DyLoRA and LoRA-FA."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from veratune.config import VeraConfig
from veratune.errors import ConfigError, near
from veratune.training.baselines.houlsby import add_houlsby
from veratune.training.baselines.lin import add_lin
from veratune.training.baselines.lora import DyLora, LoraFa, add_lora
from veratune.training.baselines.pfeiffer import add_pfeiffer

# The function that adds each baseline, and its options with their defaults.
_BASELINES: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "houlsby": (add_houlsby, {"size": None, "reduction": 16}),
    "pfeiffer": (add_pfeiffer, {"size": None, "reduction": 16, "drop": 0}),
    "lin": (add_lin, {"size": None, "reduction": 16}),
    "adapterdrop": (add_pfeiffer, {"size": None, "reduction": 16, "drop": None}),
    "dylora": (functools.partial(add_lora, DyLora), {"r": 8, "lora_alpha": None}),
    "lora-fa": (functools.partial(add_lora, LoraFa), {"r": 8, "lora_alpha": None}),
}
BASELINES = tuple(_BASELINES)


def add_baseline(
    method: str, model: nn.Module, config: VeraConfig, options: Mapping[str, Any]
) -> None:
    """Add a baseline's trainable modules to a frozen model.

    Args:
        method: One of BASELINES.
        model: The model, changed in place.
        config: Its targets are the layers of DyLoRA and LoRA-FA.
        options: For adapter layers: size (of the bottleneck), reduction (the width divided by the
            size), drop (blocks without an adapter, from the bottom). For LoRAs: r and lora_alpha.

    Raises:
        ConfigError: An option is unknown or out of range.
        TargetError: The model has no place for the modules.
    """
    add, defaults = _BASELINES[method]
    for name, value in options.items():
        if name not in defaults:
            raise ConfigError(
                f"method {method!r} has no option {name!r}; it has {', '.join(defaults)}"
                f"{near(name, defaults)}"
            )
        if not isinstance(value, int) or value < (0 if name == "drop" else 1):
            raise ConfigError(
                f"option {name} of method {method!r} is {value!r}; "
                "a whole number of at least 1 is wanted"
            )
    add(model, config, {**defaults, **options})
