"""Pictures of what a model does, as PNG files: confusion matrices, grids of images, boxes, curves."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

matplotlib.use("Agg")

from matplotlib import pyplot as plt

_COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf")


def draw_confusion(counts: np.ndarray, labels: Sequence[str], path: Path) -> Path:
    """A confusion matrix (true classes in rows, guesses in columns), each row in shares of its class. Returns the path."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = len(labels) <= 20
    side = max(4.0, 0.55 * len(labels)) if few else 9.0
    figure, axes = plt.subplots(figsize=(side + 1.2, side))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="guess", ylabel="class", title=f"accuracy {np.trace(counts) / max(counts.sum(), 1):.1%}")
    if few:
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        for (i, j), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    j, i, str(count), ha="center", va="center", fontsize=8, color="white" if shares[i, j] > 0.5 else "black"
                )
    return _save(figure, path)


def draw_grid(rows: Mapping[str, Sequence[Image.Image]], path: Path, zoom: int = 1) -> Path:
    """Images in rows, each with its name on the left. zoom: pixels drawn for each pixel. Returns the path."""
    lists = {
        name: [im.resize((im.width * zoom, im.height * zoom), Image.Resampling.NEAREST) for im in ims]
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


def draw_bars(values: Mapping[str, Mapping[str, float]], path: Path, ylabel: str) -> Path:
    """Bars in groups: values[group][name]. Returns the path."""
    names = list(dict.fromkeys(name for group in values.values() for name in group))
    figure, axes = plt.subplots(figsize=(1.5 + 1.1 * len(values) * max(1, len(names) / 4), 3.6))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [group.get(name, math.nan) for group in values.values()]
        bars = axes.bar(
            [x + i * width for x in range(len(values))], heights, width, label=name, color=_COLOURS[i % len(_COLOURS)]
        )
        axes.bar_label(bars, fmt="%.3g", fontsize=7)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(values))], list(values))
    axes.set_ylabel(ylabel)
    axes.legend(fontsize=8)
    return _save(figure, path)


def draw_against(
    points: Mapping[str, Sequence[tuple[float, float]]], path: Path, xlabel: str, ylabel: str, title: str = ""
) -> Path:
    """One mark for each (x, y), x on a logarithmic scale, a colour and a name for each method. Returns the path."""
    figure, axes = plt.subplots(figsize=(6.2, 4.0))
    for i, (name, pairs) in enumerate(points.items()):
        xs, ys = zip(*pairs, strict=True)
        axes.plot(xs, ys, "o", label=name, color=_COLOURS[i % len(_COLOURS)], markersize=7, alpha=0.8)
    axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
