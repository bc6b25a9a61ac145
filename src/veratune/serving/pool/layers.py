"""Pool layers: the modules that apply each row's adapter inside the base model.

    PoolLayer (ModuleWrapper)
    ├── PoolLinear    y = W x + b[slot] * (B (d[slot] * (A x))), or W x + B[slot] (A[slot] x)
    └── PoolHead      a module that adapters bring whole

A mixed batch takes two dense products and two gathers a layer, however many tenants are in it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from veratune.errors import ShapeError
from veratune.layers.linear import add_to_parts
from veratune.layers.wrapper import ModuleWrapper
from veratune.ops.few_rows import linear
from veratune.serving.pool.batch import AdapterBatch, BatchContext


class PoolLayer(ModuleWrapper):
    """Wraps a module of the base model.

    Args:
        base: The module.
        name: Its path in the model.
        context: Gives the batch that is computed now.
    """

    def __init__(self, base: nn.Module, name: str, context: BatchContext) -> None:
        super().__init__(base, name)
        self.context = context

    def current_batch(self, rows: int) -> AdapterBatch | None:
        """Return the batch that is computed now; raises ShapeError if it has other rows."""
        batch: AdapterBatch | None = self.context.batch
        if batch is not None and batch.size != rows:
            raise ShapeError(
                f"layer '{self.name}' got a batch of {rows} rows; "
                f"rows() named {batch.size} adapters"
            )
        return batch


class PoolLinear(PoolLayer):
    """A linear layer: y = W x + ΔW[slot] x for rows with an adapter; see `SlotGroup.update`.

    Where all rows have one adapter, y = (W + ΔW) x; see `MergedWeights`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, each row with its own adapter."""
        batch = self.current_batch(x.shape[0])
        weight = self.context.merged.weight(self.name, self.base, x) if batch is not None else None
        if weight is not None:
            bias: Tensor | None = self.base.bias  # type: ignore[assignment]
            return linear(x, weight, bias)
        y: Tensor = self.base(x)
        if batch is None:
            return y
        for entry in batch.groups:
            slot_sites = entry.group.layers.get(self.name)
            if slot_sites is None:
                continue
            own_x = x if entry.rows is None else x.index_select(0, entry.rows)
            updates = []
            for slot_site in slot_sites:
                update = entry.group.update(slot_site, own_x, entry.slots, self.context.project)
                if entry.rows is not None:
                    whole = update.new_zeros(*y.shape[:-1], update.shape[-1])
                    update = whole.index_copy(0, entry.rows, update)
                updates.append((slot_site.site.part, update))
            y = add_to_parts(y, updates)
        return y


class PoolHead(PoolLayer):
    """A module that adapters bring whole, such as a classifier: one call for each adapter.

    All rows of a batch have heads of one width.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the heads' outputs in the order of the rows."""
        batch = self.current_batch(x.shape[0])
        heads = [] if batch is None else batch.heads
        heads = [entry for entry in heads if self.name in entry.group.head_of.values()]
        if not heads:
            output: Tensor = self.base(x, *args, **kwargs)
            return output
        with_head = {row for entry in heads for row in entry.rows}
        order = [row for row in range(x.shape[0]) if row not in with_head]
        pieces: list[Tensor] = [self.base(x[order], *args, **kwargs)] if order else []
        for entry in heads:
            tensors = {
                name.removeprefix(f"{self.name}."): t[entry.slot]
                for name, t in entry.group.heads.items()
                if entry.group.head_of[name] == self.name
            }
            own_x = (x[entry.rows], *args)
            pieces.append(torch.func.functional_call(self.base, tensors, own_x, kwargs))
            order += entry.rows
        return torch.cat(pieces)[torch.tensor(order, device=x.device).argsort()]
