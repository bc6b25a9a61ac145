"""The principal basis of a model: the singular directions of its own frozen weights."""

import functools
import weakref
from typing import Any

from torch import Tensor, nn

from veratune.basis.directions import LayerDirections
from veratune.basis.principal import PrincipalBasis
from veratune.config import VeraConfig
from veratune.errors import BasisError
from veratune.layers.kinds import is_conv
from veratune.layers.quantized import dense_weight
from veratune.targets import Site, base_module

_LIVE = "_veratune_principal"


class _LiveBases:
    """The bases and directions in use on one model; a copied or pickled model has none."""

    def __init__(self) -> None:
        self.bases: weakref.WeakValueDictionary[Any, PrincipalBasis] = weakref.WeakValueDictionary()
        self.layers: weakref.WeakValueDictionary[Any, LayerDirections] = (
            weakref.WeakValueDictionary()
        )

    def __reduce__(self) -> tuple[type["_LiveBases"], tuple[()]]:
        return _LiveBases, ()


def principal_basis(model: nn.Module, config: VeraConfig, sites: list[Site]) -> PrincipalBasis:
    """The basis of an adapter with basis="principal" on this model.

    Adapters with equal seed, layers and ranks get the same object. Those that have only some layers
    and their ranks in common share A and B of these. Both hold as long as the weights have not been
    written to in between. Nothing is computed here.

    Args:
        model: The base model, adapted or not.
        config: The adapter's configuration.
        sites: The adapter's layers in this model.
    """
    live: _LiveBases = model.__dict__.setdefault(_LIVE, _LiveBases())
    written = tuple((stored.data_ptr(), stored._version) for stored in map(_stored(model), sites))
    key = (config.seed, tuple((site.name, site.rank) for site in sites), written)
    basis = live.bases.get(key)
    if basis is None:
        layers = {
            site.name: _directions(model, live, config.seed, site, version)
            for site, version in zip(sites, written, strict=True)
        }
        basis = live.bases[key] = PrincipalBasis(config.seed, layers)
    return basis


def _directions(
    model: nn.Module, live: _LiveBases, seed: int, site: Site, version: tuple[int, int]
) -> LayerDirections:
    key = (seed, site.name, site.rank, version)
    found = live.layers.get(key)
    if found is None:
        # An adapter that was taken out of its model must not keep the model in memory.
        weight = functools.partial(_weight_in, weakref.ref(model), site)
        found = live.layers[key] = LayerDirections(site.name, weight, site.rank, seed)
    return found


def site_weight(model: nn.Module, site: Site) -> Tensor:
    """W (m, n) of one site, dequantized, as it is without any adapter merged into it.

    Raises:
        BasisError: The weight cannot be read here: it is sharded, or not loaded.
    """
    base: Any = base_module(model, site.module)
    weight = _before_merge(model, site)
    if weight is None:
        weight = dense_weight(base, site.part.parameter)
    if weight is None or weight.device.type == "meta":
        kind = type(base.get_parameter(site.part.parameter)).__name__
        raise BasisError(
            f"layer '{site.name}': basis='principal' reads the weight, and a {kind} of "
            f"{type(base).__name__} cannot be read here (sharded, not loaded, or of an unknown "
            "quantization); use basis='random' or exclude the layer"
        )
    if hasattr(base, "nf"):  # transformers' Conv1D
        weight = weight.T
    elif is_conv(base):
        if base.transposed:
            groups = base.groups
            weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        weight = weight.flatten(1)
    return weight[site.part.start : site.part.stop]


def _weight_in(model: "weakref.ref[nn.Module]", site: Site) -> Tensor:
    alive = model()
    if alive is None:
        raise BasisError(
            f"layer '{site.name}': basis='principal' reads the base model's weight, and the model "
            "is gone"
        )
    return site_weight(alive, site)


def _before_merge(model: nn.Module, site: Site) -> Tensor | None:
    module: Any = model.get_submodule(site.module)
    return getattr(module, "weights_before_merge", {}).get(site.part.parameter)


def _stored(model: nn.Module) -> Any:
    """Return a function that reads a site's stored weight."""

    def stored(site: Site) -> Tensor:
        weight = _before_merge(model, site)
        if weight is not None:
            return weight
        return base_module(model, site.module).get_parameter(site.part.parameter)

    return stored
