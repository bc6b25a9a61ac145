"""SlotGroup: the slots of adapters that differ in their values alone.

    SlotGroup (abstract)
    ├── VeraSlotGroup    d and b in slots, A and B of the group
    └── LoraSlotGroup    A and B in slots (lora_slots.py)

VeRA adapters that have basis, layers and ranks in common share a group: one row of values for each
slot, with d and b of every layer one behind the other. Loading an adapter is one copy into a free
row.
"""

import abc
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from veratune.adapter import Adapter
from veratune.basis.basis import Basis
from veratune.errors import UnsupportedError
from veratune.fingerprint import weight_fingerprint
from veratune.layers.vectors import product_dtype
from veratune.ops.delta import delta_weight
from veratune.ops.matrix import Matrix
from veratune.ops.rows import vera_rows
from veratune.targets import Site, find_heads

_GATHERED_BATCHES = 4  # the decoding batch, and some prefill batches


@dataclasses.dataclass(frozen=True)
class SlotSite:
    """One site (a layer or a part of it) of a group.

    Args:
        site: The site in the model.
        basis: Gives A and B.
        d: Where d stands in a slot's values; None: all ones.
        b: Where b stands in a slot's values; None: all ones.
        pairs: (A, B) in each dtype that was used.
    """

    site: Site
    basis: Basis
    d: slice | None
    b: slice | None
    pairs: dict[torch.dtype, tuple[Matrix, Matrix]] = dataclasses.field(default_factory=dict)

    @property
    def scale(self) -> float:
        """The Kaiming gain of A and B at this site."""
        return self.basis.scale(self.site.rank, self.site.part.in_features)

    def pair(self, device: torch.device, dtype: torch.dtype) -> tuple[Matrix, Matrix]:
        """Return (A, B) in the dtype of the products."""
        if dtype not in self.pairs:
            self.pairs[dtype] = self.basis.pair(
                self.site.name, *self.site.shape, self.site.rank, device, dtype
            )
        return self.pairs[dtype]


class GroupSite(Protocol):
    """A site of a group."""

    @property
    def site(self) -> Site: ...


S = TypeVar("S", bound=GroupSite)
Project = Callable[[Tensor, Matrix], Tensor]  # A x of a batch


class SlotGroup(abc.ABC, Generic[S]):
    """Slots for adapters of one kind.

    Attributes:
        layers: The group's sites by the path of their layer.
        free: Slots without an adapter.
        has_base_slot: Whether slot 0 computes the base model.
        heads: Tensors of modules that are trained in full, by name, one for each slot.
        head_of: The path of each such tensor's module.
        weight_fingerprint: Of the base model's weights.
    """

    has_base_slot: bool
    layers: dict[str, list[S]]
    free: list[int]
    heads: Mapping[str, Tensor]
    head_of: Mapping[str, str]
    weight_fingerprint: Tensor | None

    @property
    def head_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the heads' tensors; the rows of one batch have them in common."""
        return tuple(tuple(t.shape[1:]) for t in self.heads.values())

    @property
    @abc.abstractmethod
    def bytes_per_slot(self) -> int:
        """Bytes of one adapter."""

    @abc.abstractmethod
    def frozen_tensors(self) -> list[Tensor]:
        """Matrices that the adapters of the group have in common."""

    @abc.abstractmethod
    def write(self, slot: int, adapter: Adapter) -> None:
        """Copy an adapter's values into a slot that no request uses."""

    def clear(self, slot: int) -> None:
        """Release the memory of a slot that no request uses, where that is worth it."""

    @abc.abstractmethod
    def delta(self, slot_site: S, slot: int, dtype: torch.dtype) -> Tensor:
        """Compute ΔW, shape (m, n), of a site with the adapter in a slot."""

    @abc.abstractmethod
    def update(self, slot_site: S, x: Tensor, slots: tuple[int, ...], project: Project) -> Tensor:
        """Compute ΔW x of each row with the adapter in its slot.

        Args:
            slot_site: A site of this group.
            x: Activations, shape (rows, ..., n).
            slots: The slot of each row.
            project: Computes A x, or takes it from an earlier site.

        Returns:
            Shape (rows, ..., m).
        """


class VeraSlotGroup(SlotGroup[SlotSite]):
    """Slots for VeRA adapters of one kind.

    Args:
        model: The base model.
        adapter: Any adapter of the kind.
        sites: Its sites in the model.
        slots: Number of slots, besides slot 0 for the base model.
        dtype: Dtype of the values in memory.

    Attributes:
        values: (slots + 1, values of one adapter); row 0 is zero: the base model.

    Raises:
        UnsupportedError: the adapter adapts a convolution.
    """

    has_base_slot = True

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        sites: Sequence[Site],
        slots: int,
        dtype: torch.dtype,
    ) -> None:
        device = next(model.parameters()).device
        self.basis = adapter.basis
        check_linear(sites)
        reserve(self.basis, model, sites)
        self.weight_fingerprint = weight_fingerprint(model, list(sites))
        self.layers: dict[str, list[SlotSite]] = {}
        self.order: list[tuple[str, str]] = []
        size = self._lay_out(adapter, sites)
        self.values = _new_slots(slots, (size,), dtype, device)
        self.scales = torch.ones(size, device=device)
        for slot_site in itertools.chain.from_iterable(self.layers.values()):
            if slot_site.d is not None:
                self.scales[slot_site.d] = slot_site.scale
        self._gathered: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}
        self.head_of = {
            name: path
            for path, _ in find_heads(model, adapter.config.head)
            for name in adapter.head
            if name.startswith(f"{path}.")
        }
        self.heads = {
            name: _new_slots(slots, tuple(t.shape), t.dtype, device)
            for name, t in adapter.head.items()
        }
        self.free = list(range(slots, 0, -1))

    @property
    def bytes_per_slot(self) -> int:
        return sum(t[0].numel() * t.element_size() for t in (self.values, *self.heads.values()))

    def frozen_tensors(self) -> list[Tensor]:
        return self.basis.tensors()

    def update(
        self, slot_site: SlotSite, x: Tensor, slots: tuple[int, ...], project: Project
    ) -> Tensor:
        dtype = product_dtype(x)
        A, B = slot_site.pair(x.device, dtype)
        values = self.gather(slots, dtype)  # d is scaled already
        d, b = (None if s is None else values[:, s] for s in (slot_site.d, slot_site.b))
        z = project(x if x.dtype == dtype else x.to(dtype), A)
        return vera_rows(x, A, B, d, b, None, slot_site.scale if d is None else 1.0, projected=z)

    def delta(self, slot_site: SlotSite, slot: int, dtype: torch.dtype) -> Tensor:
        A, B = slot_site.pair(self.values.device, dtype)
        values = self.gather((slot,), dtype)[0]  # d is scaled already
        d, b = (None if s is None else values[s] for s in (slot_site.d, slot_site.b))
        return delta_weight(A, B, d, b, slot_site.scale if d is None else 1.0)

    def write(self, slot: int, adapter: Adapter) -> None:
        vectors = {"d": adapter.d, "b": adapter.b}
        row = torch.cat([vectors[kind][layer] for kind, layer in self.order])
        self._gathered.clear()
        self.values[slot].copy_(row)
        for name, tensors in self.heads.items():
            tensors[slot].copy_(adapter.head[name])

    def gather(self, slots: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the values of a batch's slots, with d times its site's scale.

        The result is kept for the next step: slots in use are never written, and `write` drops it.

        Args:
            slots: The slot of each row.
            dtype: Dtype of the products.

        Returns:
            Shape (rows, values of one adapter).
        """
        found = self._gathered.get((slots, dtype))
        if found is None:
            index = torch.tensor(slots, device=self.values.device)
            found = (self.values.index_select(0, index) * self.scales).to(dtype)
            if len(self._gathered) >= _GATHERED_BATCHES:
                self._gathered.clear()
            self._gathered[slots, dtype] = found
        return found

    def _lay_out(self, adapter: Adapter, sites: Sequence[Site]) -> int:
        """Give each site its place in a slot's values; return how many values there are."""
        end = 0
        for site in sites:
            places: dict[str, slice | None] = {"d": None, "b": None}
            sizes = {"d": site.rank, "b": site.shape[0]}
            for kind, vectors in (("d", adapter.d), ("b", adapter.b)):
                if vectors:
                    places[kind] = slice(end, end + sizes[kind])
                    self.order.append((kind, site.name))
                    end += sizes[kind]
            self.layers.setdefault(site.module, []).append(
                SlotSite(site, self.basis, places["d"], places["b"])
            )
        for slot_sites in self.layers.values():
            slot_sites.sort(key=lambda slot_site: slot_site.site.part.start)
        return end


def check_linear(sites: Sequence[Site]) -> None:
    """Raise UnsupportedError for a site that is no linear layer or a part of one."""
    for site in sites:
        if site.part.kernel or site.part.expert is not None:
            kind = "a convolution" if site.part.kernel else "an expert"
            raise UnsupportedError(
                f"layer '{site.name}' is {kind}; a pool serves adapters of linear layers"
            )


def reserve(basis: Basis, model: nn.Module, sites: Sequence[Site]) -> None:
    """Make A and B of these sites, where the model is and in the dtype of its products."""
    first = next(model.parameters())
    wanted = [(site.name, *site.shape, site.rank) for site in sites]
    basis.reserve(wanted, first.device, product_dtype(first))


def _new_slots(
    count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return memory for `count` slots behind a slot 0 of zeros.

    Empty slots are never read; on a CPU they take no memory before they are written.
    """
    slots = torch.empty(count + 1, *shape, dtype=dtype, device=device)
    slots[0].zero_()
    return slots
