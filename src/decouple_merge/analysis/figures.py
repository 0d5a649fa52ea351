"""Pictures of a run; the only importer of matplotlib."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

from ..diffusion.timesteps import TimestepRange
from ..searching.trial import Level, Trial
from ..storage.files import atomic_path

# Of a figure that has axes for each pair of them.
MAX_WEIGHTS = 8


def sample_grid(folders: dict[str, Path], out: Path, num_columns: int = 16, num_rows: int = 2) -> None:
    """Draw the same seeds of several models below each other.

    Args:
        folders: title to folder of ``<seed>.png``, in the order of the figure.
    """
    figure, axes = plt.subplots(len(folders), 1, figsize=(num_columns * 0.6, len(folders) * (num_rows * 0.6 + 0.35)))
    for axis, (title, folder) in zip(np.atleast_1d(axes), folders.items(), strict=True):
        files = sorted(folder.glob("*.png"), key=lambda p: int(p.stem))[: num_columns * num_rows]
        pixels = [np.asarray(Image.open(f).convert("RGB")) for f in files]
        blank = np.full_like(pixels[0], 255)
        pixels += [blank] * (num_columns * num_rows - len(pixels))
        rows = [np.concatenate(pixels[i : i + num_columns], 1) for i in range(0, len(pixels), num_columns)]
        axis.imshow(np.concatenate(rows, 0), interpolation="nearest")
        axis.set_title(title, loc="left", fontsize=10)
        axis.axis("off")
    figure.tight_layout(pad=0.3)
    _save(figure, out)


def training_curve(log: list[dict[str, Any]], ranges: tuple[TimestepRange, ...], out: Path) -> None:
    """Draw the validation loss over the updates, the mean and each range, relative to its last value."""
    updates = [r["update"] for r in log]
    losses = np.array([r["validation"] for r in log])
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot(updates, losses.mean(1) / losses[-1].mean(), color="black", linewidth=2, label="mean")
    for index, own in enumerate(ranges):
        axis.plot(updates, losses[:, index] / losses[-1, index], linewidth=1, label=f"t in {own}")
    axis.axvspan(updates[-1] * 0.8, updates[-1], color="0.93", label="last fifth")
    # What is learned by heart makes the loss rise again.
    lowest = min(0.98, float((losses / losses[-1]).min()) - 0.01)
    axis.set(xlabel="optimiser updates", ylabel="validation loss / last", ylim=(lowest, 1.3))
    axis.legend(frameon=False)
    figure.tight_layout()
    _save(figure, out)


def schedule_front(points: dict[str, list[tuple[float, float]]], xlabel: str, ylabel: str, out: Path) -> None:
    """Draw distances over what drawing takes: what a search for schedules found, and single models with fewer steps.

    Args:
        points: seconds and distance, by the line's name; the first is bold.
    """
    figure, axis = plt.subplots(figsize=(7, 4))
    for i, (name, line) in enumerate(points.items()):
        seconds, values = zip(*sorted(line), strict=True)
        axis.plot(seconds, values, "o-" if i == 0 else "s--", linewidth=2 if i == 0 else 1, markersize=4, label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend(frameon=False)
    figure.tight_layout()
    _save(figure, out)


def search_cost(found: list[tuple[Level, list[Trial]]], metric: str, out: Path) -> None:
    """Draw every candidate's value over the images drawn until then, level after level, and the best of each level.

    Values of different levels don't compare: a distance falls with the number of images.
    """
    figure, axis = plt.subplots(figsize=(7, 4))
    spent = 0
    for level, trials in found:
        images = spent + len(level.seeds) * np.arange(1, len(trials) + 1)
        values = [t.value for t in trials]
        (points,) = axis.plot(images, values, "o", markersize=4, label=f"{level.name}, {len(level.seeds)} images each")
        axis.step(images, np.minimum.accumulate(values), where="post", color=points.get_color(), linewidth=1)
        spent = int(images[-1]) if trials else spent
    axis.set(xlabel="images drawn", ylabel=metric)
    axis.legend(frameon=False)
    _save(figure, out)


def search_surfaces(trials: list[Trial], metric: str, out: Path, tuned: Sequence[str] = ()) -> None:
    """Draw a level's candidates over each pair of weights, on the response surface that they suggest.

    The surface is the least-squares quadratic of the log distance in all weights (of the distance where one is not
    above 0), cut through the best candidate; too few candidates for its coefficients are drawn without it. Of many
    weights those are shown that are largest in the best.

    Args:
        tuned: names of the settings that stand behind the weights.
    """
    weights, values = np.array([t.weights for t in trials]), np.array([t.value for t in trials])
    heights = np.log(values) if (values > 0).all() else values
    num = weights.shape[1]
    names = [*(f"weight {i}" for i in range(num - len(tuned))), *tuned]
    best = weights[int(values.argmin())]
    basis = _quadratic_basis(weights)
    surface = np.linalg.lstsq(basis, heights, rcond=None)[0] if len(trials) >= basis.shape[1] + 2 else None
    shown = sorted(np.argsort(-np.abs(best), kind="stable")[:MAX_WEIGHTS].tolist())
    span = max(1, len(shown) - 1)
    figure, axes = plt.subplots(span, span, figsize=(3.2 * span + 1, 2.9 * span), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.set_visible(False)
    for row, column in [(0, 0)] if num == 1 else list(itertools.combinations(range(len(shown)), 2)):
        i, j = shown[row], shown[column]
        axis = axes[max(column - 1, 0), row]
        axis.set_visible(True)
        heights_of = values if num == 1 else weights[:, j]
        if surface is not None and num > 1:
            x, y = (np.linspace(weights[:, k].min(), weights[:, k].max(), 60) for k in (i, j))
            cut = np.tile(best, (60 * 60, 1))
            cut[:, i], cut[:, j] = (grid.ravel() for grid in np.meshgrid(x, y))
            axis.contourf(x, y, (_quadratic_basis(cut) @ surface).reshape(60, 60), levels=14, cmap="Greys_r", alpha=0.6)
        points = axis.scatter(weights[:, i], heights_of, c=heights, cmap="viridis", s=18, edgecolors="white", lw=0.4)
        axis.plot(best[i], values.min() if num == 1 else best[j], "*", color="crimson", markersize=12)
        axis.set(xlabel=names[i], ylabel=metric if num == 1 else names[j])
    bar = figure.colorbar(points, ax=axes, shrink=0.6)
    bar.set_label(f"log {metric}" if (values > 0).all() else metric)
    _save(figure, out)


def study_ratios(panels: dict[str, list[tuple[str, Any]]], out: Path) -> None:
    """Draw ratios to the pretrained model with their intervals, a judge a panel, and small dots for training seeds.

    Args:
        panels: by judge, labels and ratios with ``value``, ``low``, ``high`` and ``by_seed``; the same labels in all.
    """
    labels = list(dict.fromkeys(label for lines in panels.values() for label, _ in lines))
    height = 0.28 * len(labels) + 1.2
    figure, axes = plt.subplots(
        1,
        max(1, len(panels)),
        figsize=(3 + 2.4 * len(panels), height),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (judge, lines) in zip(axes.flat, panels.items(), strict=False):
        axis.axvline(1, color="0.8", linewidth=1)
        for label, ratio in lines:
            place = labels.index(label)
            axis.plot([ratio.low, ratio.high], [place, place], color="black", linewidth=1)
            axis.plot(ratio.by_seed, [place] * len(ratio.by_seed), ".", color="0.5", markersize=4)
            axis.plot(ratio.value, place, "o", color="crimson", markersize=5)
        axis.set_title(judge, fontsize=9)
        axis.set(xlabel="/ pretrained", yticks=range(len(labels)), yticklabels=labels)
    # From above, and no row on the frame.
    axes[0, 0].set_ylim(len(labels) - 0.4, -0.6)
    _save(figure, out)


def _quadratic_basis(weights: np.ndarray) -> np.ndarray:
    pairs = itertools.combinations_with_replacement(range(weights.shape[1]), 2)
    products = [weights[:, i] * weights[:, j] for i, j in pairs]
    return np.column_stack([np.ones(len(weights)), weights, *products])


def _save(figure: Any, out: Path) -> None:
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
