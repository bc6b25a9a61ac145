"""Adapter: one adapter as data, out of a model (`extract`) and into a model (`install`).

This is what every file format reads and writes, and what training and serving have in common.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from veratune.attach import attach_sites
from veratune.base_weights import principal_basis
from veratune.basis.basis import Basis, basis_of
from veratune.basis.principal import PrincipalBasis
from veratune.config import VeraConfig
from veratune.errors import (
    AdapterFileError,
    AdapterNotFoundError,
    AdapterStateError,
    BaseModelError,
    BasisError,
    UnsupportedError,
    near,
)
from veratune.fingerprint import (
    base_fingerprint,
    differing_weights,
    full_tensor,
    weight_fingerprint,
)
from veratune.model_state import (
    active,
    adapted,
    adapters,
    heads_of,
    set_task_metadata,
    state_of,
    task_metadata,
    vectors_of,
)
from veratune.patterns import is_regex
from veratune.targets import Site, find_heads, named_sites, rank_of


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's vectors and what they mean.

    Attributes:
        config: The settings it was made with. Its patterns are a record: never evaluated.
        shapes: (m, n) of each adapted layer.
        d: The vector d (r,) of each layer; empty where the config does not train d.
        b: The vector b (m,) of each layer; empty where the config does not train b.
        head: The tensors of modules trained in full, by full name.
        base_id: The base model's hub id, or its folder's name.
        weight_fingerprint: 64 weights of the first adapted layer (by name), in bfloat16; None where
            they could not be read.
        task: The task metadata, as JSON types; empty if it was not trained by veratune.
        kernels: The kernel of each layer that is a convolution.
        lora_fingerprint: Of the LoRA that an adapter with basis="lora" was trained over, or of the
            principal directions of the base model for basis="principal"; else "".
        layer_ranks: The rank of each layer; None: read from d, or from the config.
        base_fingerprint: A sample of all the base model's weights, (matrices, k) in int8; None
            where it is not known.
        bound: A and B as a base model gives them, for basis="principal"; see `bind`.

    Raises:
        AdapterFileError: The vectors contradict the config or the shapes, or are not finite.
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
    base_fingerprint: Tensor | None = None
    bound: Basis | None = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.shapes:
            raise AdapterFileError("the adapter has no layers")
        for kind, vectors, absent in (("d", self.d, "b"), ("b", self.b, "d")):
            self._check_layers(
                kind, vectors, set() if self.config.vectors == absent else set(self.shapes)
            )
            self._check_sizes(kind, vectors)
            _check_finite(kind, vectors)
        for name, tensor in self.head.items():
            if not any(f".{head}." in f".{name}" for head in self.config.head):
                raise AdapterFileError(
                    f"head tensor '{name}' belongs to none of the config's heads "
                    f"{list(self.config.head)}"
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise AdapterFileError(
                    f"head tensor '{name}' holds NaN or infinity; the training run diverged"
                )

    def _check_layers(self, kind: str, vectors: Mapping[str, Tensor], wanted: set[str]) -> None:
        for layer in sorted(set(vectors) ^ wanted):
            fault = "is missing" if layer in wanted else "is not expected"
            raise AdapterFileError(
                f"{kind} of layer '{layer}' {fault}; the config trains "
                f"vectors={self.config.vectors!r}"
            )

    def _check_sizes(self, kind: str, vectors: Mapping[str, Tensor]) -> None:
        for layer, vector in vectors.items():
            m, n = self.shapes[layer]
            size = self.ranks[layer] if kind == "d" else m
            if vector.shape != (size,):
                meaning = f"rank {size}" if kind == "d" else f"{size} outputs"
                raise AdapterFileError(
                    f"layer '{layer}' ({n} -> {m}): the file has {kind} of shape "
                    f"{tuple(vector.shape)}, the config says {meaning}"
                )

    @functools.cached_property
    def ranks(self) -> dict[str, int]:
        """The rows of A at each layer, in the order of `shapes`; no pattern language but words."""
        if self.layer_ranks is not None:
            return {layer: self.layer_ranks[layer] for layer in self.shapes}
        if any(map(is_regex, self.config.rank_pattern)):  # a file's expressions are not evaluated
            if self.config.vectors == "b":
                raise AdapterFileError(
                    "the adapter does not list its ranks: they follow from a regular expression in "
                    "rank_pattern, which is not evaluated from a file; save it again as version 2"
                )
            return {layer: self.d[layer].numel() for layer in self.shapes}
        return {
            layer: rank_of(self.config, layer, self.kernels.get(layer, ())) for layer in self.shapes
        }

    @property
    def basis(self) -> Basis:
        """The frozen matrices A and B.

        Raises:
            UnsupportedError: basis="lora": the adapter does not hold the LoRA's matrices; or
                basis="principal" without a base model.
        """
        if self.bound is not None:
            return self.bound
        if self.config.basis == "principal":
            raise UnsupportedError(
                "an adapter with basis='principal' needs its base model's weights: load it into "
                "the "
                "model, and take it from there"
            )
        if self.config.basis == "lora":
            raise UnsupportedError(
                "an adapter over a LoRA does not hold the LoRA's matrices; merge it into the model "
                "instead"
            )
        return basis_of(self.config, dict(self.shapes))

    @property
    def fingerprint(self) -> str:
        """A hash of the frozen matrices."""
        if self.bound is not None:
            return self.bound.fingerprint()
        return self.lora_fingerprint or self.basis.fingerprint()

    @property
    def trained_values(self) -> int:
        """How many values d and b hold; heads are not counted."""
        return sum(v.numel() for vectors in (self.d, self.b) for v in vectors.values())

    def to(self, dtype: torch.dtype) -> "Adapter":
        """Return the adapter with its vectors rounded to another dtype."""
        config = dataclasses.replace(self.config, dtype=str(dtype).removeprefix("torch."))  # type: ignore[arg-type]
        d, b = ({k: v.to(dtype) for k, v in vectors.items()} for vectors in (self.d, self.b))
        return dataclasses.replace(self, config=config, d=d, b=b)


def _check_finite(kind: str, vectors: Mapping[str, Tensor]) -> None:
    # One look at all of them, there may be hundreds. numpy computes in this thread alone, where
    # torch would start a pool of threads.
    if not vectors or np.isfinite(_values(vectors)).all():
        return
    layer = next(layer for layer, vector in vectors.items() if not torch.isfinite(vector).all())
    raise AdapterFileError(
        f"layer '{layer}': {kind} holds NaN or infinity; the training run diverged"
    )


def _values(vectors: Mapping[str, Tensor]) -> np.ndarray:
    return torch.cat(list(vectors.values())).float().numpy(force=True)  # type: ignore[no-any-return]


def extract(model: nn.Module, name: str | None = None) -> Adapter:
    """Return an adapter of a model as data; the tensors are copies on the CPU.

    Args:
        model: A model with adapters, or a wrapper of one. Under FSDP2 or ZeRO-3 every
            rank must call.
        name: The adapter; default: the active one, or the only one. A merged adapter is extracted
            as its vectors, never as W + ΔW.

    Raises:
        AdapterNotFoundError: There is no such adapter, or the default is ambiguous.
    """
    configs = adapters(model)
    if name is None:
        name = active(model) or (next(iter(configs)) if len(configs) == 1 else None)
    if name is None:
        names = ", ".join(map(repr, configs)) or "none"
        raise AdapterNotFoundError(f"say which adapter: the model has {names}")
    root = adapted(model)
    config = state_of(root).configs.get(name)
    vectors = {v.layer: v for v in vectors_of(root, name)}
    heads = heads_of(root, name)
    assert config is not None  # vectors_of has checked the name
    return Adapter(
        config=config,
        shapes={layer: (v.part.out_features, v.part.in_features) for layer, v in vectors.items()},
        d={layer: _copied(v.d) for layer, v in vectors.items() if v.d is not None},
        b={layer: _copied(v.b) for layer, v in vectors.items() if v.b is not None},
        head={
            f"{path}.{key}": _copied(value)
            for path, module in heads.items()
            for key, value in module.state_dict().items()
        },
        base_id=base_id(root),
        weight_fingerprint=weight_fingerprint(
            root, named_sites(root, config, {layer: v.rank for layer, v in vectors.items()})
        ),
        task=task_metadata(root, name),
        kernels={layer: v.part.kernel for layer, v in vectors.items() if v.part.kernel},
        lora_fingerprint=next(iter(vectors.values())).basis.fingerprint()
        if config.basis in ("lora", "principal")
        else "",
        layer_ranks={layer: v.rank for layer, v in vectors.items()},
        base_fingerprint=base_fingerprint(root, list(heads)),
        bound=next(iter(vectors.values())).basis if config.basis == "principal" else None,
    )


def bind(model: nn.Module, adapter: Adapter) -> Adapter:
    """Return an adapter with the A and B that this base model gives it, for basis="principal".

    Adapters with another basis come back as they are.

    Raises:
        BaseModelError: The adapter was trained on another base model.
        BasisError: The principal directions here are not those that it was trained with.
    """
    if adapter.config.basis != "principal" or adapter.bound is not None:
        return adapter
    sites = check_fits(model, adapter, head_shapes=False)
    return dataclasses.replace(adapter, bound=_principal(model, adapter, sites))


def _principal(model: nn.Module, adapter: Adapter, sites: list[Site]) -> PrincipalBasis:
    basis = principal_basis(model, adapter.config, sites)
    if not basis.matches(adapter.fingerprint):
        raise BasisError(
            "the principal directions of this base model are not those that the adapter was "
            "trained with: their fingerprints differ. Load the base that it was trained on, in the "
            "same quantization"
        )
    return basis


def install(
    model: nn.Module,
    adapter: Adapter,
    name: str,
    *,
    trainable: bool = False,
    check_base: bool = True,
    basis: Basis | None = None,
) -> None:
    """Put an adapter into a model and make it the active one.

    Args:
        model: A model with the layers that the adapter was trained on.
        adapter: From `extract` or a file.
        name: The adapter's name in this model.
        trainable: Whether its vectors and heads require gradients.
        check_base: Compare the base model's weights too. False accepts another base on purpose,
            such as one that was fine-tuned further.
        basis: The LoRA that an adapter with basis="lora" was trained over.

    Raises:
        BaseModelError: A layer or weight of the base model differs; the first one is named.
        BasisError: The LoRA is missing or another one.
        AdapterStateError: The name is taken, or an adapter is merged. The model is unchanged.
    """
    sites = check_fits(model, adapter, check_base=check_base)
    if adapter.config.basis == "lora":
        if basis is None:
            raise BasisError(
                "the adapter was trained over a LoRA, which it does not hold: give it too, as "
                "basis=veratune.read_lora(file, model)"
            )
        if basis.fingerprint() != adapter.lora_fingerprint:
            raise BasisError(
                "the adapter was trained over another LoRA than the one that was given: their "
                "fingerprints differ"
            )
    if adapter.config.basis == "principal":
        basis = _principal(model, adapter, sites)
    attach_sites(model, adapter.config, name, sites, trainable=trainable, basis=basis)
    set_task_metadata(model, name, adapter.task)
    update(model, adapter, name)


def update(model: nn.Module, adapter: Adapter, name: str) -> None:
    """Replace an attached adapter's vectors and heads by those of `adapter`, in place.

    Raises:
        AdapterStateError: A vector has another rank or size.
    """
    with torch.no_grad():
        for vectors in vectors_of(model, name):
            for current, stored in ((vectors.d, adapter.d), (vectors.b, adapter.b)):
                if current is None:
                    continue
                if stored[vectors.layer].shape != current.shape:
                    raise AdapterStateError(
                        f"layer '{vectors.layer}': the stored adapter has another rank or size"
                    )
                current.copy_(stored[vectors.layer])
        for path, module in heads_of(model, name).items():
            module.load_state_dict(_head_state(adapter, path))


def check_fits(
    model: nn.Module, adapter: Adapter, *, check_base: bool = True, head_shapes: bool = True
) -> list[Site]:
    """Return the model's sites for an adapter that was trained on this base model.

    Args:
        model: The model, with or without other adapters.
        adapter: Its listed layers are looked up by name.
        check_base: Compare the base model's weights too.
        head_shapes: Whether a head must have the model's number of classes.

    Raises:
        BaseModelError: names the first layer that differs.
    """
    sites = {site.name: site for site in named_sites(model, adapter.config, adapter.ranks)}
    for layer, (m, n) in adapter.shapes.items():
        if layer not in sites:
            names = {site.name for site in named_sites(model, adapter.config, _AnyRank())}
            raise _other_base(
                adapter,
                f"it has layer '{layer}', {type(model).__name__} has not{near(layer, names)}",
            )
        kernel, here = adapter.kernels.get(layer, ()), sites[layer].part.kernel
        if kernel != here:
            raise _other_base(
                adapter,
                f"layer '{layer}' is {_kind(kernel)} in the file and {_kind(here)} in "
                f"{type(model).__name__}",
            )
        if sites[layer].shape != (m, n):
            out_features, in_features = sites[layer].shape
            raise _other_base(
                adapter,
                f"layer '{layer}' is {n} -> {m} in the file and {in_features} -> {out_features} in "
                f"{type(model).__name__}",
            )
    if check_base:
        _check_weights(model, adapter, list(sites.values()))
    _check_head(model, adapter, head_shapes)
    return list(sites.values())


class _AnyRank(dict[str, int]):
    """Ranks that name every site: for the names in an error message."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 1


def base_id(model: nn.Module) -> str:
    """Return the base model's hub id, its folder's name without the way there, or its class."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return (Path(name).name if name and Path(name).exists() else name) or type(model).__name__


def check_weight_fingerprint(found: Tensor | None, adapter: Adapter, model: str) -> None:
    """Compare a model's `weight_fingerprint` with the adapter's. Raises BaseModelError.

    Args:
        found: The fingerprint of the model at hand; None is not compared.
        adapter: The adapter.
        model: The model's name, for the message.
    """
    wanted = adapter.weight_fingerprint
    if found is None or wanted is None or torch.equal(found, wanted):
        return
    # Quantization moves weights by a tenth; another model's weights have nothing in common.
    similarity = torch.cosine_similarity(found.double(), wanted.double(), dim=0).item()
    if similarity < 0.9:
        raise _other_base(
            adapter,
            f"the layers fit, but the weights of '{model}' agree only to {similarity:.2f}; load "
            "the right base, or pass check_base=False to insist",
        )


def _check_weights(model: nn.Module, adapter: Adapter, sites: list[Site]) -> None:
    if adapter.weight_fingerprint is not None:
        check_weight_fingerprint(weight_fingerprint(model, sites), adapter, base_id(model))
    if adapter.base_fingerprint is not None:
        heads = [path for path, _ in find_heads(model, adapter.config.head)]
        share = differing_weights(base_fingerprint(model, heads), adapter.base_fingerprint)
        if share > 0:
            raise _other_base(
                adapter,
                f"the adapted layers fit, but {share:.0%} of the weight matrices of "
                f"'{base_id(model)}' differ; load the right base, or pass check_base=False to "
                "insist",
            )


def _check_head(model: nn.Module, adapter: Adapter, shapes: bool) -> None:
    wanted = {
        f"{path}.{key}": value.shape
        for path, module in find_heads(model, adapter.config.head)
        for key, value in module.state_dict().items()
    }
    for name in sorted(set(wanted) | set(adapter.head)):
        file = tuple(adapter.head[name].shape) if name in adapter.head else "nothing"
        here = tuple(wanted[name]) if name in wanted else "nothing"
        if file != here and (shapes or "nothing" in (file, here) or file[1:] != here[1:]):
            raise BaseModelError(
                f"head tensor '{name}': the file has {file}, the model has {here}; build the model "
                "with that head"
            )


def _other_base(adapter: Adapter, reason: str) -> BaseModelError:
    name = f" ('{adapter.base_id}')" if adapter.base_id else ""
    return BaseModelError(f"the adapter was trained on another base model{name}: {reason}")


def _head_state(adapter: Adapter, path: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{path}."): value
        for key, value in adapter.head.items()
        if key.startswith(f"{path}.")
    }


def _copied(tensor: Tensor) -> Tensor:
    return full_tensor(tensor).detach().to("cpu", copy=True).contiguous()


def _kind(kernel: tuple[int, ...]) -> str:
    if not kernel:
        return "no convolution"
    return f"a convolution with a kernel of {' x '.join(map(str, kernel))}"
