"""Charts for a page: SVG that takes the page's colours, so that it reads in light, in dark and on paper."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

# Colours that the SVG has in place of the page's: its ink, and its ramp of ranges.
INK, FAINT = "#010203", "#010204"
RAMP = "#0103{:02x}"
FONT: dict[Any, Any] = {"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
# Of the losses' span a chart shows so much above what the range's own training and the others on all timesteps need.
HEADROOM = 0.35


def ramp(index: int) -> str:
    """Name the colour of a range or of a search's level, as a chart has it."""
    return RAMP.format(index)


def ramp_colours(num: int) -> tuple[list[str], list[str]]:
    """List the colours of ranges from low to high timesteps, for a light page and for a dark one: cuts of viridis."""
    shares = np.linspace(0, 1, num) if num > 1 else np.array([0.5])
    colours = plt.get_cmap("viridis")
    light, dark = (colours(low + (high - low) * shares) for low, high in ((0.0, 0.72), (0.38, 1.0)))
    return [to_hex(c) for c in light], [to_hex(c) for c in dark]


def range_losses(
    curves: Sequence[tuple[str, int | None, list[float], list[float]]], own_range: int, name: str = ""
) -> str:
    """Draw the validation losses on one range over the updates, one line for each training.

    Args:
        curves: name, index of the training's own range or None for one on all timesteps, updates, losses.
        own_range: the range that the losses are of; its own training is drawn bold.
        name: of the chart, other than those of all others on a page.

    Returns:
        SVG.
    """
    with plt.rc_context(FONT):
        figure, axis = plt.subplots(figsize=(3.6, 2.5), layout="constrained")
        needed = [v for _, index, _, losses in curves if index in (own_range, None) for v in losses]
        for _, index, updates, losses in curves:
            is_own, is_all = index == own_range, index is None
            axis.plot(
                updates,
                losses,
                color=INK if is_all else ramp(index or 0),
                linestyle="--" if is_all else "-",
                linewidth=2.2 if is_own else 1.0,
                marker="o" if len(updates) == 1 else "",
                alpha=1.0 if is_own or is_all else 0.45,
            )
        low, high = min(needed), max(needed)
        span = (high - low) or abs(high) or 1.0
        axis.set_ylim(low - 0.08 * span, high + HEADROOM * span)
        axis.set(xlabel="updates", ylabel="validation loss")
        _ticks(axis)
        return _svg(figure, f"{name}-losses-{own_range}")


def search_cost(
    levels: Sequence[tuple[str, int, list[float]]], pretrained: float | None, metric: str, name: str = ""
) -> str:
    """Draw the candidates' values over the images drawn until then, level after level, and the best of each so far.

    Args:
        levels: name, images of a candidate, values in the order in which they were proposed.
        pretrained: the base's value at the first level.
        name: of the chart, other than those of all others on a page.

    Returns:
        SVG.
    """
    with plt.rc_context(FONT):
        figure, axis = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
        spent, shown = 0, list[float]()
        for index, (level, num_images, values) in enumerate(levels):
            images = spent + num_images * np.arange(1, len(values) + 1)
            best = np.minimum.accumulate(values)
            axis.plot(images, values, "o", markersize=3.5, color=ramp(index), alpha=0.7)
            axis.step(images, best, where="post", color=ramp(index), linewidth=1.6)
            axis.text(spent, 1.02, f" {level}", transform=axis.get_xaxis_transform(), color=ramp(index))
            if index:
                axis.axvline(spent, color=FAINT, linewidth=1)
            spent, shown = int(images[-1]), [*shown, *values]
        if pretrained is not None:
            axis.axhline(pretrained, color=INK, linewidth=1, linestyle=":")
            axis.text(1.01, pretrained, "pretrained", transform=axis.get_yaxis_transform(), va="center", color=INK)
        if min(shown) > 0 and max(shown) > 3 * min(shown):
            axis.set_yscale("log")
        axis.set(xlabel="images drawn", ylabel=metric, xlim=(0, spent * 1.01))
        _ticks(axis)
        return _svg(figure, f"{name}-search")


def _ticks(axis: Any) -> None:
    axis.tick_params(color=INK, labelcolor=INK, which="both", labelsize=8)
    for spine in axis.spines.values():
        spine.set_color(INK)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_color(INK)
    axis.grid(visible=True, color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)


def _svg(figure: Any, name: str) -> str:
    """Write a figure as SVG for a page: without a background, with the page's font and colours and ids of its own."""
    text = io.StringIO()
    # With a salt, ids follow from the content: the same chart has the same bytes.
    with plt.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*"', lambda found: found[1] or "", svg, count=2)
    used = set(re.findall(r'#([^\s")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: (\S+) [^;\"]*", r"font-size: \1", svg)
    svg = svg.replace(INK, "currentColor").replace(FAINT, "var(--line)")
    return re.sub(RAMP[:5] + "([0-9a-f]{2})", lambda found: f"var(--range-{int(found[1], 16)})", svg)
