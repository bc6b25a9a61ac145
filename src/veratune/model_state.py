"""The adapters of a model: their configs, which one is active, and where their vectors are.

An adapted model stays of its own class. An `AdapterState` hangs on it, and every function here
finds it through a wrapper too: DistributedDataParallel, torch.compile, a Lightning module, a
SentenceTransformer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from veratune.config import VeraConfig
from veratune.errors import AdapterNotFoundError, AdapterStateError, near
from veratune.layers.head import VeraHead
from veratune.layers.vectors import VeraVectors
from veratune.layers.weight_layer import VeraWeightLayer
from veratune.layers.wrapper import VeraLayer

_STATE = "_veratune"

# Called with a model when it gets its first adapter, and when it loses its last one: rooms above
# add what an adapted model must do differently.
ON_ADAPTED: list[Callable[[nn.Module], None]] = []
ON_PLAIN: list[Callable[[nn.Module], None]] = []


@dataclasses.dataclass
class AdapterState:
    """State that attach keeps on a model.

    Attributes:
        configs: The adapters, by name.
        tasks: The task metadata of each adapter that has some.
        active: The active adapter; None is the base model.
        trained: The parameters that required gradients before the first attach.
        slowed: torch's encoder layers that were taken off their fused kernel.
        layouts: Where each layer's batch dimension is, as `rows` has proven it.
    """

    configs: dict[str, VeraConfig] = dataclasses.field(default_factory=dict)
    tasks: dict[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    active: str | None = None
    trained: list[nn.Parameter] = dataclasses.field(default_factory=list)
    slowed: list[nn.Module] = dataclasses.field(default_factory=list)
    layouts: dict[str, Literal["first", "second", "unknown"]] = dataclasses.field(
        default_factory=dict
    )


def adapters(model: nn.Module) -> dict[str, VeraConfig]:
    """Return the configs of a model's adapters, by name; empty for a model without adapters."""
    root = find_adapted(model)
    return dict(state_of(root).configs) if root is not None else {}


def active(model: nn.Module) -> str | None:
    """Return the name of the active adapter; None is the base model."""
    root = find_adapted(model)
    return state_of(root).active if root is not None else None


def vectors_of(model: nn.Module, name: str) -> list[VeraVectors]:
    """Return the vectors of one adapter, layer by layer in the model's order."""
    root = adapted(model)
    check_known(state_of(root), name)
    return [
        vectors
        for layer in vera_layers(root)
        if isinstance(layer, VeraWeightLayer)
        for vectors in layer.vectors(name)
    ]


def heads_of(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return the modules that one adapter trains in full, by their path."""
    root = adapted(model)
    check_known(state_of(root), name)
    return {
        layer.name: layer.vera[name]
        for layer in vera_layers(root)
        if isinstance(layer, VeraHead) and name in layer.vera
    }


def count_trained(model: nn.Module, name: str) -> int:
    """Return how many values an adapter trains in its vectors d and b; heads are not counted."""
    return sum(p.numel() for vectors in vectors_of(model, name) for p in vectors.parameters())


def set_task_metadata(model: nn.Module, name: str, task: Mapping[str, Any]) -> None:
    """Set what an adapter is for; it is written into the adapter's file.

    Args:
        model: A model with adapters.
        name: The adapter.
        task: JSON types: the task's name, columns, label names.
    """
    state = state_of(adapted(model))
    check_known(state, name)
    state.tasks[name] = dict(task)


def task_metadata(model: nn.Module, name: str) -> Mapping[str, Any]:
    """Return what `set_task_metadata` set; empty if nothing was."""
    state = state_of(adapted(model))
    check_known(state, name)
    return state.tasks.get(name, {})


def find_adapted(model: nn.Module) -> nn.Module | None:
    """Return the module that adapters were attached to: the model, or the one inside a wrapper.

    Raises:
        AdapterStateError: Several models inside the wrapper have adapters.
    """
    if _STATE in model.__dict__:
        return model
    inner = {
        id(module): (path, module)
        for path, module in model.named_modules()
        if _STATE in module.__dict__
    }
    if len(inner) > 1:
        paths = ", ".join(f"'{path}'" for path, _ in inner.values())
        raise AdapterStateError(
            f"{type(model).__name__} holds {len(inner)} models with adapters ({paths}); pass one"
        )
    return next((module for _, module in inner.values()), None)


def adapted(model: nn.Module) -> nn.Module:
    """Return the module that adapters were attached to. Raises AdapterStateError without any."""
    root = find_adapted(model)
    if root is None:
        raise AdapterStateError(f"{type(model).__name__} has no adapters; attach or load one first")
    return root


def state_of(root: nn.Module) -> AdapterState:
    """Return the state of an adapted model; an empty one for a model without adapters."""
    state = root.__dict__.get(_STATE)
    return state if isinstance(state, AdapterState) else AdapterState()


def set_state(root: nn.Module, state: AdapterState | None) -> None:
    """Put a state on a model, or take it off."""
    if state is not None:
        setattr(root, _STATE, state)
    elif _STATE in root.__dict__:
        delattr(root, _STATE)
    for callback in ON_PLAIN if state is None else ON_ADAPTED:
        callback(root)


def vera_layers(root: nn.Module) -> list[VeraLayer]:
    """Return the adapted layers and heads of a model."""
    return [module for module in root.modules() if isinstance(module, VeraLayer)]


def merged_adapter(root: nn.Module) -> str | None:
    """Return the adapter that is merged into the weights, if one is."""
    return next((layer.merged for layer in vera_layers(root) if layer.merged is not None), None)


def known_names(state: AdapterState) -> str:
    """Return the adapters' names for an error message."""
    return ", ".join(map(repr, state.configs)) or "none"


def check_known(state: AdapterState, name: str | None) -> None:
    """Raise AdapterNotFoundError unless the name is an adapter's, or None."""
    if name is not None and name not in state.configs:
        raise AdapterNotFoundError(
            f"no adapter {name!r}; the model has {known_names(state)}"
            f"{near(str(name), state.configs)}"
        )


def check_unmerged(root: nn.Module, purpose: str) -> None:
    """Raise AdapterStateError where an adapter is merged; purpose: what wants it unmerged."""
    merged = merged_adapter(root)
    if merged is not None:
        raise AdapterStateError(
            f"adapter {merged!r} is merged into the weights; unmerge before {purpose}"
        )
