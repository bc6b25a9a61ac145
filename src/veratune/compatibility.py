"""Checks that attach runs before it changes a model. Each raises with the layer and the way out."""

import ast
import importlib.util
import inspect
import re
import textwrap
from collections.abc import Mapping

from torch import nn

from veratune.basis.basis import Basis
from veratune.basis.lora import LoraBasis
from veratune.config import VeraConfig
from veratune.errors import (
    AdapterStateError,
    BaseModelError,
    ConfigError,
    InvalidNameError,
    UnsupportedError,
)
from veratune.layers.head import VeraHead
from veratune.layers.kinds import is_attention, is_conv
from veratune.layers.weight_layer import VeraWeightLayer
from veratune.model_state import AdapterState, check_unmerged, vera_layers
from veratune.targets import Site

# Methods that read a weight without computing with it.
_NOT_FORWARD = re.compile(r"init|reset|load|save|prune|tie|resize|fuse_proj")
_METADATA = frozenset({"device", "dtype", "is_meta", "ndim", "requires_grad", "shape", "size"})
_QUESTIONS = frozenset({"isinstance", "hasattr", "getattr", "id", "type"})

# Kernels of state space models that take the weights of layers; without their packages,
# transformers calls the layers instead.
_FUSED_KERNELS = frozenset({"mamba_inner_fn", "mamba_split_conv1d_scan_combined"})
# transformers' DeBERTa v1 reads in_proj.weight only for `query_states`, which it passes when
# z_steps is over 1; it sets z_steps to 0.
_NEVER_READ = frozenset({("DisentangledSelfAttention", "in_proj")})
_KERNEL_PACKAGES = ("mamba_ssm", "kernels")


def check_config(config: object) -> VeraConfig:
    """Return the config, or the default for None. Raises ConfigError for another type."""
    if config is None:
        return VeraConfig()
    if isinstance(config, VeraConfig):
        return config
    if isinstance(config, Mapping):
        raise ConfigError(
            "config is a dict; a VeraConfig is wanted: attach(model, veratune.VeraConfig(**config))"
        )
    raise ConfigError(
        f"config is a {type(config).__name__}; a VeraConfig is wanted: "
        "attach(model, veratune.VeraConfig(rank=256))"
    )


def check_new_name(root: nn.Module, state: AdapterState, name: str) -> None:
    """Raise unless an adapter called `name` can be added to the model now."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise InvalidNameError(
            f"adapter name {name!r} cannot be used: torch needs a name without a dot that is no "
            "attribute of nn.ModuleDict"
        )
    if name in state.configs:
        raise AdapterStateError(
            f"adapter {name!r} is attached already; remove it first or choose another name"
        )
    check_unmerged(root, f"adding {name!r}")


def check_basis(config: VeraConfig, basis: Basis | None) -> None:
    """Raise ConfigError unless a LoRA was given exactly where the config says basis="lora"."""
    if (config.basis == "lora") != isinstance(basis, LoraBasis):
        given = "no LoRA" if basis is None else "a LoRA"
        raise ConfigError(
            f"config.basis is {config.basis!r} and attach was given {given}; an adapter over a "
            "LoRA wants VeraConfig(basis='lora') and "
            "attach(..., basis=veratune.read_lora(file, model))"
        )


def check_lora_shapes(model: nn.Module, sites: list[Site], basis: LoraBasis) -> None:
    """Raise BaseModelError naming the first layer whose size differs from the LoRA's."""
    for site in sites:
        A, B = basis.pairs[site.name]
        if (B.shape[0], A.shape[1]) != site.shape:
            raise BaseModelError(
                f"the LoRA is of another model: layer '{site.name}' is "
                f"{A.shape[1]} -> {B.shape[0]} in it and {site.shape[1]} -> {site.shape[0]} in "
                f"{type(model).__name__}"
            )


def check_plan(model: nn.Module, config: VeraConfig, bases: Mapping[str, nn.Module]) -> None:
    """Raise ConfigError where the config's dropout or plan does not fit the kind of a layer."""
    inside = f"{type(model).__name__} is adapted inside nn.MultiheadAttention"
    if any(is_attention(base) for base in bases.values()):
        if config.dropout:
            raise ConfigError(
                f"dropout is {config.dropout}, but {inside}, where the adapter has no input of its "
                "own to drop; set dropout to 0 or exclude those layers"
            )
        if config.plan not in ("auto", "merged"):
            raise ConfigError(
                f"plan={config.plan!r}, but {inside}, which takes W + ΔW only; use plan='auto' or "
                "exclude those layers"
            )
    if config.plan == "projected" and any(is_conv(base) for base in bases.values()):
        raise ConfigError(
            "plan='projected' is for linear layers, but convolutions are adapted too; use "
            "plan='auto', 'factored', 'merged' or 'dense'"
        )


def check_overlap(model: nn.Module, sites: list[Site], heads: list[str]) -> None:
    """Raise UnsupportedError where an adapted layer lies inside a head, or a head holds one.

    The layers and heads of all adapters count.
    """
    layers = {layer.name: layer for layer in vera_layers(model)}
    for path in heads:
        for name, layer in layers.items():
            if isinstance(layer, VeraWeightLayer) and f"{name}.".startswith(f"{path}."):
                raise UnsupportedError(
                    f"head {path!r} holds the adapted layer '{name}'; a module is either adapted "
                    "or trained in full"
                )
    for site in sites:
        for name, layer in layers.items():
            if isinstance(layer, VeraHead) and f"{site.module}.".startswith(f"{name}."):
                raise UnsupportedError(
                    f"layer '{site.name}' is inside the head '{name}' of another adapter; "
                    "exclude it"
                )


def bypassed_layers(model: nn.Module, sites: list[Site]) -> dict[str, str]:
    """Return the sites whose weight the parent module reads itself, past the adapted layer.

    WavLM's attention passes `self.q_proj.weight` to a torch function; Mamba multiplies with
    `self.dt_proj.weight`. An adapter on such a layer would be ignored. The source of the parent's
    class tells; a class without source counts as calling its layers.

    Returns:
        "Class.method" that reads the weight, by site name.
    """
    out: dict[str, str] = {}
    reads: dict[type, dict[str, str]] = {}
    for site in sites:
        path, _, attribute = site.module.rpartition(".")
        kind = type(model.get_submodule(path))
        if kind not in reads:
            reads[kind] = _weights_read(kind)
        if attribute in reads[kind] and (kind.__name__, attribute) not in _NEVER_READ:
            out[site.name] = f"{kind.__name__}.{reads[kind][attribute]}"
    return out


def _weights_read(kind: type) -> dict[str, str]:
    """The attributes whose weight a class's methods compute with, and the first such method."""
    module = inspect.getmodule(kind)
    if module is None or kind.__module__.startswith("torch."):
        return {}
    out: dict[str, str] = {}
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if method.__module__ != kind.__module__ or _NOT_FORWARD.search(name):
            continue
        if name.startswith("cuda_kernels") and not _has_kernels():
            continue
        try:
            source = textwrap.dedent(inspect.getsource(method))
            tree = ast.parse(source)
        except (OSError, TypeError, SyntaxError):
            continue
        if ".weight" in source:
            for attribute in _reads(tree, "weight"):
                out.setdefault(attribute, name)
    return out


def _reads(tree: ast.AST, parameter: str) -> set[str]:
    """X of each `self.X.weight` that is a value, not a question about a dtype, shape or type."""
    questions = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in _METADATA:
            questions.add(id(node.value))
        elif isinstance(node, ast.Compare):
            questions.update(map(id, (node.left, *node.comparators)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name = node.func.id
            if name in _QUESTIONS or (name in _FUSED_KERNELS and not _has_kernels()):
                questions.update(map(id, [*node.args, *(word.value for word in node.keywords)]))
    return {
        node.value.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == parameter
        and id(node) not in questions
        and isinstance(node.value, ast.Attribute)
        and isinstance(node.value.value, ast.Name)
        and node.value.value.id == "self"
    }


def _has_kernels() -> bool:
    return any(importlib.util.find_spec(package) for package in _KERNEL_PACKAGES)
