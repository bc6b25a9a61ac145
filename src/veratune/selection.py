"""Choose which adapter computes: one for the whole batch, none, or one for each row."""

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence

from torch import nn

from veratune.batch_rows import prove_rows
from veratune.errors import AdapterStateError, InvalidNameError, UnsupportedError
from veratune.layers.rows import Rows
from veratune.layers.wrapper import VeraLayer
from veratune.model_state import (
    adapted,
    check_known,
    check_unmerged,
    merged_adapter,
    set_state,
    state_of,
    vera_layers,
)


def use(model: nn.Module, name: str | None) -> None:
    """Make one adapter the active one: it computes for every row.

    Args:
        model: A model with adapters, or a wrapper of one.
        name: The adapter; None is the base model, bit for bit.

    Raises:
        AdapterNotFoundError: The model has no such adapter.
        AdapterStateError: Another adapter is merged, or the model has no adapters.
    """
    root = adapted(model)
    state = state_of(root)
    check_known(state, name)
    if merged_adapter(root) != name:
        check_unmerged(root, f"using {name!r}")
    for layer in vera_layers(root):
        layer.active = name
    state.active = name


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the base model computes, as PEFT's `disable_adapter`.

    Args:
        model: A model with adapters, or a wrapper of one.

    Raises:
        AdapterStateError: An adapter is merged into the weights, or the model has no adapters.
    """
    root = adapted(model)
    check_unmerged(root, "disabling adapters")
    layers = vera_layers(root)
    before = [(layer.active, layer.rows) for layer in layers]
    active = state_of(root).active
    try:
        for layer in layers:
            layer.active, layer.rows = None, None
        state_of(root).active = None
        yield
    finally:
        for layer, (name, mixed) in zip(layers, before, strict=True):
            layer.active, layer.rows = name, mixed
        state_of(root).active = active


@contextlib.contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the block, row i of a batch uses adapter names[i]; None is the base model.

    A batch that is a multiple of the names repeats each name in place: beams, windows. The first
    call within the block proves for each adapted layer where the batch dimension is; a layer
    without a provable one is refused. With gradient checkpointing, call backward inside the
    block: the forward is computed again there.

    Args:
        model: A model with adapters, or a wrapper of one.
        names: An adapter's name, or None, for each row of the batch.

    Raises:
        InvalidNameError: `names` is empty or a single string.
        AdapterNotFoundError: The model has no adapter of a name.
        AdapterStateError: An adapter is merged into the weights.
        ShapeError: From the forward: the batch is no multiple of the names.
        UnsupportedError: From the forward: a layer's batch dimension cannot be proven.
    """
    root = adapted(model)
    if isinstance(names, str) or not names:
        raise InvalidNameError(
            f"rows wants one adapter name (or None) for each row of the batch, not {names!r}"
        )
    for name in names:
        check_known(state_of(root), name)
    check_unmerged(root, "mixing rows")
    for path, module in root.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise UnsupportedError(
                f"rows need the batch first, but '{path}' was built with batch_first=False"
            )
    layers = vera_layers(root)
    before = [(layer.rows, layer.active) for layer in layers]
    mixed = Rows(names)
    try:
        for layer in layers:
            if len(set(names)) > 1:
                layer.rows = mixed
            else:  # one adapter for the whole batch
                layer.rows, layer.active = None, names[0]
        with prove_rows(root, mixed, state_of(root).layouts):
            yield
    finally:
        for layer, (previous, name) in zip(layers, before, strict=True):
            layer.rows, layer.active = previous, name


def reference(model: nn.Module) -> nn.Module:
    """Return the base model as a module of its own that shares all weights with `model`.

    It is the reference policy of DPO, KTO and GRPO without a second model in memory. It is in
    evaluation mode; its train() and eval() leave `model` alone.

    Args:
        model: A model with adapters, or a wrapper of one.

    Returns:
        A module of the model's class, without adapters. Its forward raises AdapterStateError
        while an adapter is merged into the shared weights.

    Raises:
        AdapterStateError: The model has no adapters, or one is merged.
    """
    root = adapted(model)
    check_unmerged(root, "making a reference")
    shared = itertools.chain(root.parameters(), root.buffers())
    memo: dict[int, object] = {id(tensor): tensor for tensor in shared}
    memo[id(state_of(root))] = None
    for layer in vera_layers(root):
        if id(layer) not in memo:
            memo[id(layer)] = copy.deepcopy(_plain(layer), memo)
    clone = copy.deepcopy(root, memo)
    set_state(clone, None)
    clone.register_forward_pre_hook(_RefuseMerged(root))
    return clone.eval()


def _plain(layer: VeraLayer) -> nn.Module:
    return layer.base


class _RefuseMerged:
    """A forward hook: the shared weights must be the base model's."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def __call__(self, module: nn.Module, args: object) -> None:
        merged = merged_adapter(self.root)
        if merged is not None:
            raise AdapterStateError(
                f"adapter {merged!r} is merged into the weights that this reference shares; "
                "unmerge it first"
            )
