"""VeraMultiheadAttention: torch's nn.MultiheadAttention.

That module reads `in_proj_weight` and `out_proj.weight` itself and never calls a layer, so its weights
are replaced by W + ΔW for the time of the call. The sum is made in fp32: where the base has fewer bits,
the whole block computes in fp32, so that a small ΔW is not rounded away.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from veratune.layers.base import VeraWeightLayer, by_adapter


class VeraMultiheadAttention(VeraWeightLayer):
    """Attention with W + ΔW in place of its q, k, v and output projections; called as the base is.

    There is no input of the adapter alone here, so an adapter with dropout cannot be attached.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.rows is None:
            return self._with(self.current)(*args, **kwargs)
        return self._mixed(args, kwargs)

    def _with(self, adapter: str | None) -> Any:
        """The base block as a function, with an adapter's weights."""
        if adapter is None or adapter not in self.vera:
            return self.base

        def call(*args: Any, **kwargs: Any) -> Any:
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
            return tuple(_cast(t, narrow) for t in out)

        return call

    def _mixed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call for each adapter; attach.rows refuses blocks that are not batch first, so dimension 0 is the batch.

        A mask of (L, S) holds for every row; one of (N * heads, L, S) is split with the rows.
        """
        named = (
            inspect.signature(nn.MultiheadAttention.forward)
            .bind(self.base, *args, **kwargs)
            .arguments
        )
        named.pop("self")
        mask = named.pop("attn_mask", None)
        by_row = isinstance(mask, Tensor) and mask.dim() == 3
        if by_row:
            named["attn_mask"] = mask.unflatten(0, (-1, self.base.num_heads))

        def module_of(adapter: str | None) -> Any:
            def call(attn_mask: Tensor | None = None, **rest: Any) -> Any:
                own = attn_mask.flatten(0, 1) if attn_mask is not None else mask
                return self._with(adapter)(attn_mask=own, **rest)

            return call

        return by_adapter(self, (), named, module_of)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
