"""Put adapters into a model, and take them out again.

`attach` finds the layers that the config names (targets.py), checks everything
(compatibility.py), makes the vectors d and b of each layer, and only then changes the model: each
layer is wrapped in a VeraLayer, every other parameter is frozen. The model stays of its own class.
`detach` puts the very modules back.
"""

import copy
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import nn

from veratune.base_weights import principal_basis
from veratune.basis.basis import Basis, basis_of
from veratune.basis.lora import LoraBasis
from veratune.compatibility import (
    bypassed_layers,
    check_basis,
    check_config,
    check_lora_shapes,
    check_new_name,
    check_overlap,
    check_plan,
)
from veratune.config import ALL_LINEAR, VeraConfig
from veratune.errors import AdapterStateError, UnsupportedError
from veratune.fast_path import leave_fast_path, restore_fast_path
from veratune.layers.attention import VeraMultiheadAttention
from veratune.layers.conv import VeraConv
from veratune.layers.experts import VeraExperts, is_experts
from veratune.layers.head import VeraHead
from veratune.layers.kinds import check_initialized, is_attention, is_conv
from veratune.layers.linear import VeraLinear
from veratune.layers.quantized import is_dense
from veratune.layers.vectors import VeraVectors
from veratune.layers.weight_layer import VeraWeightLayer
from veratune.layers.wrapper import VeraLayer, replace_modules
from veratune.merging import unmerge
from veratune.model_state import (
    AdapterState,
    adapted,
    check_known,
    find_adapted,
    merged_adapter,
    set_state,
    state_of,
    vera_layers,
)
from veratune.selection import use
from veratune.targets import (
    Site,
    base_module,
    config_for_lora,
    find_heads,
    find_sites,
    left_out,
)

M = TypeVar("M", bound=nn.Module)
_LOG = logging.getLogger("veratune")
_INDEX = re.compile(r"\.\d+(?=\.)")


def attach(
    model: M,
    config: VeraConfig | None = None,
    name: str = "default",
    *,
    trainable: bool = True,
    basis: Basis | None = None,
) -> M:
    """Add an adapter to a model, in place, and make it the active one.

    All parameters but the adapter's are frozen, and ΔW = 0 until it is trained. Further adapters
    may have other targets, ranks and seeds: each computes as if alone.

    Args:
        model: Any module with linear layers or convolutions.
        config: Rank, targets and the rest; default: VeraConfig().
        name: Any text without a dot.
        trainable: Whether the adapter's vectors and heads require gradients.
        basis: For config.basis="lora": the LoRA's matrices, from `read_lora`. ΔW starts at that
            LoRA.

    Returns:
        The model.

    Raises:
        TargetError: The targets do not fit the model.
        ConfigError: The config has a wrong type, or settings that do not fit a layer.
        AdapterStateError: The name is taken, or an adapter is merged.
        UnsupportedError: A layer cannot be adapted. After any error the model is unchanged.

    >>> from veratune import VeraConfig, attach
    >>> plain = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> model = attach(plain, VeraConfig(rank=4, targets=["0"]), name="alice")
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    10
    """
    config = check_config(config)
    check_initialized(model)
    check_basis(config, basis)
    if isinstance(basis, LoraBasis):
        config = config_for_lora(model, config, basis.ranks())
    sites = _drop_bypassed(model, config, find_sites(model, config))
    _log_left_out(model, config, sites)
    return attach_sites(model, config, name, sites, trainable=trainable, basis=basis)


def attach_sites(
    model: M,
    config: VeraConfig,
    name: str,
    sites: list[Site],
    *,
    trainable: bool = True,
    basis: Basis | None = None,
) -> M:
    """Add an adapter at the given sites; `attach` and adapter files come together here.

    Args: as of `attach`; sites: the adapted matrices, which the config's patterns are not asked
    for.
    """
    state = _state_for(model)
    check_new_name(model, state, name)
    check_basis(config, basis)
    if isinstance(basis, LoraBasis):
        check_lora_shapes(model, sites, basis)
    heads = find_heads(model, config.head)
    check_overlap(model, sites, [path for path, _ in heads])
    bases = {site.module: base_module(model, site.module) for site in sites}
    check_plan(model, config, bases)
    _check_called(model, sites)
    if config.basis == "principal":
        basis = principal_basis(model, config, sites)
    basis = basis or basis_of(config, {site.name: site.shape for site in sites})
    vectors = []
    for site in sites:
        device = bases[site.module].get_parameter(site.part.parameter).device
        made = VeraVectors(site.name, site.part, site.rank, basis, config, device)
        vectors.append((site, made.requires_grad_(trainable)))
    copies = [(path, copy.deepcopy(module).requires_grad_(trainable)) for path, module in heads]
    _reserve(basis, sites, bases)

    # Nothing above has touched the model; nothing below can fail.
    if not state.configs:
        state.trained = [p for p in model.parameters() if p.requires_grad]
        set_state(model, state)
    for parameter in state.trained:
        parameter.requires_grad_(False)
    weight_layers = _wrap(model, {path: _weight_layer(base) for path, base in bases.items()})
    for site, made in vectors:
        weight_layers[site.module].add(name, made)
    head_layers = _wrap(model, {path: VeraHead for path, _ in copies})
    for path, module in copies:
        head_layers[path].add(name, module)
    state.configs[name] = config
    leave_fast_path(model, state.slowed)
    use(model, name)
    return model


def remove(model: nn.Module, name: str) -> None:
    """Take one adapter out of a model. If it was active, the base model is active afterwards.

    Args:
        model: A model with adapters, or a wrapper of one.
        name: The adapter; if it is merged, it is unmerged first.

    Raises:
        AdapterNotFoundError: The model has no such adapter.
    """
    root = adapted(model)
    state = state_of(root)
    check_known(state, name)
    if merged_adapter(root) == name:
        unmerge(root)
    if state.active == name and len(state.configs) > 1:
        use(root, None)
    for layer in vera_layers(root):
        if name in layer.vera:
            del layer.vera[name]
    del state.configs[name]
    state.tasks.pop(name, None)
    _unwrap(root, lambda layer: layer.base if not len(layer.vera) else layer)
    if not state.configs:
        _forget(root, state)


def detach(model: M, *, keep_merged: bool = False) -> M:
    """Take all adapters out: the very modules that came in, with their requires_grad as it was.

    Args:
        model: A model with adapters, or a wrapper of one.
        keep_merged: Leave the merged adapter in the weights, and its heads in place: a plain
            fine-tuned model. Otherwise a merged adapter is unmerged first.

    Returns:
        The model.

    Raises:
        AdapterStateError: The model has no adapters, or keep_merged=True and nothing is merged.
    """
    root = adapted(model)
    merged = merged_adapter(root)
    if keep_merged and merged is None:
        raise AdapterStateError("keep_merged=True, but no adapter is merged; call merge first")
    for layer in vera_layers(root):
        if isinstance(layer, VeraWeightLayer):
            layer.unmerge(restore=not keep_merged)

    def plain(layer: VeraLayer) -> nn.Module:
        if keep_merged and isinstance(layer, VeraHead) and str(merged) in layer.vera:
            return layer.vera[str(merged)]
        return layer.base

    _unwrap(root, plain)
    _forget(root, state_of(root))
    return model


def _state_for(model: nn.Module) -> AdapterState:
    """The model's state. Raises AdapterStateError where a part of the model has its own."""
    root = find_adapted(model)
    if root is not None and root is not model:
        path = next(path for path, module in model.named_modules() if module is root)
        raise AdapterStateError(
            f"the module '{path}' of {type(model).__name__} has adapters already; attach further "
            "adapters to that module, or detach them first"
        )
    return state_of(model)


def _drop_bypassed(model: nn.Module, config: VeraConfig, sites: list[Site]) -> list[Site]:
    """Leave out what the default or `all-linear` found but the model does not call; say so."""
    bypassed = bypassed_layers(model, sites)
    by_name = config.targets is not None and ALL_LINEAR not in config.targets
    if not bypassed or by_name or len(bypassed) == len(sites):
        return sites
    name, reader = next(iter(bypassed.items()))
    warnings.warn(
        f"attach leaves out {len(bypassed)} layers such as '{name}': {reader} reads their "
        "weight without calling them, so an adapter would be ignored",
        stacklevel=3,
    )
    return [site for site in sites if site.name not in bypassed]


def _check_called(model: nn.Module, sites: list[Site]) -> None:
    """Raise UnsupportedError where the parent reads a weight past the adapted layer."""
    bypassed = bypassed_layers(model, sites)
    if bypassed:
        name, reader = next(iter(bypassed.items()))
        raise UnsupportedError(
            f"layer '{name}' cannot be adapted: {reader} reads its weight without calling it, so "
            f"the adapter would be ignored; exclude it ({len(bypassed)} such layers)"
        )


def _log_left_out(model: nn.Module, config: VeraConfig, sites: list[Site]) -> None:
    """Say in one line which weights "all-linear" cannot adapt, and how many they are."""
    if ALL_LINEAR not in (config.targets or ()):
        return
    parameters, share = left_out(model, sites)
    if parameters:
        kinds = sorted({_INDEX.sub(".*", path) for path in parameters})
        names = ", ".join(kinds[:6]) + (f" and {len(kinds) - 6} more" if len(kinds) > 6 else "")
        _LOG.warning("all-linear leaves out %.1f%% of the weights: %s", 100 * share, names)


def _weight_layer(base: nn.Module) -> type[VeraWeightLayer]:
    if is_attention(base):
        return VeraMultiheadAttention
    if is_experts(base):
        return VeraExperts
    return VeraConv if is_conv(base) else VeraLinear


def _reserve(basis: Basis, sites: list[Site], bases: Mapping[str, nn.Module]) -> None:
    """Make the shared matrices at once, at full size, where the products' dtype is known."""
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[str, int, int, int]]] = {}
    for site in sites:
        weight = bases[site.module].get_parameter(site.part.parameter)
        if is_dense(weight) and weight.device.type != "meta":
            kinds.setdefault((weight.device, weight.dtype), []).append(
                (site.name, *site.shape, site.rank)
            )
    for (device, dtype), layers in kinds.items():
        basis.reserve(layers, device, dtype)


L = TypeVar("L", bound=VeraLayer)


def _wrap(model: nn.Module, kinds: Mapping[str, type[L]]) -> dict[str, L]:
    """Return the VeraLayers at these paths; a new one goes wherever its module stands."""
    modules = {path: model.get_submodule(path) for path in kinds}
    made = {
        module: kinds[path](module, path)
        for path, module in modules.items()
        if not isinstance(module, VeraLayer)
    }
    replace_modules(model, lambda module: made.get(module, module))
    return {path: made.get(module, module) for path, module in modules.items()}  # type: ignore[misc]


def _unwrap(model: nn.Module, choose: Callable[[VeraLayer], nn.Module]) -> None:
    """Replace each VeraLayer, wherever it stands, by what `choose` returns."""
    replace_modules(
        model, lambda module: choose(module) if isinstance(module, VeraLayer) else module
    )


def _forget(root: nn.Module, state: AdapterState) -> None:
    for parameter in state.trained:
        parameter.requires_grad_(True)
    restore_fast_path(state.slowed)
    set_state(root, None)
