"""Pictures of what a model does, as PNG files: confusion matrices, grids of images, boxes,
curves.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib import ticker

_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf")


def draw_confusion(counts: np.ndarray, labels: Sequence[str], path: Path) -> Path:
    """A confusion matrix (true classes in rows, guesses in columns), each row in shares of its
    class. Returns the path.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(labels) <= 20
    side = max(4.0, 0.55 * len(labels)) if few else 9.0
    figure, axes = plt.subplots(figsize=(side + 1.2, side))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(
        xlabel="guess",
        ylabel="class",
        title=f"accuracy {np.trace(counts) / max(counts.sum(), 1):.1%}",
    )
    if few:
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        for (i, j), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    j,
                    i,
                    str(count),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if shares[i, j] > 0.5 else "black",
                )
    return _save(figure, path)


def draw_grid(rows: Mapping[str, Sequence[Image.Image]], path: Path, zoom: int = 1) -> Path:
    """Images in rows, each with its name on the left. zoom: pixels drawn for each pixel. Returns
    the path.
    """
    lists = {
        name: [
            im.resize((im.width * zoom, im.height * zoom), Image.Resampling.NEAREST) for im in ims
        ]
        for name, ims in rows.items()
    }
    font = ImageFont.load_default(13)
    margin = max((int(font.getlength(name)) for name in lists if name), default=0) + 12
    width = max(sum(im.width + 2 for im in ims) for ims in lists.values())
    heights = [max(im.height for im in ims) + 2 for ims in lists.values()]
    sheet = Image.new("RGB", (margin + width, sum(heights)), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for (name, images), height in zip(lists.items(), heights, strict=True):
        pen.text((6, top + height // 2 - 8), name, "black", font)
        left = margin
        for image in images:
            sheet.paste(image, (left, top))
            left += image.width + 2
        top += height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def with_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    classes: Sequence[int],
    names: Sequence[str],
    scores: Sequence[float] | None = None,
) -> Image.Image:
    """An image with boxes (x0, y0, x1, y1 in pixels) in the colours of their classes."""
    out = image.convert("RGB")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(max(10, out.width // 40))
    for i, (box, kind) in enumerate(zip(boxes, classes, strict=True)):
        colour = _COLOURS[kind % len(_COLOURS)]
        pen.rectangle([float(v) for v in box], outline=colour, width=max(1, out.width // 250))
        text = names[kind] if scores is None else f"{names[kind]} {scores[i]:.2f}"
        pen.text((float(box[0]) + 2, float(box[1]) + 1), text, colour, font)
    return out


def draw_against(
    points: Mapping[str, Sequence[tuple[float, float, str]]],
    path: Path,
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> Path:
    """One mark for each (x, y, group), x on a logarithmic scale: a colour for each method, a shape
    for each group. Returns the path.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    groups = list(dict.fromkeys(group for marks in points.values() for _, _, group in marks))
    for i, (name, marks) in enumerate(points.items()):
        for x, y, group in marks:
            shape = "os^Dv"[groups.index(group) % 5]
            axes.plot(x, y, shape, color=_COLOURS[i % len(_COLOURS)], markersize=7, alpha=0.8)
        axes.plot([], [], "o", label=name, color=_COLOURS[i % len(_COLOURS)])
    for i, group in enumerate(groups if len(groups) > 1 else []):
        axes.plot([], [], "os^Dv"[i % 5], label=group, color="none", markeredgecolor="black")
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
    places = [x for marks in points.values() for x, _, _ in marks]
    axes.xaxis.set_major_locator(
        ticker.LogLocator(subs=(1, 2, 5) if max(places) < 300 * max(min(places), 1) else (1,))
    )
    axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    return _save(figure, path)


def draw_lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log: bool = False,
) -> Path:
    """One line with marks for each name, through its (x, y); log: x on a logarithmic scale. Returns
    the path.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for i, (name, points) in enumerate(series.items()):
        axes.plot(
            *zip(*points, strict=True),
            marker="os^Dv"[i % 5],
            markersize=5,
            label=name,
            color=_COLOURS[i % len(_COLOURS)],
        )
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, path)


def draw_bars(bars: Mapping[str, float], path: Path, label: str) -> Path:
    """One lying bar for each name, with its value at its end. Returns the path."""
    figure, axes = plt.subplots(figsize=(6.4, 1.2 + 0.35 * len(bars)))
    names = list(bars)[::-1]
    drawn = axes.barh(names, [bars[name] for name in names], color=_COLOURS[1])
    axes.bar_label(drawn, fmt="%.3g", fontsize=8, padding=2)
    axes.set_xlabel(label)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
