"""How figures look: colours of ranges and of signed maps, which the colour-blind tell apart."""

from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import patheffects
from matplotlib import pyplot as plt

SIGNED = "RdBu_r"
# Around black text on a map.
HALO = [patheffects.withStroke(linewidth=2, foreground="white")]


def range_colours(num: int) -> list[Any]:
    """Pick colours of ranges from one sequential ramp, dark for the cleanest; even yellow is seen on white."""
    return [plt.get_cmap("viridis")(0.9 * index / max(1, num - 1)) for index in range(num)]


def range_label(low: int | float, high: int | float) -> str:
    """Write a range of timesteps."""
    return f"[{low:g}, {high:g})"


def ticks_within(limit: float) -> list[float]:
    """Choose round numbers between -limit and limit."""
    return [float(tick) for tick in plt.MaxNLocator(7).tick_values(-limit, limit) if abs(tick) <= limit]


def text_colour(value: Any, limit: float) -> str:
    """Pick the colour of a number on a cell of a signed map."""
    return "white" if abs(value) > 0.6 * limit else "black"


def signed_map(
    axis: Any, values: np.ndarray, labels: Sequence[str], columns: Sequence[str] | None = None, size: int | float = 9
) -> Any:
    """Draw a matrix around 0 with its numbers; NaN stays empty. Columns are labelled as rows unless told."""
    limit = max(0.1, float(np.nanmax(np.abs(values), initial=0.0)))
    image = axis.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour, text = text_colour(value, limit), f"{round(value, 2) + 0.0:.2f}"
            axis.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)
    names = labels if columns is None else columns
    axis.set(xticks=range(len(names)), yticks=range(len(labels)))
    axis.set_xticklabels(names, rotation=30, ha="right")
    axis.set_yticklabels(labels)
    return image


def label_ends(axis: Any, ends: Sequence[tuple[Any, ...]], size: int | float = 9) -> None:
    """Write the name of each line at its end (x, y, name, colour), moved apart where they would overlap.

    Call it when the axis has its limits and scale.
    """
    to_pixels, from_pixels = axis.transData, axis.transData.inverted()
    gap = size * axis.figure.dpi / 72 * 1.15
    lowest = -np.inf
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        across, up = to_pixels.transform((x, y))
        lowest = max(up, lowest + gap)
        place = from_pixels.transform((across + 6, lowest))
        axis.annotate(name, place, color=colour, fontsize=size, va="center", annotation_clip=False)
