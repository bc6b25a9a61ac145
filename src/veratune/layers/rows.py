"""Mixed batches: which adapter each row uses, and how rows are grouped, computed and put back."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from veratune.errors import AdapterError, ShapeError

if TYPE_CHECKING:
    from veratune.layers.wrapper import VeraLayer

K = TypeVar("K", bound=Hashable)


def group_by_key(keys: Iterable[K]) -> dict[K, list[int]]:
    """Positions of each key, keys in the order of their first appearance.

    >>> group_by_key(["alice", None, "alice"])
    {'alice': [0, 2], None: [1]}
    """
    groups: dict[K, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return groups


def scatter_rows(update: Tensor, index: Tensor | None, batch: int) -> Tensor:
    """Rows of a group at their positions in a batch, zeros elsewhere; index None: all rows."""
    if index is None:
        return update
    return update.new_zeros(batch, *update.shape[1:]).index_copy(0, index, update)


class Rows:
    """Adapter of each row of a batch; None is the bare base model."""

    def __init__(self, names: Iterable[str | None]) -> None:
        self.names = tuple(names)

    def positions(self, batch: int, layer: str) -> dict[str, list[int]]:
        """Rows of each adapter in a batch that may repeat every row (beams, windows, tokens).

        Rows of the base model are left out.

        Raises:
            ShapeError: the batch is no multiple of the rows.
        """
        repeat, left = divmod(batch, len(self.names))
        if left or not repeat:
            raise ShapeError(
                f"layer '{layer}' got a batch of {batch} rows; rows() named {len(self.names)} "
                "adapters, so that many rows or a multiple of it is wanted"
            )
        groups = group_by_key(name for name in self.names for _ in range(repeat))
        return {name: positions for name, positions in groups.items() if name is not None}


def run_by_adapter(
    layer: "VeraLayer",
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    module_of: Callable[[str | None], Callable[..., Any]],
) -> Any:
    """Run a mixed batch in one call for each adapter, and put the rows back in their order.

    Args:
        layer: The layer, in a `rows` block.
        args: Its arguments; tensors whose dimension 0 is the batch are split, all else is passed
            on.
        kwargs: Its keyword arguments, likewise.
        module_of: Returns the callable of an adapter; None is the base.

    Returns:
        What the base layer returns: a tensor, or a tuple of tensors.

    Raises:
        AdapterError: no argument is a tensor, so that the batch is unknown.
        ShapeError: the batch is no multiple of the rows.
    """
    assert layer.rows is not None
    first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
    if first is None:
        raise AdapterError(
            f"layer '{layer.name}' was called without a tensor; rows() cannot tell its batch"
        )
    batch = first.shape[0]
    results, order = [], []
    groups: dict[str | None, list[int]] = {}
    groups.update(layer.rows.positions(batch, layer.name))
    named = {i for positions in groups.values() for i in positions}
    rest = [i for i in range(batch) if i not in named]
    for name, positions in (groups | ({None: rest} if rest else {})).items():
        index = torch.tensor(positions, device=first.device)

        def pick(value: Any, index: Tensor = index) -> Any:
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
                return value.index_select(0, index)
            return value

        results.append(module_of(name)(*map(pick, args), **{k: pick(v) for k, v in kwargs.items()}))
        order.extend(positions)
    restore = torch.tensor(order, device=first.device).argsort()

    def join(pieces: list[Tensor | None]) -> Tensor | None:
        tensors = [piece for piece in pieces if piece is not None]
        return torch.cat(tensors).index_select(0, restore) if tensors else None

    if isinstance(results[0], tuple):
        return tuple(join(list(pieces)) for pieces in zip(*results, strict=True))
    return join(results)
