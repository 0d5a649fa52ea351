"""Pictures of a run; the only importer of matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from PIL import Image

from .runs import atomic_path
from .timesteps import TimestepRange


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
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def training_curve(log: list[dict[str, Any]], ranges: tuple[TimestepRange, ...], out: Path) -> None:
    """Draw the validation loss over the updates, the mean and each range, relative to its last value."""
    updates = [r["update"] for r in log]
    losses = np.array([r["validation"] for r in log])
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.plot(updates, losses.mean(1) / losses[-1].mean(), color="black", linewidth=2, label="mean")
    for index, own in enumerate(ranges):
        axis.plot(updates, losses[:, index] / losses[-1, index], linewidth=1, label=f"t in {own}")
    axis.axvspan(updates[-1] * 0.8, updates[-1], color="0.93", label="last fifth")
    axis.set(xlabel="optimiser updates", ylabel="validation loss / last", ylim=(0.98, 1.3))
    axis.legend(frameon=False)
    figure.tight_layout()
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
