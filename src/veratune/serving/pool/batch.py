"""AdapterBatch: which slot each row of a mixed batch uses, grouped for the layers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veratune.ops.matrix import Matrix, cache_key, matmul
from veratune.serving.pool.lease import Lease
from veratune.serving.pool.merged import MergedWeights
from veratune.serving.pool.slots import SlotGroup


@dataclasses.dataclass(frozen=True)
class GroupRows:
    """The rows of a batch that use one group.

    Args:
        group: The group.
        rows: Numbers of the rows; None: all rows.
        slots: Slot of each row.
    """

    group: SlotGroup[Any]
    rows: Tensor | None
    slots: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class HeadRows:
    """The rows of a batch that use the heads of one adapter."""

    group: SlotGroup[Any]
    slot: int
    rows: list[int]


@dataclasses.dataclass(frozen=True)
class AdapterBatch:
    """The adapters of a batch's rows.

    Args:
        size: Number of rows.
        groups: Rows of each group.
        heads: Rows of each adapter with heads.
    """

    size: int
    groups: list[GroupRows]
    heads: list[HeadRows]

    @property
    def single(self) -> tuple[SlotGroup[Any], int] | None:
        """The group and slot that all rows use; None: several, or the base model."""
        if len(self.groups) != 1 or self.groups[0].rows is not None:
            return None
        group, slots = self.groups[0].group, set(self.groups[0].slots)
        return (group, slots.pop()) if len(slots) == 1 else None

    @classmethod
    def of(cls, leases: Sequence[Lease | None], device: torch.device) -> "AdapterBatch":
        """Group the rows of a batch by the slots of their leases; None is the base model."""
        by_group: dict[SlotGroup[Any], list[tuple[int, int]]] = {}
        for row, lease in enumerate(leases):
            if lease is not None and lease.group is not None:
                by_group.setdefault(lease.group, []).append((row, lease.slot))
        groups: list[GroupRows] = []
        heads: list[HeadRows] = []
        for group, pairs in by_group.items():
            if len(pairs) == len(leases) or (len(by_group) == 1 and group.has_base_slot):
                # Rows of the base model use slot 0, which costs less than leaving them out.
                slots = tuple(lease.slot if lease is not None else 0 for lease in leases)
                groups.append(GroupRows(group, None, slots))
            else:
                rows, slots = zip(*pairs, strict=True)
                groups.append(GroupRows(group, torch.tensor(rows, device=device), slots))
            if group.heads:
                by_slot: dict[int, list[int]] = {}
                for row, slot in pairs:
                    by_slot.setdefault(slot, []).append(row)
                heads += [HeadRows(group, slot, rows) for slot, rows in by_slot.items()]
        return cls(len(leases), groups, heads)


class BatchContext:
    """The batch that the pool's layers compute now, and the last product of an input with A.

    Args:
        merged: Weights of an adapter that all rows use.
    """

    def __init__(self, merged: MergedWeights) -> None:
        self.batch: AdapterBatch | None = None
        self.merged = merged
        self._projected: tuple[Tensor, tuple[object, ...], Tensor] | None = None

    def set(self, batch: AdapterBatch | None) -> AdapterBatch | None:
        """Set the batch and return the one before."""
        before, self.batch, self._projected = self.batch, batch, None
        self.merged.begin(batch)
        return before

    def project(self, x: Tensor, A: Matrix) -> Tensor:
        """Return A x; layers that read the same x one after the other (q, k, v) share it."""
        last = self._projected
        version = 0 if x.is_inference() else x._version
        key = (version, *cache_key(A))
        if last is not None and last[0] is x and last[1] == key:
            return last[2]
        product = matmul(A, x)
        if not x.is_inference():  # writes to an inference tensor leave no trace
            self._projected = (x, key, product)
        return product
