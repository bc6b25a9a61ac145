"""VeraMultiheadAttention: torch's nn.MultiheadAttention.

That module reads `in_proj_weight` and `out_proj.weight` itself and never calls a layer, so it is
called with W + ΔW as its weights. The sum is taken in float32. Where the base has fewer bits, the
whole block computes in float32, so that a small ΔW is not rounded away.
"""

import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from veratune.layers.rows import run_by_adapter
from veratune.layers.weight_layer import VeraWeightLayer


class VeraMultiheadAttention(VeraWeightLayer):
    """Attention with W + ΔW for its q, k, v and output projections; called as the base is.

    The adapter has no separate input here, so an adapter with dropout cannot be attached.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        self.check_recomputation()
        if self.rows is None:
            return self._with_adapter(self.current)(*args, **kwargs)
        return self._mixed_forward(args, kwargs)

    def _with_adapter(self, adapter: str | None) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The base block as a function, with an adapter's weights; None: without one."""
        if adapter is None or adapter not in self.vera:
            return self.base

        def call(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            narrow = self.weight_of("out_proj.weight").dtype
            wide = torch.promote_types(narrow, torch.float32)
            changed = self.cached_weights(adapter) or self.merged_weights(adapter)
            weights = {
                name: changed[name] if name in changed else p.to(wide)
                for name, p in self.base.named_parameters()
            }
            out = torch.func.functional_call(
                self.base,
                weights,
                tuple(_cast(a, wide) for a in args),
                {k: _cast(v, wide) for k, v in kwargs.items()},
            )
            y, attention = (_cast(t, narrow) for t in out)
            return y, attention

        return call

    def _mixed_forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """One call for each adapter. `rows` refuses blocks that are not batch first.

        A mask of (L, S) holds for every row; one of (N * heads, L, S) is split with the rows.
        """
        signature = inspect.signature(nn.MultiheadAttention.forward)
        named = signature.bind(self.base, *args, **kwargs).arguments
        named.pop("self")
        mask = named.pop("attn_mask", None)
        if isinstance(mask, Tensor) and mask.dim() == 3:
            named["attn_mask"] = mask.unflatten(0, (-1, cast(int, self.base.num_heads)))

        def module_of(adapter: str | None) -> Callable[..., Any]:
            def call(attn_mask: Tensor | None = None, **rest: Any) -> Any:
                rows_mask = attn_mask.flatten(0, 1) if attn_mask is not None else mask
                return self._with_adapter(adapter)(attn_mask=rows_mask, **rest)

            return call

        return cast(tuple[Tensor, Tensor | None], run_by_adapter(self, (), named, module_of))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
