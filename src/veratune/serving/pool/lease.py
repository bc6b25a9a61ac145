"""Lease: an adapter that stays in its slot while a request uses it."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from types import TracebackType
from typing import Any

from veratune.serving.pool.slots import SlotGroup

Key = Hashable  # of an adapter, such as (tenant, name, version)


@dataclasses.dataclass
class Lease:
    """An adapter that stays in its slot until `release`.

    Args:
        key: Key of the adapter; None: the base model.
        group: Where its slot is; None: the base model.
        slot: Number of the slot; 0: the base model.
        task: What the adapter is for (see `Adapter.task`).
        on_release: Unpins the slot.
        active: Whether it was not released yet.
    """

    key: Key | None
    group: SlotGroup[Any] | None
    slot: int
    task: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    on_release: Callable[["Lease"], None] | None = None
    active: bool = True

    def release(self) -> None:
        """Give the slot back; a second call does nothing."""
        if self.active:
            self.active = False
            if self.on_release is not None:
                self.on_release(self)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
