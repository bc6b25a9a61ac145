"""The modules that replace adapted layers while a fleet trains: every row of a batch has its
tenant's vectors.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veratune.basis.basis import Basis
from veratune.errors import ShapeError, UnsupportedError
from veratune.layers.linear import add_to_parts
from veratune.layers.vectors import product_dtype
from veratune.layers.wrapper import ModuleWrapper, replace_modules
from veratune.ops.matrix import Matrix, cache_key, matmul
from veratune.ops.rows import vera_rows
from veratune.targets import Site


@dataclasses.dataclass
class TenantBatch:
    """The vectors and heads of the batch that is running.

    Attributes:
        index: The tenant of each row, shape (rows,), as a position among this step's tenants.
        vectors: (d, b) by site name: d (k, r) and b (k, m) of this step's k tenants.
        heads: Parameters of each tenant's head by the head's path: a mapping per tenant.
    """

    index: Tensor
    vectors: Mapping[str, tuple[Tensor | None, Tensor | None]]
    heads: Mapping[str, Sequence[Mapping[str, Tensor]]]
    projected: tuple[Tensor, tuple[Any, ...], Tensor] | None = None

    def project(self, x: Tensor, A: Matrix) -> Tensor:
        """A x, computed once for the layers that read the same x one after the other."""
        key = cache_key(A)
        last = self.projected
        if last is not None and last[0] is x and last[1] == (x._version, *key):
            return last[2]
        product = matmul(A, x)
        self.projected = (x, (x._version, *key), product)
        return product


class BatchHolder:
    """The running batch, shared by all wrappers of one model; None for the base model."""

    def __init__(self) -> None:
        self.batch: TenantBatch | None = None

    def rows_of(self, layer: str, x: Tensor) -> TenantBatch | None:
        """The running batch, if its rows are those of x. Raises ShapeError otherwise."""
        batch = self.batch
        if batch is not None and x.shape[0] != len(batch.index):
            raise ShapeError(
                f"layer '{layer}' got {x.shape[0]} rows, but the batch has {len(batch.index)}; "
                "this model does not keep the batch in dimension 0, so its tenants cannot be told "
                "apart"
            )
        return batch


class FleetLinear(ModuleWrapper):
    """y[i] = W x[i] + s b[t(i)] * (B (d[t(i)] * (A x[i]))), where t(i) is the tenant of row i."""

    def __init__(
        self, base: nn.Module, name: str, holder: BatchHolder, sites: Sequence[Site], basis: Basis
    ) -> None:
        super().__init__(base, name)
        self.holder, self.sites, self.basis = holder, sites, basis

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        batch = self.holder.rows_of(self.name, x)
        if batch is None:
            return y
        dtype = product_dtype(x)
        narrow = x if x.dtype == dtype else x.to(dtype)
        updates = []
        for site in self.sites:
            A, B = self.basis.pair(site.name, *site.shape, site.rank, x.device, dtype)
            d, b = batch.vectors[site.name]
            scale = self.basis.scale(site.rank, site.part.in_features)
            projected = batch.project(narrow, A)
            update = vera_rows(narrow, A, B, d, b, batch.index, scale, projected=projected)
            updates.append((site.part, update))
        return add_to_parts(y, updates)


class FleetHead(ModuleWrapper):
    """A module that every tenant trains in full: each row goes through its tenant's parameters."""

    def __init__(self, base: nn.Module, name: str, holder: BatchHolder) -> None:
        super().__init__(base, name)
        self.holder = holder

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        batch = self.holder.rows_of(self.name, x)
        if batch is None:
            return self.base(x, *args, **kwargs)  # type: ignore[no-any-return]
        outputs, order = [], []
        for tenant in batch.index.unique().tolist():
            rows = (batch.index == tenant).nonzero().squeeze(1)
            parameters = dict(batch.heads[self.name][tenant])
            output = torch.func.functional_call(
                self.base, parameters, (x.index_select(0, rows), *args), kwargs
            )
            outputs.append(output)
            order.append(rows)
        return torch.cat(outputs).index_select(0, torch.cat(order).argsort())


def wrap(
    model: nn.Module, sites: Sequence[Site], heads: Sequence[str], basis: Basis
) -> BatchHolder:
    """Replace the adapted layers and heads of a model, in place. Returns what holds the running
    batch.

    Raises:
        UnsupportedError: for layers that a fleet cannot adapt.
    """
    holder = BatchHolder()
    by_module: dict[str, list[Site]] = {}
    for site in sites:
        by_module.setdefault(site.module, []).append(site)
    wrappers: dict[nn.Module, ModuleWrapper] = {}
    for path, parts in by_module.items():
        base = model.get_submodule(path)
        part = parts[0].part
        fits = not part.kernel and part.expert is None
        if not fits or isinstance(base, nn.MultiheadAttention):
            raise UnsupportedError(
                f"layer '{path}' is a {type(base).__name__}; a fleet adapts linear layers. "
                "Exclude it, or train its tenants one by one with veratune train"
            )
        parts.sort(key=lambda site: site.part.start)
        wrappers[base] = FleetLinear(base, path, holder, parts, basis)
    for path in heads:
        base = model.get_submodule(path)
        if next(base.buffers(), None) is not None:
            raise UnsupportedError(
                f"head '{path}' has buffers (batch statistics?), which tenants cannot share; "
                "train its tenants one by one with veratune train"
            )
        wrappers[base] = FleetHead(base, path, holder)
    replace_modules(model, lambda module: wrappers.get(module, module))
    return holder
