"""VectorLayout: where the trained vectors of one adapter stand in a row of a stacked tensor.

Adapters that share their sites, ranks and basis differ only in numbers. Stacked, they are one
tensor of shape (adapters, values), and a mixed batch gathers its rows.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from veratune.config import VeraConfig
from veratune.targets import Site


@dataclasses.dataclass(frozen=True)
class VectorSlices:
    """The slices of one site in a row. None: the adapter does not train that vector, which is all
    ones.
    """

    site: Site
    d: slice | None
    b: slice | None


class VectorLayout:
    """The layout of one row: d and b of every site, one behind the other.

    Attributes:
        sites: The slices of each site, by site name, in the model's order.
        size: Values per row.
    """

    def __init__(self, sites: Sequence[Site], config: VeraConfig) -> None:
        self.sites: dict[str, VectorSlices] = {}
        self._entries: list[tuple[str, str, int]] = []
        self.size = 0
        for site in sites:
            d = self._reserve("d", site.name, site.rank) if config.vectors != "b" else None
            b = self._reserve("b", site.name, site.shape[0]) if config.vectors != "d" else None
            self.sites[site.name] = VectorSlices(site, d, b)
        self._start = (config.start_d, config.start_b)

    def _reserve(self, kind: str, name: str, size: int) -> slice:
        start = self.size
        self.size += size
        self._entries.append((kind, name, size))
        return slice(start, self.size)

    def initial(self) -> Tensor:
        """A row at the start of training, shape (size,): ΔW = 0."""
        d, b = self._start
        return torch.cat(
            [torch.full((size,), d if kind == "d" else b) for kind, _, size in self._entries]
        )

    def pack(self, d: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Tensor:
        """The vectors of one adapter as a row, shape (size,), in float32."""
        return torch.cat(
            [(d if kind == "d" else b)[name].float() for kind, name, _ in self._entries]
        )

    def unpack(self, row: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The inverse of `pack`: (d, b) by site name, as copies."""
        vectors: dict[str, dict[str, Tensor]] = {"d": {}, "b": {}}
        parts = row[: self.size].split([size for _, _, size in self._entries])
        for (kind, name, _), part in zip(self._entries, parts, strict=True):
            vectors[kind][name] = part.clone()
        return vectors["d"], vectors["b"]

    def split(self, rows: Tensor) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """(d, b) of every site for several rows: (k, size) gives d (k, r) and b (k, m), as views.

        One `split` has one concatenation as its backward; slicing per site would write the whole
        gradient once per site.
        """
        parts = iter(rows[:, : self.size].split([size for _, _, size in self._entries], dim=1))
        return {
            name: (
                next(parts) if slices.d is not None else None,
                next(parts) if slices.b is not None else None,
            )
            for name, slices in self.sites.items()
        }

    def is_b(self) -> Tensor:
        """Which values of a row belong to a b, shape (size,), boolean."""
        return torch.cat([torch.full((size,), kind == "b") for kind, _, size in self._entries])
