"""Pictures and tables of a fleet's run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from veratune.errors import VeratuneError
from veratune.training.fleet.worker import Source

_MAPPED = 2000  # adapters in the map; a larger fleet is sampled evenly


def draw_scores(lines: Sequence[dict[str, Any]], metric: str, path: Path) -> Path | None:
    """Scores per tenant before and after training, sorted by the score after; None without
    scores.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scored = [line for line in lines if metric in line.get("after", {})]
    if not scored:
        return None
    scored.sort(key=lambda line: line["after"][metric])
    after = np.array([line["after"][metric] for line in scored])
    before = np.array([line["before"].get(metric, np.nan) for line in scored])
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    places = np.arange(len(scored))
    left.plot(places, before, ".", markersize=3, color="0.6", label="before")
    left.plot(places, after, ".", markersize=3, color="tab:blue", label="after")
    for i in {0, len(scored) - 1}:
        left.annotate(
            scored[i]["tenant"],
            (places[i], after[i]),
            fontsize=8,
            xytext=(4, 4),
            textcoords="offset points",
            ha="left" if i == 0 else "right",
        )
    left.set(xlabel="tenants, sorted by score after training", ylabel=metric)
    left.legend()
    edges = np.histogram_bin_edges(np.concatenate([before[~np.isnan(before)], after]), bins=30)
    right.hist(before, edges, color="0.7", label=f"before, mean {np.nanmean(before):.3f}")
    right.hist(after, edges, color="tab:blue", alpha=0.7, label=f"after, mean {after.mean():.3f}")
    right.set(xlabel=metric, ylabel="tenants")
    right.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def draw_map(
    source: Source,
    tenants: Sequence[str],
    path: Path,
    scores: dict[str, float] | None = None,
    label: str = "",
) -> Path | None:
    """A 2-d map of adapters: the two main components of their trained d (without d: of b).

    All tenants of a fleet share one basis, so their vectors are comparable number by number.
    None for fewer than three adapters.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, names = [], []
    for name in tenants[:: -(-len(tenants) // _MAPPED) or 1]:
        try:
            adapter = source.get(name)
        except VeratuneError:
            continue  # reported by whoever uses it; a picture goes on without it
        if adapter is None:
            continue
        vectors = adapter.d or adapter.b
        rows.append(torch.cat([v.float() for v in vectors.values()]))
        names.append(name)
    if len(rows) < 3:
        return None
    stacked = torch.stack(rows)
    centred = stacked - stacked.mean(0)
    _, _, directions = torch.pca_lowrank(centred, q=2, center=False)
    places = (centred @ directions).numpy()
    figure, axes = pyplot.subplots(figsize=(6, 5), layout="constrained")
    colours = None if scores is None else [scores.get(name, np.nan) for name in names]
    if colours is None:
        axes.scatter(places[:, 0], places[:, 1], s=9)
    else:
        drawn = axes.scatter(places[:, 0], places[:, 1], s=9, c=colours, cmap="viridis")
        figure.colorbar(drawn, label=label)
    if len(names) <= 40:
        for name, place in zip(names, places, strict=True):
            axes.annotate(name, place, fontsize=7)
    axes.set(xlabel="first component", ylabel="second component", title="Adapters by their vectors")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path
