"""Inspect an adapter: figures per layer, and a plot of them."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veratune.adapter import Adapter
from veratune.errors import OutputError


@dataclasses.dataclass(frozen=True)
class LayerFigures:
    """One adapted matrix: its size m x n, rank, the norms |d| and |b|, and the mean absolute value
    of b.
    """

    layer: str
    out_features: int
    in_features: int
    rank: int
    d_norm: float | None
    b_norm: float | None
    b_mean: float | None


def figures(adapter: Adapter) -> list[LayerFigures]:
    """Figures of each layer, blocks in the order of their numbers; None for a vector that is not
    trained.
    """
    out = []
    for layer in sorted(adapter.shapes, key=_natural):
        m, n = adapter.shapes[layer]
        d, b = adapter.d.get(layer), adapter.b.get(layer)
        mean = None if b is None else b.float().abs().mean().item()
        out.append(LayerFigures(layer, m, n, adapter.ranks[layer], _norm(d), _norm(b), mean))
    return out


def summary(adapter: Adapter) -> dict[str, Any]:
    """An adapter's settings and figures as JSON types."""
    return {
        "config": adapter.config.to_dict(),
        "task": dict(adapter.task),
        "base": adapter.base_id,
        "basis": adapter.fingerprint,
        "trainable": adapter.trained_values,
        "head": sum(t.numel() for t in adapter.head.values()),
        "layers": [dataclasses.asdict(entry) for entry in figures(adapter)],
    }


def plot(adapter: Adapter, path: str | Path) -> None:
    """Draw |d| and |b| by layer, one line for each kind of projection, into an image file.

    Source of the measure: VeRA, arXiv 2310.11454, figure 3 (there, d alone). Raises OutputError.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    series: dict[str, list[tuple[int, LayerFigures]]] = {}
    for position, entry in enumerate(figures(adapter)):
        block = re.search(r"\.(\d+)\.", f".{entry.layer}.")
        kind = re.split(r"[.:]", entry.layer)[-1]
        series.setdefault(kind, []).append((int(block.group(1)) if block else position, entry))
    figure, axes = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for axis, name, title in zip(axes, ("d_norm", "b_norm"), ("|d|", "|b|"), strict=True):
        for kind, entries in series.items():
            points = [
                (block, getattr(entry, name))
                for block, entry in entries
                if getattr(entry, name) is not None
            ]
            if points:
                axis.plot(
                    *zip(*points, strict=True), marker="o", markersize=4, linewidth=1.5, label=kind
                )
        axis.set_ylabel(f"{title} (L2 norm)")
        axis.grid(alpha=0.3)
        axis.set_ylim(bottom=0)
        if not axis.lines:
            axis.text(0.5, 0.5, f"{title[1]} is not trained", transform=axis.transAxes, ha="center")
    drawn = next(axis for axis in axes if axis.lines)
    drawn.legend(title="projection", ncols=min(4, len(series)), fontsize="small")
    axes[1].set_xlabel("block")
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    config = adapter.config
    axes[0].set_title(
        f"Trained vectors by block: rank {config.rank}, {len(adapter.shapes)} layers, d starts at "
        f"{config.start_d:g}"
    )
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: the picture could not be written: {error}") from error
    finally:
        pyplot.close(figure)


def _natural(layer: str) -> list[tuple[int, str]]:
    """A sort key by which block 2 comes before block 10."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"[.:]", layer)]


def _norm(vector: Tensor | None) -> float | None:
    return None if vector is None else torch.linalg.vector_norm(vector.float()).item()
