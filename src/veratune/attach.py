"""Put adapters into a model, choose who computes, and take them out again.

The model is changed in place and stays of its own class: layers are replaced by VeraLayers, everything
else is left alone, and a note of what was changed hangs on the model. Each function checks everything
before it touches anything.
"""

import collections
import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from veratune.basis.basis import Basis, basis_of
from veratune.basis.lora import LoraBasis
from veratune.config import VeraConfig
from veratune.errors import (
    AdapterNotFoundError,
    AdapterStateError,
    BaseModelError,
    ConfigError,
    InvalidNameError,
    UnsupportedError,
    near,
)
from veratune.layers.attention import VeraMultiheadAttention
from veratune.layers.base import (
    MergeReport,
    Rows,
    VeraHead,
    VeraLayer,
    VeraVectors,
    VeraWeightLayer,
    replace_modules,
    total_rounding_error,
)
from veratune.layers.conv import VeraConv, is_conv
from veratune.layers.linear import VeraLinear
from veratune.layers.quantized import is_dense
from veratune.targets import (
    Site,
    base_module,
    config_for_lora,
    find_heads,
    find_sites,
    is_attention,
)

M = TypeVar("M", bound=nn.Module)
_NOTE = "_veratune"


@dataclasses.dataclass
class AdapterState:
    """What hangs on an adapted model: the adapters' configs and tasks, who is active, and how it was before."""

    configs: dict[str, VeraConfig] = dataclasses.field(default_factory=dict)
    tasks: dict[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    active: str | None = None
    trained: list[nn.Parameter] = dataclasses.field(default_factory=list)
    slowed: list[nn.Module] = dataclasses.field(default_factory=list)


def attach(
    model: M,
    config: VeraConfig | None = None,
    name: str = "default",
    *,
    trainable: bool = True,
    basis: Basis | None = None,
) -> M:
    """Add an adapter to a model, in place, and make it the active one.

    All parameters but the adapter's own are frozen; ΔW = 0 until it is trained. Further adapters may have
    other targets, ranks and seeds: each computes as if alone.

    name: any text without a dot. trainable: whether its vectors (and head) ask for gradients. basis: the matrices of a LoRA
    (`veratune.read_lora`), for basis="lora", where ΔW starts at that LoRA.
    Returns the model. Raises TargetError, AdapterError or ConfigError, and then nothing has changed.

    >>> from veratune import VeraConfig, attach
    >>> model = attach(torch.nn.Sequential(torch.nn.Linear(8, 6)), VeraConfig(rank=4, targets=["0"]), name="alice")
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    10
    """
    config = VeraConfig() if config is None else config
    note = _note(model) or AdapterState()
    _check_new(model, note, name)
    if (config.basis == "lora") != isinstance(basis, LoraBasis):
        raise ConfigError(
            f"config.basis is {config.basis!r} and attach was given {'no LoRA' if basis is None else 'a LoRA'}; an adapter over a LoRA "
            "wants VeraConfig(basis='lora') and attach(..., basis=veratune.read_lora(file, model))"
        )
    if isinstance(basis, LoraBasis):
        config = config_for_lora(model, config, basis.ranks())
    sites = find_sites(model, config)
    if isinstance(basis, LoraBasis):
        _check_lora(model, sites, basis)
    heads = find_heads(model, config.head)
    _check_apart(model, sites, [path for path, _ in heads])
    bases = {site.module: base_module(model, site.module) for site in sites}
    if config.dropout and any(is_attention(base) for base in bases.values()):
        raise ConfigError(
            f"dropout is {config.dropout}, but {type(model).__name__} is adapted inside nn.MultiheadAttention, where the "
            "adapter has no input of its own to drop; set dropout to 0 or exclude those layers"
        )
    if config.plan not in ("auto", "merged") and any(is_attention(base) for base in bases.values()):
        raise ConfigError(
            f"plan={config.plan!r}, but {type(model).__name__} is adapted inside nn.MultiheadAttention, which takes W + ΔW "
            "only; use plan='auto' or exclude those layers"
        )
    if config.plan == "projected" and any(is_conv(base) for base in bases.values()):
        raise ConfigError(
            "plan='projected' is for linear layers, but convolutions are adapted too; use plan='auto', 'factored', 'merged' or 'dense'"
        )
    basis = basis or basis_of(config, {site.name: site.shape for site in sites})
    made = []
    for site in sites:
        device = bases[site.module].get_parameter(site.part.parameter).device
        vectors = VeraVectors(site.name, site.part, site.rank, basis, config, device)
        made.append((site, vectors.requires_grad_(trainable)))
    copies = [(path, copy.deepcopy(module).requires_grad_(trainable)) for path, module in heads]
    _reserve(basis, sites, bases)

    # Nothing above has touched the model; nothing below can fail.
    if not note.configs:
        note.trained = [p for p in model.parameters() if p.requires_grad]
        setattr(model, _NOTE, note)
    for parameter in note.trained:
        parameter.requires_grad_(False)
    kinds = {path: _kind(base) for path, base in bases.items()}
    layers = _layers_at(model, {**kinds, **{path: VeraHead for path, _ in copies}})
    for site, vectors in made:
        layers[site.module].add(name, vectors)
    for path, module in copies:
        layers[path].add(name, module)
    note.configs[name] = config
    _keep_off_fast_path(model, note)
    use(model, name)
    return model


def use(model: nn.Module, name: str | None) -> None:
    """Let one adapter compute for every row; None: the bare base model, bit for bit.

    Raises AdapterError for an unknown name, or while another adapter is merged.
    """
    note = _adapted(model)
    _check_known(note, name)
    merged = _merged(model)
    if merged is not None and name != merged:
        raise AdapterStateError(
            f"adapter {merged!r} is merged into the weights; unmerge before using {name!r}"
        )
    for layer in _layers(model):
        layer.active = name
    note.active = name


@contextlib.contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within the block, row i of a batch speaks with adapter names[i]; None is the bare base model.

    A batch that is a multiple of the names repeats each of them in place: beams, windows, flattened
    tokens. With gradient checkpointing, call backward inside the block: the forward is computed again there.
    Raises AdapterError for an unknown name or a merged model, UnsupportedError for a sequence-first model,
    and ShapeError (from the forward) for a batch of another size.
    """
    note = _adapted(model)
    if isinstance(names, str) or not names:
        raise InvalidNameError(
            f"rows wants one adapter name (or None) for each row of the batch, not {names!r}"
        )
    for name in names:
        _check_known(note, name)
    merged = _merged(model)
    if merged is not None:
        raise AdapterStateError(
            f"adapter {merged!r} is merged into the weights; unmerge before mixing rows"
        )
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise UnsupportedError(
                f"rows need the batch first, but '{path}' was built with batch_first=False"
            )
    layers = _layers(model)
    before = [layer.rows for layer in layers]
    mixed = Rows(names)
    try:
        for layer in layers:
            layer.rows = mixed
        yield
    finally:
        for layer, held in zip(layers, before, strict=True):
            layer.rows = held


def merge(model: nn.Module, name: str | None = None) -> list[MergeReport]:
    """W <- W + ΔW for one adapter (default: the active one): inference at the base model's own price.

    Summed in fp32 and rounded once to the base's dtype. Returns what rounding lost in each layer, and warns
    when that is over a twentieth of ΔW. The weights before are kept: `unmerge` gives back their bits.
    Raises AdapterError, or UnsupportedError for quantized, sharded or tied weights; then nothing is merged.
    """
    note = _adapted(model)
    name = note.active if name is None else name
    if name is None:
        raise AdapterNotFoundError(f"no adapter is active; say which to merge: {_known(note)}")
    _check_known(note, name)
    merged = _merged(model)
    if merged is not None:
        raise AdapterStateError(f"adapter {merged!r} is merged already; unmerge it first")
    layers = [
        layer
        for layer in _layers(model)
        if isinstance(layer, VeraWeightLayer) and name in layer.vera
    ]
    holders = collections.Counter(
        id(p) for m in model.modules() for p in m._parameters.values() if p is not None
    )
    for layer in layers:
        layer.check_mergeable(name)
        for vectors in layer.vectors(name):
            if holders[id(layer.weight_of(vectors.part.parameter))] > 1:
                raise UnsupportedError(
                    f"layer '{layer.name}' shares its weight with another module (a tied embedding?), which merging "
                    "would change too; untie them or exclude the layer"
                )
    use(model, name)
    report = [entry for layer in layers for entry in layer.merge(name)]
    lost = total_rounding_error(report)
    if lost > 0.05:
        warnings.warn(
            f"merging {name!r} rounded away {lost:.0%} of ΔW: the base model's dtype is too coarse for it. "
            "Load the base in float32 to merge without loss",
            stacklevel=2,
        )
    return report


def unmerge(model: nn.Module) -> None:
    """Give the base weights back bit for bit. Raises AdapterError if nothing is merged."""
    _adapted(model)
    if _merged(model) is None:
        raise AdapterStateError("no adapter is merged; there is nothing to unmerge")
    for layer in _layers(model):
        if isinstance(layer, VeraWeightLayer):
            layer.unmerge()


def remove(model: nn.Module, name: str) -> None:
    """Take one adapter out. If it was active the base model is active afterwards. Raises AdapterError."""
    note = _adapted(model)
    _check_known(note, name)
    if _merged(model) == name:
        unmerge(model)
    if note.active == name and len(note.configs) > 1:
        use(model, None)
    for layer in _layers(model):
        if name in layer.vera:
            del layer.vera[name]
    del note.configs[name]
    note.tasks.pop(name, None)
    _put_back(model, lambda layer: layer.base if not len(layer.vera) else layer)
    if not note.configs:
        _forget(model, note)


def detach(model: M, *, keep_merged: bool = False) -> M:
    """Take all adapters out: the very modules that came in, with their requires_grad as it was.

    keep_merged: leave a merged adapter in the weights (and its head in place): a plain model that has
    learned. Without it a merged adapter is unmerged first. Returns the model.
    Raises AdapterError if the model has no adapters, or keep_merged is asked for and nothing is merged.
    """
    note = _adapted(model)
    merged = _merged(model)
    if keep_merged and merged is None:
        raise AdapterStateError("keep_merged=True, but no adapter is merged; call merge first")
    for layer in _layers(model):
        if isinstance(layer, VeraWeightLayer):
            layer.unmerge(restore=not keep_merged)

    def kept(layer: VeraLayer) -> nn.Module:
        if (
            keep_merged
            and merged is not None
            and isinstance(layer, VeraHead)
            and merged in layer.vera
        ):
            return layer.vera[merged]
        return layer.base

    _put_back(model, kept)
    _forget(model, note)
    return model


def adapters(model: nn.Module) -> dict[str, VeraConfig]:
    """The adapters in a model, by name; empty for a model without any."""
    note = _note(model)
    return dict(note.configs) if note else {}


def active(model: nn.Module) -> str | None:
    """The adapter that computes; None is the bare base model."""
    note = _note(model)
    return note.active if note else None


def set_task_metadata(model: nn.Module, name: str, task: Mapping[str, Any]) -> None:
    """Note what an adapter is for (JSON types: task, columns, label names); it goes into the adapter's file."""
    note = _adapted(model)
    _check_known(note, name)
    note.tasks[name] = dict(task)


def task_metadata(model: nn.Module, name: str) -> Mapping[str, Any]:
    """What `describe` noted; empty if nothing was."""
    note = _adapted(model)
    _check_known(note, name)
    return note.tasks.get(name, {})


def vectors_of(model: nn.Module, name: str) -> list[VeraVectors]:
    """The vectors of one adapter, layer by layer in the model's order."""
    _check_known(_adapted(model), name)
    return [
        v
        for layer in _layers(model)
        if isinstance(layer, VeraWeightLayer)
        for v in layer.vectors(name)
    ]


def heads_of(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules that one adapter trains in full, by their path."""
    _check_known(_adapted(model), name)
    return {
        layer.name: layer.vera[name]
        for layer in _layers(model)
        if isinstance(layer, VeraHead) and name in layer.vera
    }


def count_trained(model: nn.Module, name: str) -> int:
    """How many values an adapter trains in its vectors, its head apart."""
    return sum(p.numel() for vectors in vectors_of(model, name) for p in vectors.parameters())


def _note(model: nn.Module) -> AdapterState | None:
    return getattr(model, _NOTE, None)


def _adapted(model: nn.Module) -> AdapterState:
    note = _note(model)
    if note is None:
        raise AdapterStateError(f"{type(model).__name__} has no adapters; attach or load one first")
    return note


def _layers(model: nn.Module) -> list[VeraLayer]:
    return [module for module in model.modules() if isinstance(module, VeraLayer)]


def _merged(model: nn.Module) -> str | None:
    return next((layer.merged for layer in _layers(model) if layer.merged is not None), None)


def _known(note: AdapterState) -> str:
    return ", ".join(map(repr, note.configs))


def _check_known(note: AdapterState, name: str | None) -> None:
    if name is not None and name not in note.configs:
        raise AdapterNotFoundError(
            f"no adapter {name!r}; the model has {_known(note)}{near(str(name), note.configs)}"
        )


def _check_new(model: nn.Module, note: AdapterState, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise InvalidNameError(
            f"adapter name {name!r} cannot be used: torch wants module names without a dot and not its own words"
        )
    if name in note.configs:
        raise AdapterStateError(
            f"adapter {name!r} is attached already; remove it first or choose another name"
        )
    merged = _merged(model)
    if merged is not None:
        raise AdapterStateError(
            f"adapter {merged!r} is merged into the weights; unmerge before adding {name!r}"
        )


def _check_apart(model: nn.Module, sites: list[Site], heads: list[str]) -> None:
    """A module trained in full and an adapted layer may not lie inside one another, whichever adapter they are of."""
    taken = {layer.name: layer for layer in _layers(model)}
    for path in heads:
        inside = [
            name
            for name, layer in taken.items()
            if isinstance(layer, VeraWeightLayer) and f"{name}.".startswith(f"{path}.")
        ]
        if inside:
            raise UnsupportedError(
                f"head {path!r} holds the adapted layer '{inside[0]}'; a module is either adapted or trained in full"
            )
    for site in sites:
        around = [
            name
            for name, layer in taken.items()
            if isinstance(layer, VeraHead) and f"{site.module}.".startswith(f"{name}.")
        ]
        if around:
            raise UnsupportedError(
                f"layer '{site.name}' is inside the head '{around[0]}' of another adapter; exclude it"
            )


def _check_lora(model: nn.Module, sites: list[Site], basis: LoraBasis) -> None:
    for site in sites:
        A, B = basis.pairs[site.name]
        if (B.shape[0], A.shape[1]) != site.shape:
            raise BaseModelError(
                f"the LoRA is of another model: layer '{site.name}' is {A.shape[1]} -> {B.shape[0]} in it and "
                f"{site.shape[1]} -> {site.shape[0]} in {type(model).__name__}"
            )


def _kind(base: nn.Module) -> type[VeraWeightLayer]:
    if is_attention(base):
        return VeraMultiheadAttention
    return VeraConv if is_conv(base) else VeraLinear


def _reserve(basis: Basis, sites: list[Site], bases: dict[str, nn.Module]) -> None:
    """Make the shared matrices at once, at their full size, where the dtype of the products is known beforehand."""
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[str, int, int, int]]] = {}
    for site in sites:
        weight = bases[site.module].get_parameter(site.part.parameter)
        if is_dense(weight) and weight.device.type != "meta":
            kinds.setdefault((weight.device, weight.dtype), []).append(
                (site.name, *site.shape, site.rank)
            )
    for (device, dtype), layers in kinds.items():
        basis.reserve(layers, device, dtype)


def _layers_at(model: nn.Module, kinds: Mapping[str, type[VeraLayer]]) -> dict[str, Any]:
    """The VeraLayers at these paths; one that is new stands in every place where its module stood."""
    found = {path: model.get_submodule(path) for path in kinds}
    made = {
        module: kinds[path](module, path)
        for path, module in found.items()
        if not isinstance(module, VeraLayer)
    }
    replace_modules(model, lambda module: made.get(module, module))
    return {
        path: module if isinstance(module, VeraLayer) else made[module]
        for path, module in found.items()
    }


def _put_back(model: nn.Module, choose: Callable[[VeraLayer], nn.Module]) -> None:
    """Replace each VeraLayer, wherever it stands, by what `choose` says."""
    replace_modules(
        model, lambda module: choose(module) if isinstance(module, VeraLayer) else module
    )


def _forget(model: nn.Module, note: AdapterState) -> None:
    for parameter in note.trained:
        parameter.requires_grad_(True)
    for module in note.slowed:
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = True
        else:
            for key in [
                k for k, hook in module._forward_pre_hooks.items() if hook is _off_fast_path
            ]:
                del module._forward_pre_hooks[key]
    delattr(model, _NOTE)


def _keep_off_fast_path(model: nn.Module, note: AdapterState) -> None:
    """In evaluation, torch's encoder layers pass their weights to one fused kernel, past every adapter.

    A layer with a hook does not take that path; an encoder that would hand out nested tensors for it must not.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        adapted = any(isinstance(inner, VeraLayer) for inner in module.modules())
        if not adapted or any(module is known for known in note.slowed):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.register_forward_pre_hook(_off_fast_path)
            note.slowed.append(module)
        elif getattr(module, "use_nested_tensor", False):
            module.use_nested_tensor = False
            note.slowed.append(module)


def _off_fast_path(module: nn.Module, args: Any) -> None:
    return None
