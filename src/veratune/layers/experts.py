"""VeraExperts: the experts of a mixture-of-experts layer, whose weights are fused 3-D parameters.

transformers stores the experts of a layer as `gate_up_proj` (or `up_proj`) and `down_proj` of shape
(experts, out, in), or (experts, in, out) for GPT-OSS, and DBRX as 2-D matrices with the experts one
below the other. Each expert's matrix has its own d and b; A and B are those of one matrix of its
size, shared by all experts. Sites are called "path.gate_up_proj:3" for expert 3.
"""

import dataclasses
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from veratune.errors import UnsupportedError
from veratune.layers.quantized import is_dense
from veratune.layers.rows import run_by_adapter
from veratune.layers.vectors import Part, VeraVectors, product_dtype
from veratune.layers.weight_layer import VeraWeightLayer
from veratune.ops.delta import is_full_precision
from veratune.ops.experts import combine_experts, routed_linear, sort_by_expert

_DBRX = "DbrxExperts"


@dataclasses.dataclass(frozen=True)
class ExpertWeight:
    """How a fused parameter stores the matrices W (out_features, in_features) of its experts.

    Args:
        parameter: Name of the weight.
        bias: Name of the bias (experts, out_features), or "".
        experts: Number of experts.
        out_features: m of each matrix.
        in_features: n of each matrix.
        transposed: Whether each matrix is stored as Wᵀ.
    """

    parameter: str
    bias: str
    experts: int
    out_features: int
    in_features: int
    transposed: bool

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """(experts, rows, columns) of the stored matrices."""
        sizes = self.out_features, self.in_features
        rows, columns = reversed(sizes) if self.transposed else sizes
        return self.experts, rows, columns

    def matrices(self, weight: Tensor) -> Float[Tensor, "e m n"]:
        """W of all experts, as a view of the stored weight."""
        stacked = weight.view(self.stored_shape)
        return stacked.transpose(1, 2) if self.transposed else stacked


class _FusedExperts(Protocol):
    """The attributes that transformers' `use_experts_implementation` gives an experts module."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    has_post_expert_norm: bool


def is_experts(module: nn.Module) -> bool:
    """Whether this is a module of fused experts whose layout is known."""
    return bool(expert_weights(module))


def expert_weights(module: nn.Module) -> tuple[ExpertWeight, ...]:
    """Describe the fused weights of an experts module; empty for any other module."""
    if type(module).__name__ == _DBRX and isinstance(getattr(module, "mlp", None), nn.Module):
        return _dbrx_weights(module)
    if not hasattr(module, "has_gate") or not hasattr(module, "is_transposed"):
        return ()
    fused = cast(_FusedExperts, module)
    names = ("gate_up_proj" if fused.has_gate else "up_proj", "down_proj")
    weights = []
    for name in names:
        weight = module._parameters.get(name)
        if weight is None or weight.dim() != 3:
            return ()
        experts, rows, columns = weight.shape
        m, n = (columns, rows) if fused.is_transposed else (rows, columns)
        bias = f"{name}_bias" if fused.has_bias else ""
        weights.append(ExpertWeight(name, bias, experts, m, n, fused.is_transposed))
    return tuple(weights)


def _dbrx_weights(module: nn.Module) -> tuple[ExpertWeight, ...]:
    experts = cast(int, module.num_experts)
    ffn, hidden = cast(int, module.ffn_hidden_size), cast(int, module.hidden_size)
    up = [ExpertWeight(f"mlp.{name}", "", experts, ffn, hidden, False) for name in ("w1", "v1")]
    return (*up, ExpertWeight("mlp.w2", "", experts, hidden, ffn, True))


def expert_parts(module: nn.Module) -> tuple[Part, ...]:
    """The matrix of each expert in each fused weight."""
    return tuple(
        Part(str(e), w.parameter, 0, w.out_features, w.in_features, expert=e)
        for w in expert_weights(module)
        for e in range(w.experts)
    )


def check_experts(module: nn.Module, path: str) -> None:
    """Raise UnsupportedError where the experts' weights are quantized, packed or sharded."""
    for layout in expert_weights(module):
        weight = module.get_parameter(layout.parameter)
        if not is_dense(weight):
            raise UnsupportedError(
                f"the experts '{path}' store {layout.parameter} as {type(weight).__name__} of "
                f"{weight.dtype}; load the base model in 16 or 32 bits, or exclude the layer"
            )


class VeraExperts(VeraWeightLayer):
    """Experts with W_e + ΔW_e for each expert e that an adapter changes; called as the base is."""

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__(base, name)
        self.layouts = {layout.parameter: layout for layout in expert_weights(base)}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the experts of each token; (hidden_states, expert index, expert weights)."""
        self.check_recomputation()
        if self.rows is None:
            return cast(Tensor, self._with_adapter(self.current)(*args, **kwargs))
        x, *routing = (*args, *kwargs.values())
        # One row a token, as the router has it: DBRX passes (batch, tokens, h).
        tokens = (x.reshape(-1, x.shape[-1]), *routing)
        y = cast(Tensor, run_by_adapter(self, tokens, {}, self._with_adapter))
        return y.reshape(x.shape)

    def _with_adapter(self, adapter: str | None) -> Any:
        if adapter is None or adapter not in self.vera:
            return self.base
        return lambda *args, **kwargs: self._routed(adapter, *args, *kwargs.values())

    def _routed(
        self,
        adapter: str,
        hidden_states: Float[Tensor, "*T h"],
        expert_index: Integer[Tensor, "T k"],
        router_weights: Float[Tensor, "T k"],
    ) -> Float[Tensor, "*T h"]:
        """Every token through its experts, sorted by expert."""
        vectors = {(v.part.parameter, v.part.expert): v for v in self.vectors(adapter)}
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        experts = next(iter(self.layouts.values())).experts
        tokens, pairs, counts = sort_by_expert(expert_index, experts)

        def project(name: str, x: Tensor) -> Tensor:
            layout = self.layouts[name]
            return routed_linear(
                x,
                counts,
                lambda e, rows: self._expert_linear(layout, e, rows, vectors.get((name, e))),
                layout.out_features,
            )

        x = flat[tokens]
        if type(self.base).__name__ == _DBRX:
            glu: Any = self.base.mlp
            inner = glu.activation_fn(project("mlp.w1", x)) * project("mlp.v1", x)
            y = project("mlp.w2", inner)
        else:
            base: Any = self.base
            up = project("gate_up_proj" if base.has_gate else "up_proj", x)
            y = project("down_proj", base._apply_gate(up) if base.has_gate else base.act_fn(up))
            y = base.post_expert_norm(y) if base.has_post_expert_norm else y
        out = combine_experts(y, pairs, router_weights)
        return out.to(hidden_states.dtype).view(hidden_states.shape)

    def _expert_linear(
        self, layout: ExpertWeight, expert: int, x: Tensor, vectors: VeraVectors | None
    ) -> Tensor:
        """W_e x + bias, with the update of the expert's vectors."""
        weight = layout.matrices(self.weight_of(layout.parameter))[expert]
        bias = self.base.get_parameter(layout.bias)[expert] if layout.bias else None
        if vectors is None:
            return F.linear(x, weight, bias)
        wanted = vectors.config.plan
        in_weight = x.dtype == weight.dtype == product_dtype(x)
        in_weight = in_weight and not (vectors.config.dropout and self.training)
        if in_weight and (is_full_precision(x.dtype) or wanted not in ("projected", "merged")):
            return cast(Tensor, vectors(x, weight, bias))
        if wanted in ("projected", "merged"):
            raise UnsupportedError(
                f"plan={wanted!r} puts ΔW into the weight of layer '{self.name}', but "
                f"it is {weight.dtype} for a product in {product_dtype(x)}, or the adapter's input "
                "is dropped out; use plan='auto', 'factored' or 'dense'"
            )
        y = F.linear(x, weight, bias)
        return y + vectors(x).to(y.dtype)

    def deltas(self, adapter: str) -> dict[str, Tensor]:
        """ΔW of each fused weight, in its layout; zero for experts that the adapter leaves
        alone.
        """
        out: dict[str, Tensor] = {}
        for vectors in self.vectors(adapter):
            layout = self.layouts[vectors.part.parameter]
            weight = self.weight_of(layout.parameter)
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            if layout.parameter not in out:
                out[layout.parameter] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            delta = layout.matrices(out[layout.parameter])[cast(int, vectors.part.expert)]
            delta.copy_(vectors.delta_weight(weight.device, dtype))
        return out
