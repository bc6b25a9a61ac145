"""AdapterPool: the adapters in memory over one base model, and which one each row of a batch uses.

    VeRA    y = W x + b[slot] * (B (d[slot] * (A x)))
    LoRA    y = W x + B[slot] (A[slot] x)

A slot in use is never written: an update of an adapter
takes another slot.
"""

import collections
import contextlib
import copy
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from veratune.adapter import Adapter, base_id, bind, check_fits, check_weight_fingerprint
from veratune.base_weights import principal_basis
from veratune.basis.basis import Basis
from veratune.basis.lora import LoraBasis
from veratune.errors import (
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    PoolFullError,
    UnsupportedError,
)
from veratune.layers.few_rows import wrapped_linear
from veratune.layers.vectors import product_dtype
from veratune.layers.wrapper import VeraLayer, replace_modules
from veratune.serving.pool.backbone import at_backbone
from veratune.serving.pool.batch import AdapterBatch, BatchContext
from veratune.serving.pool.layers import PoolHead, PoolLayer, PoolLinear
from veratune.serving.pool.lease import Key, Lease
from veratune.serving.pool.lora_slots import LoraSlotGroup
from veratune.serving.pool.merged import MergedWeights
from veratune.serving.pool.slots import SlotGroup, VeraSlotGroup, check_linear, reserve
from veratune.targets import Site

GroupKey = tuple[object, ...]


@dataclasses.dataclass
class _Entry:
    group: SlotGroup[Any]
    slot: int
    task: Mapping[str, Any]
    pins: int = 0


@dataclasses.dataclass
class PoolStats:
    """Counts of a pool.

    Args:
        hits: Times that an adapter was in memory.
        loads: Times that it was loaded.
        evictions: Adapters that made room.
        load_seconds: Time in loading.
    """

    hits: int = 0
    loads: int = 0
    evictions: int = 0
    load_seconds: float = 0.0


class AdapterPool:
    """Adapters in slots over a model, whose layers it wraps until `close`.

    Adapters are known by keys, such as (tenant, name, version). One thread at a time may run the
    model; `acquire` and `Lease.release` may be called from others.

    Args:
        model: The base model.
        slots: Most adapters of each group.
        dtype: Dtype of the values in memory.
        max_bytes: Bound of the bytes of loaded adapters and frozen matrices; None: no bound.
        max_rank: Largest rank that is accepted; None: any.
        max_merged_bytes: Bound of W + ΔW of one adapter, which batches of it alone use, besides
            `max_bytes`; 0: none.

    Raises:
        ConfigError: `slots` is below 1.
        AdapterStateError: the model has adapters already.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int,
        *,
        dtype: torch.dtype = torch.float32,
        max_bytes: int | None = None,
        max_rank: int | None = None,
        max_merged_bytes: int = 0,
    ) -> None:
        if slots < 1:
            raise ConfigError(f"slots is {slots}; a pool wants at least 1")
        if any(isinstance(module, VeraLayer | PoolLayer) for module in model.modules()):
            raise AdapterStateError(
                "the model has adapters already; a pool wants the bare base model (veratune.detach)"
            )
        self.model, self.slots, self.dtype = model, slots, dtype
        self.max_bytes, self.max_rank = max_bytes, max_rank
        # The unwrapped model, to find layers and compare weights: own modules, the same tensors.
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.base_model: nn.Module = copy.deepcopy(model, tensors)
        self.stats = PoolStats()
        self.merged = MergedWeights(max_merged_bytes)
        self.context = BatchContext(self.merged)
        self._loaded_bytes = 0
        self._groups: dict[GroupKey, SlotGroup[Any]] = {}
        self._entries: collections.OrderedDict[Key, _Entry] = collections.OrderedDict()
        self._wrapped: dict[str, PoolLayer] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Return the number of adapters in memory."""
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    @property
    def bytes(self) -> int:
        """Bytes of the loaded adapters."""
        return self._loaded_bytes

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the frozen matrices of all groups; equal ones are shared and count once."""
        with self._lock:
            tensors = {id(t): t for group in self._groups.values() for t in group.frozen_tensors()}
            return sum(t.numel() * t.element_size() for t in tensors.values())

    @property
    def pinned(self) -> int:
        """Number of leases that were not released."""
        with self._lock:
            return sum(entry.pins for entry in self._entries.values())

    def check(self, adapter: Adapter) -> None:
        """Check that an adapter could be loaded.

        Raises:
            BaseModelError: it does not fit the model.
            BasisError: its principal directions are not those of the model's weights.
            UnsupportedError: it is too large for this pool, or adapts no linear layer.
        """
        adapter = at_backbone(self.base_model, adapter)
        sites = check_fits(self.base_model, adapter, head_shapes=False)
        check_linear(sites)
        self._check_size(adapter, sites)
        bind(self.base_model, adapter)

    def prepare(self, adapter: Adapter) -> Adapter:
        """Do the slow work of loading an adapter: names, and the directions of a principal basis.

        Any thread may call it, beside the one that runs the model.

        Returns:
            The adapter for `acquire`'s `load`.

        Raises:
            Exception: as `check`.
        """
        adapter = at_backbone(self.base_model, adapter)
        if adapter.config.basis == "principal":
            sites = check_fits(self.base_model, adapter, head_shapes=False)
            self._check_size(adapter, sites)
            adapter = bind(self.base_model, adapter)
            reserve(adapter.basis, self.model, sites)
        return adapter

    def acquire(self, key: Key | None, load: Callable[[], Adapter] | None = None) -> Lease:
        """Lease an adapter, which is loaded if it is not in memory.

        Args:
            key: Key of the adapter; None: the base model.
            load: Reads the adapter, checked.

        Raises:
            AdapterNotFoundError: the adapter is not in memory, and there is no `load`.
            BaseModelError: the adapter belongs to another base model.
            PoolFullError: every slot is in use.
            Exception: whatever `load` raises.
        """
        if key is None:
            return Lease(None, None, 0)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self.stats.hits += 1
                return self._lease(key, entry)
        if load is None:
            raise AdapterNotFoundError(
                f"no adapter {key!r} in the pool, and nothing to load it from"
            )
        start = time.perf_counter()
        # Without the lock: a slow store holds up no other request.
        adapter = self.prepare(load())
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:  # no other thread was faster
                entry = self._load(key, adapter)
                self.stats.loads += 1
                self.stats.load_seconds += time.perf_counter() - start
            return self._lease(key, entry)

    def drop(self, key: Key) -> bool:
        """Remove an adapter that no request uses; return whether it is absent now."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.pins:
                return False
            if entry is not None:
                self._remove(key)
            return True

    @contextlib.contextmanager
    def rows(self, leases: Sequence[Lease | None]) -> Iterator[None]:
        """Within the block, row i of a batch uses the adapter of leases[i]; None: the base model.

        Raises:
            AdapterStateError: a lease was released.
        """
        for lease in leases:
            if lease is not None and not lease.active:
                raise AdapterStateError(
                    f"the lease of adapter {lease.key!r} was given back; acquire it again"
                )
        device = next(self.model.parameters()).device
        before = self.context.set(AdapterBatch.of(leases, device))
        try:
            yield
        finally:
            self.context.set(before)

    def close(self) -> None:
        """Give the model its own layers back and remove all adapters."""
        with self._lock:
            replace_modules(
                self.model,
                lambda module: wrapped_linear(
                    module.base if isinstance(module, PoolLayer) else module
                ),
            )
            self._wrapped, self._groups = {}, {}
            self.merged.clear()
            self._entries.clear()
            self._loaded_bytes = 0

    def _lease(self, key: Key, entry: _Entry) -> Lease:
        self._entries.move_to_end(key)
        entry.pins += 1
        return Lease(key, entry.group, entry.slot, entry.task, self._unpin)

    def _unpin(self, lease: Lease) -> None:
        with self._lock:
            entry = self._entries.get(lease.key)
            if entry is not None and entry.group is lease.group and entry.slot == lease.slot:
                entry.pins -= 1

    def _load(self, key: Key, adapter: Adapter) -> _Entry:
        group = self._group_for(adapter)
        if not group.free:
            self._evict(group)
        self._make_room(group.bytes_per_slot, group)
        slot = group.free.pop()
        self.merged.forget(group, slot)
        try:
            group.write(slot, adapter)
        except BaseException:
            group.free.append(slot)
            raise
        entry = self._entries[key] = _Entry(group, slot, adapter.task)
        self._loaded_bytes += group.bytes_per_slot
        return entry

    def _make_room(self, size: int, keep: SlotGroup[Any] | None = None) -> None:
        """Free memory until `size` more bytes fit: groups without adapters, then idle adapters."""
        while (
            self.max_bytes is not None
            and self._loaded_bytes + self.frozen_bytes + size > self.max_bytes
        ):
            used = {id(entry.group) for entry in self._entries.values()} | {id(keep)}
            empty = next(
                (key for key, group in self._groups.items() if id(group) not in used), None
            )
            if empty is not None:
                del self._groups[empty]
            else:
                self._evict()

    def _evict(self, group: SlotGroup[Any] | None = None) -> None:
        """Remove the least recently used idle adapter, of one group or of all."""
        idle = next(
            (k for k, e in self._entries.items() if not e.pins and group in (None, e.group)), None
        )
        if idle is None:
            bound = f" or {self.max_bytes:,} bytes" if self.max_bytes is not None else ""
            raise PoolFullError(
                f"every adapter in memory is in use ({len(self._entries)} of them); wait, or give "
                f"the pool more than {self.slots} slots{bound}"
            )
        self._remove(idle)
        self.stats.evictions += 1

    def _remove(self, key: Key) -> None:
        entry = self._entries.pop(key)
        entry.group.clear(entry.slot)
        self.merged.forget(entry.group, entry.slot)
        entry.group.free.append(entry.slot)
        self._loaded_bytes -= entry.group.bytes_per_slot

    def _check_size(self, adapter: Adapter, sites: Sequence[Site]) -> int:
        """Return the bytes of an adapter's frozen matrices; raises UnsupportedError."""
        largest = max(adapter.ranks.values())
        if self.max_rank is not None and largest > self.max_rank:
            raise UnsupportedError(
                f"the adapter has rank {largest:,}; adapters of rank {self.max_rank:,} at most are "
                "taken here"
            )
        frozen = self._basis_of(adapter, sites).bytes_of(
            [(s.name, *s.shape, s.rank) for s in sites],
            product_dtype(next(self.model.parameters())),
        )
        vectors = adapter.trained_values * self.dtype.itemsize
        heads = sum(t.numel() * t.element_size() for t in adapter.head.values())
        size = frozen + vectors + heads
        if self.max_bytes is not None and size > self.max_bytes:
            raise UnsupportedError(
                f"the adapter and its frozen matrices take {size:,} bytes; "
                f"adapters have {self.max_bytes:,} here"
            )
        return frozen

    def _basis_of(self, adapter: Adapter, sites: Sequence[Site]) -> Basis:
        """The basis of an adapter; a principal one is neither compared nor computed."""
        if adapter.config.basis == "principal" and adapter.bound is None:
            return principal_basis(self.base_model, adapter.config, list(sites))
        return adapter.basis

    def _group_for(self, adapter: Adapter) -> SlotGroup[Any]:
        """Return the group of an adapter's kind; a new one wraps the layers that it needs."""
        adapter = bind(self.base_model, adapter)
        key = _group_key(adapter)
        group: SlotGroup[Any] | None = self._groups.get(key)
        if group is not None:
            check_weight_fingerprint(group.weight_fingerprint, adapter, base_id(self.model))
            return group
        sites = check_fits(self.base_model, adapter, head_shapes=False)
        frozen = self._check_size(adapter, sites)
        if isinstance(adapter.bound, LoraBasis):
            group = LoraSlotGroup(self.base_model, sites, self.slots, self.dtype)
        else:
            # Another group may hold the same matrices already.
            self._make_room(max(0, frozen - adapter.basis.allocated_bytes()))
            group = VeraSlotGroup(self.base_model, adapter, sites, self.slots, self.dtype)
        self._wrap(group)
        self._groups[key] = group
        return group

    def _wrap(self, group: SlotGroup[Any]) -> None:
        kinds: dict[str, type[PoolLayer]] = {
            **dict.fromkeys(group.layers, PoolLinear),
            **dict.fromkeys(group.head_of.values(), PoolHead),
        }
        new: dict[nn.Module, PoolLayer] = {}
        for path, kind in kinds.items():
            wrapped = self._wrapped.get(path)
            if wrapped is None:
                base = self.model.get_submodule(path)
                new[base] = kind(base, path, self.context)
            elif not isinstance(wrapped, kind):
                raise UnsupportedError(
                    f"'{path}' is a head of one adapter and adapted inside by another; "
                    "a pool serves one or the other"
                )
        replace_modules(self.model, lambda module: new.get(module, module))
        self._wrapped |= {layer.name: layer for layer in new.values()}


def _group_key(adapter: Adapter) -> GroupKey:
    """Return what adapters of one group have in common."""
    if isinstance(adapter.bound, LoraBasis):
        return (
            "lora",
            adapter.config.fused,
            *((*shape, adapter.ranks[k], k) for k, shape in adapter.shapes.items()),
        )
    head = tuple((name, tuple(t.shape), t.dtype) for name, t in sorted(adapter.head.items()))
    return (
        adapter.fingerprint,
        tuple(adapter.shapes.items()),
        tuple(adapter.ranks.values()),
        adapter.config.vectors,
        adapter.config.fused,
        head,
    )
