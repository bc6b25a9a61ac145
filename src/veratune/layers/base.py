"""VeraLayer: the module that stands where an adapted layer stood, and what it holds for each adapter.

    VeraLayer (abstract)
    ├── VeraLinear                a linear layer, dense, transposed, fused or quantized
    ├── VeraConv                  a convolution, transposed or not
    ├── VeraMultiheadAttention    torch's attention block, which reads its weights without calling them
    └── VeraHead                  a module trained in full, one copy for each adapter

The layer that came in stays whole under `base`: taking VeraLayer away again gives the very same module
back. Its tensors keep their names in `state_dict`, so that checkpoints of the base model still load and
`save_pretrained` still writes them.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veratune.basis.basis import Basis
from veratune.config import VeraConfig
from veratune.errors import AdapterStateError, ShapeError, UnsupportedError
from veratune.layers.quantized import is_dense
from veratune.layers.weight_cache import WEIGHTS
from veratune.ops.functional import delta_weight, is_full_precision, vera_linear
from veratune.ops.matrix import Matrix

_BASE = "base."
_OWN = ("base.", "vera.")


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows start..stop of one weight matrix of a layer, which have a d and a b of their own.

    name: "" for a whole layer, or the part's name in a fused one ("q"); parameter: the weight's name in
    the base layer; in_features: n; kernel: of a convolution.
    """

    name: str
    parameter: str
    start: int
    stop: int
    in_features: int
    kernel: tuple[int, ...] = ()

    @property
    def out_features(self) -> int:
        return self.stop - self.start

    @property
    def key(self) -> str:
        """The part's name as a module's name, which may not be empty."""
        return self.name or "whole"


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What merging a layer in its own precision lost.

    layer: its name; delta_norm: the Frobenius norm of ΔW; lost: the norm of what rounding changed in
    it, as a fraction of that (0 is nothing, 1 is as much as all of it).
    """

    layer: str
    delta_norm: float
    lost: float


def total_rounding_error(report: Iterable[MergeReport]) -> float:
    """What merging lost over all layers, as a fraction of the norm of all ΔW; 0 if there is no ΔW."""
    entries = list(report)
    norm = math.sqrt(sum(entry.delta_norm**2 for entry in entries))
    lost = math.sqrt(sum((entry.lost * entry.delta_norm) ** 2 for entry in entries))
    return lost / norm if norm else 0.0


class Rows:
    """Which adapter each row of a batch speaks with; None is the bare base model."""

    def __init__(self, names: Iterable[str | None]) -> None:
        self.names = tuple(names)

    def positions(self, batch: int, layer: str) -> dict[str, list[int]]:
        """The rows of each adapter in a batch that may repeat every row (beams, windows, flattened tokens).

        Raises ShapeError when the batch is no multiple of the rows.
        """
        repeat, left = divmod(batch, len(self.names))
        if left or not repeat:
            raise ShapeError(
                f"layer '{layer}' got a batch of {batch} rows; rows() named {len(self.names)} adapters, "
                "so that many rows or a multiple of it is wanted"
            )
        found: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            if name is not None:
                found.setdefault(name, []).extend(range(i * repeat, (i + 1) * repeat))
        return found


class VeraVectors(nn.Module):
    """The vectors d and b of one adapter at one part of a layer, and the basis that they scale.

    layer: the full name, such as "h.0.attn.c_attn:q". Where the config trains one vector only, the other
    is None and stands for ones.
    """

    d: nn.Parameter | None
    b: nn.Parameter | None

    def __init__(
        self,
        layer: str,
        part: Part,
        rank: int,
        basis: Basis,
        config: VeraConfig,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.layer, self.part, self.rank, self.basis, self.config = layer, part, rank, basis, config
        dtype = getattr(torch, config.dtype)
        for name, size, value, absent in (
            ("d", rank, config.start_d, "b"),
            ("b", part.out_features, config.start_b, "d"),
        ):
            vector = (
                None
                if config.vectors == absent
                else nn.Parameter(torch.full((size,), value, dtype=dtype, device=device))
            )
            self.register_parameter(name, vector)

    @property
    def scale(self) -> float:
        return self.basis.scale(self.rank, self.part.in_features)

    def pair(self, device: torch.device, dtype: torch.dtype) -> tuple[Matrix, Matrix]:
        """(A, B) at this layer's size."""
        part = self.part
        return self.basis.pair(
            self.layer, part.out_features, part.in_features, self.rank, device, dtype
        )

    def apply_dropout(self, x: Tensor) -> Tensor:
        """X with this adapter's dropout."""
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def forward(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """The adapter's share of the output, scale * b * (B (d * (A x))); with W x + bias where a weight is given."""
        A, B = self.pair(x.device, product_dtype(x))
        return vera_linear(
            self.apply_dropout(x),
            A,
            B,
            self.d,
            self.b,
            self.scale,
            weight=weight,
            bias=bias,
            plan=self.config.plan,
            layer_id=id(self),
        )

    def delta_weight(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """ΔW of this part, (m, n)."""
        return delta_weight(*self.pair(device, dtype), self.d, self.b, self.scale)


class ModuleWrapper(nn.Module):
    """A module in the place of another one. Attributes it does not have are those of the module it stands for.

    base: that module; name: its path in the model.
    """

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(super().__getattr__("base"), name)


def replace_modules(model: nn.Module, choose: Callable[[nn.Module], nn.Module]) -> None:
    """Put choose(module) where each module inside a model stands, in every place where it does. Stand-ins are not looked into."""
    for parent in [m for m in model.modules() if not isinstance(m, ModuleWrapper)]:
        for name, child in list(parent._modules.items()):
            chosen = child if child is None else choose(child)
            if chosen is not child:
                setattr(parent, name, chosen)


class VeraLayer(ModuleWrapper, abc.ABC):
    """A layer with adapters.

    active: the adapter that computes, or None; rows: the adapters of a mixed batch, which go before `active`; merged: the adapter that is
    inside W.
    """

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__(base, name)
        self.vera = nn.ModuleDict()
        self.active: str | None = None
        self.rows: Rows | None = None
        self.merged: str | None = None
        self.register_state_dict_post_hook(_names_out)
        self.register_load_state_dict_pre_hook(_names_in)

    @abc.abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer computes, with the adapter's share; called as the base layer is."""

    @property
    def current(self) -> str | None:
        """The adapter that computes for the whole batch, if one does."""
        name = self.active
        return name if name is not None and self.merged is None and name in self.vera else None


class VeraWeightLayer(VeraLayer):
    """A VeraLayer over weight matrices: what linear layers and attention blocks have in common."""

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__(base, name)
        self.weights_before_merge: dict[str, Tensor] = {}

    def add(self, adapter: str, vectors: VeraVectors) -> None:
        """Give an adapter its vectors at one part; an adapter's parts come by rising rows and do not overlap."""
        if adapter not in self.vera:
            self.vera[adapter] = nn.ModuleDict()
        self._parts(adapter)[vectors.part.key] = vectors.train(self.training)

    def vectors(self, adapter: str) -> list[VeraVectors]:
        """The adapter's vectors in this layer, by rising rows; none if it leaves the layer alone."""
        return list(self._parts(adapter).values()) if adapter in self.vera else []  # type: ignore[arg-type]

    def _parts(self, adapter: str) -> nn.ModuleDict:
        held = self.vera[adapter]
        assert isinstance(held, nn.ModuleDict)
        return held

    def to_weight_layout(self, delta: Tensor, weight: Tensor) -> Tensor:
        """ΔW (m, n) of the whole layer in the layout of the stored weight."""
        return delta

    def rows_of(self, weight: Tensor) -> int:
        """M of the whole matrix, of which a part may be some rows."""
        return weight.shape[0]

    def weight_of(self, parameter: str) -> nn.Parameter:
        """A weight of the base layer, as stored."""
        return self.base.get_parameter(parameter)

    def deltas(self, adapter: str) -> dict[str, Tensor]:
        """ΔW for each weight that the adapter changes, in the layout of the weight, parts put in place.

        In float32, or in float64 where the weight is.
        """
        out: dict[str, Tensor] = {}
        for vectors in self.vectors(adapter):
            weight = self.weight_of(vectors.part.parameter)
            delta = vectors.delta_weight(
                weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32
            )
            if vectors.part.name:
                rows = self.rows_of(weight)
                delta = F.pad(delta, (0, 0, vectors.part.start, rows - vectors.part.stop))
            delta = self.to_weight_layout(delta, weight)
            held = out.get(vectors.part.parameter)
            out[vectors.part.parameter] = delta if held is None else held + delta
        return out

    def merged_weights(self, adapter: str) -> dict[str, Tensor]:
        """W + ΔW for each weight that the adapter changes, in the layout of the weight and at least fp32."""
        return {
            parameter: self.weight_of(parameter).to(delta.dtype) + delta
            for parameter, delta in self.deltas(adapter).items()
        }

    def cached_weights(self, adapter: str) -> dict[str, Tensor] | None:
        """`merged_weights`, kept from an earlier call where nothing has changed; None where they may not be used.

        That is in training, where gradients of the vectors are wanted, under a plan of the user's, in compiled code, and for
        weights that cannot be read or have under 32 bits.
        """
        if self.training or self.rows is not None or torch.compiler.is_compiling():
            return None
        for vectors in self.vectors(adapter):
            weight = self.weight_of(vectors.part.parameter)
            if (
                vectors.config.plan != "auto"
                or not is_dense(weight)
                or not is_full_precision(weight.dtype)
                or weight.is_inference()
            ):
                return None
            if torch.is_grad_enabled() and (
                weight.requires_grad or any(p.requires_grad for p in vectors.parameters())
            ):
                return None
        return WEIGHTS.get(self, adapter)

    def train(self, mode: bool = True) -> Self:
        """Training ends what was kept for inference."""
        if mode:
            WEIGHTS.drop(self)
        return super().train(mode)

    def check_mergeable(self, adapter: str) -> None:
        """Raise UnsupportedError, with the reason, where W + ΔW cannot be stored."""
        for vectors in self.vectors(adapter):
            weight = self.weight_of(vectors.part.parameter)
            if not is_dense(weight):
                raise UnsupportedError(
                    f"layer '{self.name}' stores its weight as {type(weight).__name__} of {weight.dtype}; W + ΔW would "
                    "have to be quantized again and lose ΔW. Load the base model in 16 or 32 bits to merge"
                )

    @torch.no_grad()
    def merge(self, adapter: str) -> list[MergeReport]:
        """W <- W + ΔW, summed in fp32 and rounded once. W is kept, so that `unmerge` gives back its bits."""
        WEIGHTS.drop(self)
        report = []
        for parameter, delta in self.deltas(adapter).items():
            weight = self.weight_of(parameter)
            before = weight.data.clone()
            self.weights_before_merge[parameter] = before
            weight.data.copy_(before.to(delta.dtype) + delta)
            lost = (weight.data.to(delta.dtype) - before.to(delta.dtype) - delta).norm()
            norm = delta.norm()
            report.append(
                MergeReport(
                    f"{self.name}.{parameter}",
                    norm.item(),
                    (lost / norm).item() if norm > 0 else 0.0,
                )
            )
        self.merged = adapter
        return report

    @torch.no_grad()
    def unmerge(self, restore: bool = True) -> None:
        """Give W back bit for bit, or, without `restore`, forget it and stay merged."""
        for parameter, before in self.weights_before_merge.items():
            if restore:
                self.weight_of(parameter).data.copy_(before)
        self.weights_before_merge = {}
        self.merged = None


class VeraHead(VeraLayer):
    """A module trained in full, such as a classifier: every adapter has a copy, None has the original."""

    def add(self, adapter: str, module: nn.Module) -> None:
        """Give an adapter its copy."""
        self.vera[adapter] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rows is None:
            return self._of(self.active)(*args, **kwargs)
        return by_adapter(self, args, kwargs, self._of)

    def _of(self, adapter: str | None) -> nn.Module:
        return self.vera[adapter] if adapter is not None and adapter in self.vera else self.base


def by_adapter(
    layer: VeraLayer, args: tuple[Any, ...], kwargs: Mapping[str, Any], module_of: Any
) -> Any:
    """Run a mixed batch in one call for each adapter and put the rows back in their order.

    args, kwargs: of the layer; tensors whose dimension 0 is the batch are split, all else is passed on.
    module_of: the callable of an adapter's name (None: the base). Returns a tensor, or a tuple of them.
    """
    assert layer.rows is not None
    first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    if first is None:
        raise UnsupportedError(
            f"layer '{layer.name}' was called without a tensor; rows() cannot tell its batch"
        )
    batch = first.shape[0]
    positions: dict[str | None, list[int]] = {}
    positions.update(layer.rows.positions(batch, layer.name))
    named = {i for found in positions.values() for i in found}
    positions[None] = [i for i in range(batch) if i not in named]
    results, order = [], []
    for name, found in positions.items():
        if not found:
            continue
        index = torch.tensor(found, device=first.device)

        def pick(value: Any, index: Tensor = index) -> Any:
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
                return value.index_select(0, index)
            return value

        results.append(module_of(name)(*map(pick, args), **{k: pick(v) for k, v in kwargs.items()}))
        order.extend(found)
    back = torch.tensor(order, device=first.device).argsort()

    def join(pieces: list[Any]) -> Any:
        return None if pieces[0] is None else torch.cat(pieces).index_select(0, back)

    if isinstance(results[0], tuple):
        return tuple(join(list(pieces)) for pieces in zip(*results, strict=True))
    return join(results)


def is_plain(base: nn.Module) -> bool:
    """Whether nothing hooks into a layer's forward, so that its weight may be read in place of a call."""
    return "forward" not in base.__dict__ and not any(
        (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks)
    )


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product with x runs in: autocast's where it is on, else x's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _names_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Write the base layer's tensors under their names, and as they were before a merge.

    A state dict of a merged model thus holds W and the vectors, never W + ΔW and the vectors.
    """
    for key in [k for k in state if k.startswith(prefix + _BASE)]:
        state[prefix + key[len(prefix) + len(_BASE) :]] = state.pop(key)
    for name, weight in getattr(module, "weights_before_merge", {}).items():
        state[prefix + name] = weight


def _names_in(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """The inverse of `_names_out`; names that already say `base` are taken too."""
    if module.merged is not None:
        raise AdapterStateError(
            f"adapter {module.merged!r} is merged into the weights; unmerge before load_state_dict"
        )
    for key in [k for k in state if k.startswith(prefix) and not k[len(prefix) :].startswith(_OWN)]:
        state[prefix + _BASE + key[len(prefix) :]] = state.pop(key)
