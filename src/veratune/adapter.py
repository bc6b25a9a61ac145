"""Adapter: one adapter apart from any model. Out of a model, into a model.

This is what every file format reads and writes, and all that training and serving have in common.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from veratune.attach import (
    active,
    adapters,
    attach,
    heads_of,
    set_task_metadata,
    task_metadata,
    vectors_of,
)
from veratune.basis.basis import Basis, basis_of
from veratune.config import VeraConfig
from veratune.errors import (
    AdapterFileError,
    AdapterNotFoundError,
    AdapterStateError,
    BaseModelError,
    BasisError,
    TargetError,
    UnsupportedError,
    near,
)
from veratune.layers.quantized import dense_weight
from veratune.targets import Site, base_module, find_heads, find_sites, rank_of

FINGERPRINT_VALUES = 64  # weights of the base model that an adapter remembers


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's vectors and what they mean.

    config: how it was made. shapes: (m, n) of each adapted layer. d, b: the vectors by layer name; empty
    where the config does not train them. head: tensors of modules trained in full, by full name.
    base_id: the base model's hub id or its folder's name. weight_fingerprint: 64 of the base model's weights, spread
    evenly over the first adapted layer (by name); None where they could not be read. task: what the adapter
    is for, as JSON types (see veratune.tasks); empty if it was not trained by veratune. kernels: of the layers that
    are convolutions. lora_fingerprint: of the LoRA that an adapter with basis="lora" was trained over; "" for others.
    layer_ranks: the rank of each layer, where it is known without the config's patterns.
    """

    config: VeraConfig
    shapes: Mapping[str, tuple[int, int]]
    d: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    head: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    base_id: str = ""
    weight_fingerprint: Tensor | None = None
    task: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kernels: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    lora_fingerprint: str = ""
    layer_ranks: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        config = self.config
        if not self.shapes:
            raise AdapterFileError("the adapter has no layers")
        for kind, vectors, absent in (("d", self.d, "b"), ("b", self.b, "d")):
            wanted = set() if config.vectors == absent else set(self.shapes)
            for layer in sorted(set(vectors) ^ wanted):
                state = "is missing" if layer in wanted else "is not expected"
                raise AdapterFileError(
                    f"{kind} of layer '{layer}' {state}; the config trains vectors={config.vectors!r}"
                )
            for layer, vector in vectors.items():
                size = self.ranks[layer] if kind == "d" else self.shapes[layer][0]
                if vector.shape != (size,):
                    m, n = self.shapes[layer]
                    meaning = f"rank {size}" if kind == "d" else f"{size} outputs"
                    raise AdapterFileError(
                        f"layer '{layer}' ({n} -> {m}): the file has {kind} of shape {tuple(vector.shape)}, the config says {meaning}"
                    )
            # All at once, there may be hundreds; and by numpy, which computes in this thread alone (see veratune.serving.engine.loop.run_in_temporary_thread).
            if (
                vectors
                and not np.isfinite(
                    torch.cat(list(vectors.values())).float().numpy(force=True)
                ).all()
            ):
                layer = next(
                    layer for layer, vector in vectors.items() if not torch.isfinite(vector).all()
                )
                raise AdapterFileError(
                    f"layer '{layer}': {kind} holds NaN or infinity; the training run diverged"
                )
        for name, tensor in self.head.items():
            if not any(f".{name}".find(f".{head}.") >= 0 for head in config.head):
                raise AdapterFileError(
                    f"head tensor '{name}' belongs to none of the config's heads {list(config.head)}"
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise AdapterFileError(
                    f"head tensor '{name}' holds NaN or infinity; the training run diverged"
                )

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """The rows of A at each layer, in the order of `shapes`."""
        if self.layer_ranks is not None:
            return {layer: self.layer_ranks[layer] for layer in self.shapes}
        return {
            layer: rank_of(self.config, layer, self.kernels.get(layer, ())) for layer in self.shapes
        }

    @property
    def basis(self) -> Basis:
        """The frozen matrices. Raises UnsupportedError for those of a LoRA, which the adapter does not hold."""
        if self.config.basis == "lora":
            raise UnsupportedError(
                "an adapter over a LoRA does not hold the LoRA's matrices; merge it into the model instead"
            )
        return basis_of(self.config, dict(self.shapes))

    @property
    def fingerprint(self) -> str:
        """A hash of the frozen matrices."""
        return self.lora_fingerprint or self.basis.fingerprint()

    @property
    def trained_values(self) -> int:
        """How many values d and b hold, the head apart."""
        return sum(v.numel() for vectors in (self.d, self.b) for v in vectors.values())

    def to(self, dtype: torch.dtype) -> "Adapter":
        """The adapter with its vectors rounded to another dtype."""
        config = dataclasses.replace(self.config, dtype=str(dtype).removeprefix("torch."))  # type: ignore[arg-type]
        d, b = ({k: v.to(dtype) for k, v in vectors.items()} for vectors in (self.d, self.b))
        return dataclasses.replace(self, config=config, d=d, b=b)


def extract(model: nn.Module, name: str | None = None) -> Adapter:
    """An adapter out of a model; the tensors are copies on the CPU.

    name: default the active adapter, or the only one. A merged adapter is extracted as it is: its vectors,
    never W + ΔW. Raises AdapterNotFoundError for an unknown name.
    """
    configs = adapters(model)
    if name is None:
        name = active(model) or (next(iter(configs)) if len(configs) == 1 else None)
    if name is None:
        raise AdapterNotFoundError(
            f"say which adapter: the model has {', '.join(map(repr, configs)) or 'none'}"
        )
    sites = {v.layer: v for v in vectors_of(model, name)}

    def copied(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # sharded by FSDP
        return full.to("cpu", copy=True).contiguous()

    return Adapter(
        config=configs[name],
        shapes={layer: (v.part.out_features, v.part.in_features) for layer, v in sites.items()},
        d={layer: copied(v.d) for layer, v in sites.items() if v.d is not None},
        b={layer: copied(v.b) for layer, v in sites.items() if v.b is not None},
        head={
            f"{path}.{key}": copied(value)
            for path, module in heads_of(model, name).items()
            for key, value in module.state_dict().items()
        },
        base_id=base_id(model),
        weight_fingerprint=weight_fingerprint(model, find_sites(model, configs[name])),
        task=task_metadata(model, name),
        kernels={layer: v.part.kernel for layer, v in sites.items() if v.part.kernel},
        lora_fingerprint=next(iter(sites.values())).basis.fingerprint()
        if configs[name].basis == "lora"
        else "",
    )


def install(
    model: nn.Module,
    adapter: Adapter,
    name: str,
    *,
    trainable: bool = False,
    check_base: bool = True,
    basis: Basis | None = None,
) -> None:
    """Put an adapter into a model and make it the active one; the layers must be those it was trained on.

    basis: the LoRA that it was trained over, for an adapter with basis="lora".
    check_base: compare the remembered weights of the base model too; False takes a deliberate mismatch,
    such as a base that was fine-tuned further.
    Raises BaseModelError naming the first layer that differs, or AdapterError; then nothing has changed.
    """
    check_fits(model, adapter, check_base=check_base)
    if adapter.config.basis == "lora":
        if basis is None:
            raise BasisError(
                "the adapter was trained over a LoRA, which it does not hold: give it too, as basis=veratune.read_lora(file, model)"
            )
        if basis.fingerprint() != adapter.lora_fingerprint:
            raise BasisError(
                "the adapter was trained over another LoRA than the one that was given: their fingerprints differ"
            )
    attach(model, adapter.config, name, trainable=trainable, basis=basis)
    set_task_metadata(model, name, adapter.task)
    update(model, adapter, name)


def update(model: nn.Module, adapter: Adapter, name: str) -> None:
    """Replace the vectors and head of an attached adapter by those of `adapter`, in place (as a resumed run does)."""
    with torch.no_grad():
        for vectors in vectors_of(model, name):
            for own, stored in ((vectors.d, adapter.d), (vectors.b, adapter.b)):
                if own is not None:
                    if stored[vectors.layer].shape != own.shape:
                        raise AdapterStateError(
                            f"layer '{vectors.layer}': the stored adapter has another rank or size"
                        )
                    own.copy_(stored[vectors.layer])
        for path, module in heads_of(model, name).items():
            module.load_state_dict(_of_head(adapter, path))


def check_fits(
    model: nn.Module, adapter: Adapter, *, check_base: bool = True, head_shapes: bool = True
) -> list[Site]:
    """The model's sites for an adapter that was trained on this base model.

    check_base: compare the weights' probe too; head_shapes: whether a head may have no other classes than the model's. Raises BaseModelError naming the first layer that differs.
    """
    sites = {site.name: site for site in _sites_or_mismatch(model, adapter)}
    for layer, (m, n) in adapter.shapes.items():
        if layer not in sites:
            raise BaseModelError(
                f"the adapter was trained on another base model{_was(adapter)}: it has layer '{layer}', "
                f"{type(model).__name__} has not{near(layer, sites)}"
            )
        kernel, own = adapter.kernels.get(layer, ()), sites[layer].part.kernel
        if kernel != own:
            raise BaseModelError(
                f"the adapter was trained on another base model{_was(adapter)}: layer '{layer}' is {_what(kernel)} in the file and "
                f"{_what(own)} in {type(model).__name__}"
            )
        if sites[layer].shape != (m, n):
            found = sites[layer].shape
            raise BaseModelError(
                f"the adapter was trained on another base model{_was(adapter)}: layer '{layer}' is {n} -> {m} in the "
                f"file and {found[1]} -> {found[0]} in {type(model).__name__}"
            )
    for layer in sites:
        if layer not in adapter.shapes:
            raise BaseModelError(
                f"the adapter was trained on another base model{_was(adapter)}: it lacks layer '{layer}'"
            )
    if check_base and adapter.weight_fingerprint is not None:
        _check_weight_fingerprint(model, adapter, list(sites.values()))
    _check_head(model, adapter, head_shapes)
    return list(sites.values())


def base_id(model: nn.Module) -> str:
    """The base model's hub id, or its folder's name without the way there; the class name for other models."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return (Path(name).name if name and Path(name).exists() else name) or type(model).__name__


def weight_fingerprint(model: nn.Module, sites: list[Site]) -> Tensor | None:
    """Weights of the first adapted layer (by name) as a sample of the base model, in bfloat16."""
    site = min(sites, key=lambda s: s.name)
    module = model.get_submodule(site.module)
    base = base_module(model, site.module)
    kept = getattr(module, "weights_before_merge", {}).get(
        site.part.parameter
    )  # the weight before a merge
    weight = kept if kept is not None else dense_weight(base, site.part.parameter)
    if weight is None or weight.device.type == "meta":
        return None
    flat = (weight if not hasattr(base, "nf") else weight.T).reshape(-1)
    return flat[
        torch.linspace(0, flat.numel() - 1, FINGERPRINT_VALUES, dtype=torch.float64).long()
    ].to("cpu", torch.bfloat16)


def _check_weight_fingerprint(model: nn.Module, adapter: Adapter, sites: list[Site]) -> None:
    check_weight_fingerprint(weight_fingerprint(model, sites), adapter, base_id(model))


def check_weight_fingerprint(found: Tensor | None, adapter: Adapter, model: str) -> None:
    """Compare weights of a base model (see `probe`) with those that an adapter remembers. Raises BaseModelError."""
    if (
        found is None
        or adapter.weight_fingerprint is None
        or torch.equal(found, adapter.weight_fingerprint)
    ):
        return
    # Quantization moves weights by a tenth; another model's weights have nothing in common with these.
    alike = torch.cosine_similarity(
        found.double(), adapter.weight_fingerprint.double(), dim=0
    ).item()
    if alike < 0.9:
        raise BaseModelError(
            f"the adapter was trained on another base model{_was(adapter)}: the layers fit, but the weights of "
            f"'{model}' agree only to {alike:.2f}; load the right base, or pass check_base=False to insist"
        )


def _check_head(model: nn.Module, adapter: Adapter, shapes: bool) -> None:
    wanted = {
        f"{path}.{key}": value.shape
        for path, module in find_heads(model, adapter.config.head)
        for key, value in module.state_dict().items()
    }
    for name in sorted(set(wanted) | set(adapter.head)):
        file = tuple(adapter.head[name].shape) if name in adapter.head else "nothing"
        own = tuple(wanted[name]) if name in wanted else "nothing"
        if file != own and (shapes or "nothing" in (file, own) or file[1:] != own[1:]):
            raise BaseModelError(
                f"head tensor '{name}': the file has {file}, the model has {own}; build the model with that head"
            )


def _sites_or_mismatch(model: nn.Module, adapter: Adapter) -> list[Site]:
    try:
        return find_sites(model, adapter.config)
    except TargetError as error:
        raise BaseModelError(
            f"the adapter was trained on another base model{_was(adapter)}: {error}"
        ) from None


def _of_head(adapter: Adapter, path: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{path}."): value
        for key, value in adapter.head.items()
        if key.startswith(f"{path}.")
    }


def _was(adapter: Adapter) -> str:
    return f" ('{adapter.base_id}')" if adapter.base_id else ""


def _what(kernel: tuple[int, ...]) -> str:
    return (
        f"a convolution with a kernel of {' x '.join(map(str, kernel))}"
        if kernel
        else "no convolution"
    )
