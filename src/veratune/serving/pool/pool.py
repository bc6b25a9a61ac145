"""AdapterPool: the adapters that are in memory over one base model, and which of them each row of a batch speaks with.

Adapters that have basis, layers and ranks in common slot_site one group: a row of values for each slot, d and b of every layer
one behind the other. Loading an adapter is one copy into a free row, and a mixed batch is two dense products and two
gathers a layer, however many tenants are in it:

    y = W x + b[slot] * (B (d[slot] * (A x)))

Slot 0 of every group is the bare base model. A slot in use is never written to: an update takes another one.
"""

import collections
import contextlib
import copy
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veratune.adapter import (
    Adapter,
    base_id,
    bind,
    check_fits,
    check_weight_fingerprint,
)
from veratune.basis.basis import Basis
from veratune.errors import (
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    PoolFullError,
    ShapeError,
    UnsupportedError,
)
from veratune.fingerprint import weight_fingerprint
from veratune.layers.linear import add_to_parts
from veratune.layers.vectors import product_dtype
from veratune.layers.wrapper import ModuleWrapper, VeraLayer, replace_modules
from veratune.ops.matrix import Matrix, cache_key, matmul
from veratune.ops.rows import vera_rows
from veratune.targets import Site, find_heads

Key = Hashable
_GATHERED = 4  # batches whose values a group keeps: those of the rows that answer, and of some whose prompts are read


@dataclasses.dataclass
class Lease:
    """An adapter that stays in its slot until it is given back. group: None for the bare base model, whose slot is 0; task: what the adapter is
    for (see `Adapter`).
    """

    pool: "AdapterPool"
    key: Key | None
    group: "SlotGroup | None"
    slot: int
    task: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    active: bool = True

    def release(self) -> None:
        """Give the slot back; a second call does nothing."""
        self.pool.release(self)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()


@dataclasses.dataclass(frozen=True)
class SlotSite:
    """What a group has at one site: its basis, and where d and b stand in a slot's row (None: they stand for ones)."""

    site: Site
    basis: Basis
    d: slice | None
    b: slice | None
    pairs: dict[torch.dtype, tuple[Matrix, Matrix]] = dataclasses.field(default_factory=dict)

    @property
    def scale(self) -> float:
        return self.basis.scale(self.site.rank, self.site.part.in_features)

    def pair(self, device: torch.device, dtype: torch.dtype) -> tuple[Matrix, Matrix]:
        """(A, B) in the dtype of the products."""
        if dtype not in self.pairs:
            self.pairs[dtype] = self.basis.pair(
                self.site.name, *self.site.shape, self.site.rank, device, dtype
            )
        return self.pairs[dtype]


class SlotGroup:
    """The slots of adapters that differ in their values alone.

    values: (slots + 1, all values of one adapter), row 0 the bare model's; heads: tensors of modules trained in full, by name,
    one for each slot.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        sites: Sequence[Site],
        slots: int,
        dtype: torch.dtype,
    ) -> None:
        device = next(model.parameters()).device
        self.basis = basis = adapter.basis
        basis.reserve(
            [(s.name, *s.shape, s.rank) for s in sites],
            device,
            product_dtype(next(model.parameters())),
        )
        self.weight_fingerprint = weight_fingerprint(model, list(sites))
        self.layers: dict[str, list[SlotSite]] = {}
        self.order: list[tuple[str, str]] = []
        at = 0
        for site in sites:
            if site.part.kernel:
                raise UnsupportedError(
                    f"layer '{site.name}' is a convolution; a pool serves adapters of linear layers"
                )
            places: dict[str, slice | None] = {"d": None, "b": None}
            for kind, size, vectors in (
                ("d", site.rank, adapter.d),
                ("b", site.shape[0], adapter.b),
            ):
                if vectors:
                    places[kind] = slice(at, at + size)
                    self.order.append((kind, site.name))
                    at += size
            self.layers.setdefault(site.module, []).append(
                SlotSite(site, basis, places["d"], places["b"])
            )
        for slot_sites in self.layers.values():
            slot_sites.sort(key=lambda slot_site: slot_site.site.part.start)
        self.values = _slots(slots, (at,), dtype, device)
        self.scales = torch.ones(at, device=device)
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
            name: _slots(slots, t.shape, t.dtype, device) for name, t in adapter.head.items()
        }
        self.free = list(range(slots, 0, -1))

    @property
    def head_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the heads' tensors: rows of one batch have them in common."""
        return tuple(tuple(t.shape[1:]) for t in self.heads.values())

    @property
    def bytes_of_slot(self) -> int:
        """Bytes of one adapter."""
        return sum(t[0].numel() * t.element_size() for t in (self.values, *self.heads.values()))

    def write(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter's values into a slot that nobody uses."""
        row = torch.cat(
            [(adapter.d if kind == "d" else adapter.b)[layer] for kind, layer in self.order]
        )
        self._gathered.clear()
        self.values[slot].copy_(row)
        for name, tensors in self.heads.items():
            tensors[slot].copy_(adapter.head[name])

    def gather(self, slots: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """(rows, all values of one adapter) of the rows' slots, d times its layer's scale, in the dtype of the products.

        Kept from one step to the next: slots in use are not written to, and `write` forgets what was kept.
        """
        found = self._gathered.get((slots, dtype))
        if found is None:
            own = self.values.index_select(0, torch.tensor(slots, device=self.values.device))
            found = (own * self.scales).to(dtype)
            if len(self._gathered) >= _GATHERED:
                self._gathered.clear()
            self._gathered[slots, dtype] = found
        return found


@dataclasses.dataclass
class _Entry:
    group: SlotGroup
    slot: int
    task: Mapping[str, Any]
    pins: int = 0


@dataclasses.dataclass(frozen=True)
class _Batch:
    """The rows of a batch by group: their numbers, or None where one group has all of them, and a slot for each."""

    size: int
    of: list[tuple[SlotGroup, Tensor | None, tuple[int, ...]]]
    heads: list[tuple[SlotGroup, int, list[int]]]


@dataclasses.dataclass
class PoolStats:
    """What a pool did. hits, loads: of `acquire`; load_seconds: spent in loading; evictions: slots that made room."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0
    load_seconds: float = 0.0


class AdapterPool:
    """At most `slots` adapters of each kind over a model whose layers it wraps until `close`.

    Adapters are known by keys, such as (tenant, version). One thread at a time may run the model; `acquire` and `release` may come
    from others.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int,
        *,
        dtype: torch.dtype = torch.float32,
        max_bytes: int | None = None,
        max_rank: int | None = None,
    ) -> None:
        """slots: of each group, slot 0 apart; dtype: of the values in memory; limit: bytes of the slots that are filled and of the frozen
        matrices of all groups together, or None; max_rank: the largest rank that is taken, or None.

        Raises ConfigError, or AdapterStateError for a model that has adapters of its own.
        """
        if slots < 1:
            raise ConfigError(f"slots is {slots}; a pool wants at least 1")
        if any(isinstance(module, VeraLayer | PoolLayer) for module in model.modules()):
            raise AdapterStateError(
                "the model has adapters already; a pool wants the bare base model (veratune.detach)"
            )
        self.model, self.slots, self.dtype, self.max_bytes, self.max_rank = (
            model,
            slots,
            dtype,
            max_bytes,
            max_rank,
        )
        self._filled = 0  # bytes
        # The model as it came, for finding layers and comparing weights while the other one runs: modules of its own, the same tensors.
        self.base_model: nn.Module = copy.deepcopy(
            model, {id(t): t for t in (*model.parameters(), *model.buffers())}
        )
        self.stats = PoolStats()
        self.batch: _Batch | None = None
        self._groups: dict[tuple[Any, ...], SlotGroup] = {}
        self._entries: collections.OrderedDict[Key, _Entry] = collections.OrderedDict()
        self._wrapped: dict[str, PoolLayer] = {}
        self._lock = threading.RLock()
        self._projected: tuple[Tensor, tuple[Any, ...], Tensor] | None = None

    def __len__(self) -> int:
        """Adapters in memory."""
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    @property
    def bytes(self) -> int:
        """Bytes of the slots that are filled."""
        return self._filled

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the frozen matrices of all groups, which slot_site those that are equal."""
        with self._lock:
            return sum(
                basis.allocated_bytes()
                for basis in {id(p.basis): p.basis for p in self._groups.values()}.values()
            )

    def check(self, adapter: Adapter) -> None:
        """Raise BaseModelError for an adapter that does not fit the model, UnsupportedError for one that is too large for this pool."""
        self._check_size(adapter, check_fits(self.base_model, adapter, head_shapes=False))

    def acquire(self, key: Key | None, load: Callable[[], Adapter] | None = None) -> Lease:
        """A lease of an adapter, loaded if it is not in memory. key None: the bare base model.

        load: gives the adapter's file, checked. Raises what it raises, BaseModelError for an adapter of another model,
        PoolFullError where every slot is in use, AdapterNotFoundError for a key that is not in memory without `load`.
        """
        if key is None:
            return Lease(self, None, None, 0)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self.stats.hits += 1
                self._entries.move_to_end(key)
                entry.pins += 1
                return Lease(self, key, entry.group, entry.slot, entry.task)
        if load is None:
            raise AdapterNotFoundError(
                f"no adapter {key!r} in the pool, and nothing to load it from"
            )
        start = time.perf_counter()
        adapter = load()  # without the lock: a slow store holds up nobody else
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:  # nobody was faster
                entry = self._place(key, adapter)
                self.stats.loads += 1
                self.stats.load_seconds += time.perf_counter() - start
            self._entries.move_to_end(key)
            entry.pins += 1
            return Lease(self, key, entry.group, entry.slot, entry.task)

    def release(self, lease: Lease) -> None:
        """End a lease; the adapter stays in memory until its slot is wanted."""
        with self._lock:
            if lease.active and lease.key is not None:
                self._entries[lease.key].pins -= 1
            lease.active = False

    def drop(self, key: Key) -> bool:
        """Forget an adapter that nobody uses now. Returns whether it is gone (or was not there)."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.pins:
                return False
            if entry is not None:
                self._free(key)
            return True

    @contextlib.contextmanager
    def rows(self, leases: Sequence[Lease | None]) -> Iterator[None]:
        """Within the block, row i of a batch speaks with the adapter of leases[i]; None is the bare base model.

        Raises AdapterStateError for a lease that was given back.
        """
        for lease in leases:
            if lease is not None and not lease.active:
                raise AdapterStateError(
                    f"the lease of adapter {lease.key!r} was given back; acquire it again"
                )
        device = next(self.model.parameters()).device
        groups = list(
            dict.fromkeys(
                lease.group for lease in leases if lease is not None and lease.group is not None
            )
        )
        found: list[tuple[SlotGroup, Tensor | None, tuple[int, ...]]] = []
        heads: list[tuple[SlotGroup, int, list[int]]] = []
        for group in groups:
            own = [
                (i, lease.slot)
                for i, lease in enumerate(leases)
                if lease is not None and lease.group is group
            ]
            if (
                len(groups) == 1
            ):  # rows of nobody take slot 0, which costs less than to leave them out
                found.append(
                    (group, None, tuple(lease.slot if lease is not None else 0 for lease in leases))
                )
            else:
                at, slots = zip(*own, strict=True)
                found.append((group, torch.tensor(at, device=device), slots))
            if group.heads:
                by_slot: dict[int, list[int]] = {}
                for i, slot in own:
                    by_slot.setdefault(slot, []).append(i)
                heads += [(group, slot, at_) for slot, at_ in by_slot.items()]
        before, self.batch = self.batch, _Batch(len(leases), found, heads)
        try:
            yield
        finally:
            self.batch, self._projected = before, None

    def project(self, x: Tensor, A: Matrix) -> Tensor:
        """A x, once for the layers that read the same x one after the other: query, key and value."""
        last = self._projected
        version = 0 if x.is_inference() else x._version
        key = (version, *cache_key(A))
        if last is not None and last[0] is x and last[1] == key:
            return last[2]
        product = matmul(A, x)
        if not x.is_inference():  # writes to x could not be told
            self._projected = (x, key, product)
        return product

    def close(self) -> None:
        """Give the model its own layers back and forget all adapters."""
        with self._lock:
            replace_modules(
                self.model, lambda module: module.base if isinstance(module, PoolLayer) else module
            )
            self._wrapped, self._groups = {}, {}
            self._entries.clear()
            self._filled = 0

    def _place(self, key: Key, adapter: Adapter) -> _Entry:
        group = self._group_for(adapter)
        if not group.free:
            self._evict(group)
        self._make_room(group.bytes_of_slot, group)
        slot = group.free.pop()
        try:
            group.write(slot, adapter)
        except BaseException:
            group.free.append(slot)
            raise
        entry = self._entries[key] = _Entry(group, slot, adapter.task)
        self._filled += group.bytes_of_slot
        return entry

    def _make_room(self, size: int, keep: SlotGroup | None = None) -> None:
        """Forget what nobody uses until so many bytes more fit: groups without adapters, then the adapters that were used longest ago."""
        while (
            self.max_bytes is not None and self._filled + self.frozen_bytes + size > self.max_bytes
        ):
            used = {id(entry.group) for entry in self._entries.values()} | {id(keep)}
            empty = next(
                (kind for kind, group in self._groups.items() if id(group) not in used), None
            )
            if empty is not None:
                del self._groups[empty]
            else:
                self._evict()

    def _evict(self, group: SlotGroup | None = None) -> None:
        """Forget the adapter that was used longest ago, of one group or of all. Raises PoolFullError where all are in use."""
        idle = next(
            (k for k, e in self._entries.items() if not e.pins and group in (None, e.group)), None
        )
        if idle is None:
            raise PoolFullError(
                f"every adapter in memory is in use ({len(self._entries)} of them); wait, or give the pool more than {self.slots} slots"
                + (f" or {self.max_bytes:,} bytes" if self.max_bytes is not None else "")
            )
        self._free(idle)
        self.stats.evictions += 1

    def _free(self, key: Key) -> None:
        entry = self._entries.pop(key)
        entry.group.free.append(entry.slot)
        self._filled -= entry.group.bytes_of_slot

    def _check_size(self, adapter: Adapter, sites: Sequence[Site]) -> int:
        """Bytes of an adapter's frozen matrices. Raises UnsupportedError."""
        largest = max(adapter.ranks.values())
        if self.max_rank is not None and largest > self.max_rank:
            raise UnsupportedError(
                f"the adapter has rank {largest:,}; adapters of rank {self.max_rank:,} at most are taken here"
            )
        size = adapter.basis.bytes_of(
            [(s.name, *s.shape, s.rank) for s in sites],
            product_dtype(next(self.model.parameters())),
        )
        own = (
            size
            + adapter.trained_values * self.dtype.itemsize
            + sum(t.numel() * t.element_size() for t in adapter.head.values())
        )
        if self.max_bytes is not None and own > self.max_bytes:
            raise UnsupportedError(
                f"the adapter and its frozen matrices take {own:,} bytes; adapters have {self.max_bytes:,} here"
            )
        return size

    def _group_for(self, adapter: Adapter) -> SlotGroup:
        adapter = bind(self.base_model, adapter)
        config = adapter.config
        head = tuple((name, tuple(t.shape), t.dtype) for name, t in sorted(adapter.head.items()))
        kind = (
            adapter.fingerprint,
            tuple(adapter.shapes.items()),
            tuple(adapter.ranks.values()),
            config.vectors,
            config.fused,
            head,
        )
        group = self._groups.get(kind)
        if group is not None:
            check_weight_fingerprint(group.weight_fingerprint, adapter, base_id(self.model))
            return group
        sites = check_fits(self.base_model, adapter, head_shapes=False)
        self._make_room(
            max(0, self._check_size(adapter, sites) - adapter.basis.allocated_bytes())
        )  # another group may have them already
        group = SlotGroup(self.base_model, adapter, sites, self.slots, self.dtype)
        kinds = dict.fromkeys(group.layers, PoolLinear) | dict.fromkeys(
            group.head_of.values(), PoolHead
        )
        made: dict[nn.Module, PoolLayer] = {}
        for path, own in kinds.items():
            known = self._wrapped.get(path)
            if known is None:
                base = self.model.get_submodule(path)
                made[base] = own(base, path, self)
            elif not isinstance(known, own):
                raise UnsupportedError(
                    f"'{path}' is a head of one adapter and adapted inside by another; a pool serves one or the other"
                )
        replace_modules(self.model, lambda module: made.get(module, module))
        self._wrapped |= {layer.name: layer for layer in made.values()}
        self._groups[kind] = group
        return group


class PoolLayer(ModuleWrapper):
    """The module that stands where a layer stood."""

    def __init__(self, base: nn.Module, name: str, pool: AdapterPool) -> None:
        super().__init__(base, name)
        self.pool = pool

    def _check(self, rows: int) -> _Batch | None:
        batch: _Batch | None = self.pool.batch
        if batch is not None and batch.size != rows:
            raise ShapeError(
                f"layer '{self.name}' got a batch of {rows} rows; rows() named {batch.size} adapters"
            )
        return batch


class PoolLinear(PoolLayer):
    """y = W x + scale * b[slot] * (B (d[slot] * (A x))) for the rows that have an adapter here."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        batch = self._check(x.shape[0])
        if batch is None:
            return y
        for group, at, slots in batch.of:
            slot_sites = group.layers.get(self.name)
            if slot_sites is None:
                continue
            own = x if at is None else x.index_select(0, at)
            made = [
                (slot_site.site.part, self._update(group, slot_site, own, slots))
                for slot_site in slot_sites
            ]
            if at is not None:
                made = [
                    (
                        part,
                        slot_site.new_zeros(*y.shape[:-1], slot_site.shape[-1]).index_copy(
                            0, at, slot_site
                        ),
                    )
                    for part, slot_site in made
                ]
            y = add_to_parts(y, made)
        return y

    def _update(
        self, group: SlotGroup, slot_site: SlotSite, x: Tensor, slots: tuple[int, ...]
    ) -> Tensor:
        dtype = product_dtype(x)
        A, B = slot_site.pair(x.device, dtype)
        own = group.gather(slots, dtype)
        d, b = (None if where is None else own[:, where] for where in (slot_site.d, slot_site.b))
        z = self.pool.project(x if x.dtype == dtype else x.to(dtype), A)
        return vera_rows(x, A, B, d, b, None, slot_site.scale if d is None else 1.0, projected=z)


class PoolHead(PoolLayer):
    """A module that adapters bring whole: one call for each of them in the batch. All rows of a batch have heads of one width."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch = self._check(x.shape[0])
        mine = (
            []
            if batch is None
            else [entry for entry in batch.heads if self.name in entry[0].head_of.values()]
        )
        if not mine:
            return self.base(x, *args, **kwargs)
        named = {i for _, _, at in mine for i in at}
        pieces, order = [], []
        others = [i for i in range(x.shape[0]) if i not in named]
        if others:
            pieces.append(self.base(x[others], *args, **kwargs))
            order += others
        for group, slot, at in mine:
            own = {
                name.removeprefix(f"{self.name}."): t[slot]
                for name, t in group.heads.items()
                if group.head_of[name] == self.name
            }
            pieces.append(torch.func.functional_call(self.base, own, (x[at], *args), kwargs))
            order += at
        return torch.cat(pieces)[torch.tensor(order, device=x.device).argsort()]


def _slots(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for `count` slots, and slot 0 of zeros. What is not filled is never read, and on a CPU takes no memory before it is."""
    made = torch.empty(count + 1, *shape, dtype=dtype, device=device)
    made[0].zero_()
    return made
