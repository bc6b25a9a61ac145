"""LoraSlotGroup: the slots of LoRA adapters that have layers and ranks in common.

    y = W x + B[slot] (A[slot] x)

A slot holds A and B of every layer in one row of values, B with every scale in it. A free slot
takes no memory: LoRA adapters are large.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from veratune.adapter import Adapter
from veratune.basis.lora import LoraBasis
from veratune.layers.vectors import product_dtype
from veratune.serving.pool.slots import Project, SlotGroup, check_linear
from veratune.targets import Site


@dataclasses.dataclass(frozen=True)
class LoraSite:
    """One site (a layer or a part of it) of a group.

    Args:
        site: The site in the model.
        A: Where A (r, n) stands in a slot's values.
        B: Where B (m, r) stands in a slot's values.
    """

    site: Site
    A: slice
    B: slice


class LoraSlotGroup(SlotGroup[LoraSite]):
    """Slots for LoRA adapters of one kind.

    Args:
        model: The base model.
        sites: The sites of every adapter of the kind, with their ranks.
        slots: Number of slots.
        dtype: Dtype of the values in memory.

    Raises:
        UnsupportedError: a site is a convolution.
    """

    has_base_slot = False

    def __init__(
        self, model: nn.Module, sites: Sequence[Site], slots: int, dtype: torch.dtype
    ) -> None:
        check_linear(sites)
        self.heads, self.head_of, self.weight_fingerprint = {}, {}, None
        self.layers = {}
        self._dtype, self._device = dtype, next(model.parameters()).device
        end = 0
        for site in sites:
            m, n = site.shape
            middle = end + site.rank * n
            A, B = slice(end, middle), slice(middle, middle + m * site.rank)
            self.layers.setdefault(site.module, []).append(LoraSite(site, A, B))
            end = B.stop
        for lora_sites in self.layers.values():
            lora_sites.sort(key=lambda lora_site: lora_site.site.part.start)
        self._size = end
        self._values: dict[int, Tensor] = {}
        self.free = list(range(slots, 0, -1))

    @property
    def bytes_per_slot(self) -> int:
        return self._size * self._dtype.itemsize

    def frozen_tensors(self) -> list[Tensor]:
        return []

    def write(self, slot: int, adapter: Adapter) -> None:
        basis = adapter.basis
        assert isinstance(basis, LoraBasis)
        values = torch.empty(self._size, dtype=self._dtype, device=self._device)
        for lora_sites in self.layers.values():
            for lora_site in lora_sites:
                name = lora_site.site.name
                A, B = basis.pairs[name]
                values[lora_site.A] = A.flatten().to(values)
                values[lora_site.B] = (B * adapter.d[name]).flatten().to(values)
        self._values[slot] = values

    def clear(self, slot: int) -> None:
        self._values.pop(slot, None)

    def update(
        self, slot_site: LoraSite, x: Tensor, slots: tuple[int, ...], project: Project
    ) -> Tensor:
        dtype = product_dtype(x)
        (m, n), r = slot_site.site.shape, slot_site.site.rank
        flat = x.to(dtype).reshape(x.shape[0], -1, n)
        A, B = (
            self._stacked(slots, place, shape, dtype)
            for place, shape in ((slot_site.A, (r, n)), (slot_site.B, (m, r)))
        )
        y = torch.matmul(torch.matmul(flat, A.mT), B.mT)
        return y.view(*x.shape[:-1], m)

    def delta(self, slot_site: LoraSite, slot: int, dtype: torch.dtype) -> Tensor:
        (m, n), r = slot_site.site.shape, slot_site.site.rank
        A, B = (
            self._stacked((slot,), place, shape, dtype)
            for place, shape in ((slot_site.A, (r, n)), (slot_site.B, (m, r)))
        )
        return B @ A

    def _stacked(
        self, slots: tuple[int, ...], place: slice, shape: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """A or B of each row, shape (rows, *shape); (*shape) where all rows have one adapter."""
        if len(set(slots)) == 1:
            return self._values[slots[0]][place].view(shape).to(dtype)
        rows = [self._values[slot][place] for slot in slots]
        return torch.stack(rows).view(-1, *shape).to(dtype)
