"""The loss around the pretrained model, over all timesteps and on each range, and the gradients there."""

from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.analyze import LandscapeRanges
from ..merging.arithmetic import Tensors
from ..models.network import num_parameters
from ..seeds import generator
from .fixed import fixed_images
from .gradients import GradientRows, Sketch, grams_of, sketch_of
from .plane import Plane, draw_shares
from .style import SIGNED, plt, range_colours, range_label, ticks_within
from .subject import Cost, Finding, Progress, Subject

TITLE = "Loss around the pretrained model"
CAPTIONS = {
    "": "Denoising loss on a plane of two random filter-normalised directions through the pretrained model, as change "
    "from its centre, over all timesteps and on each range. Lines are the same changes in every map: where they lie "
    "close, the weights are not at rest. Below, the length of the gradient on each range beside that over all "
    "timesteps, without the noise of few images.",
}
NEEDS = ()
NAME = "landscape-ranges"


def _settings(subject: Subject) -> LandscapeRanges:
    return subject.settings.landscape_ranges


def cost(subject: Subject) -> Cost:
    """Count the images at all points, and those of the gradients."""
    settings, num = _settings(subject), len(subject.ranges)
    return Cost(
        num_forward=settings.num_points**2 * settings.num_images * num,
        num_backward=settings.num_gradient_images // 2 * 2 * num,
        # A plane's network, origin and two directions.
        num_bytes=4 * 4 * num_parameters(subject.base.network),
    )


def filter_normalised(weights: Tensors, seed: int, name: str) -> Tensors:
    """Draw a random direction, of which each filter is as long as that of the weights (Li et al. 2018, section 4).

    A filter is a slice along the first dimension of a tensor with two or more. Biases and norms are not moved.
    """
    found = {}
    for key, value in weights.items():
        if value.is_floating_point() and value.dim() > 1:
            draw = torch.randn(value.shape, generator=generator(seed, "direction", name, key)).flatten(1)
            length = value.float().cpu().flatten(1).norm(dim=1, keepdim=True)
            found[key] = (draw / draw.norm(dim=1, keepdim=True) * length).view_as(value)
    return found


def compute(subject: Subject) -> Generator[str | Progress, None, Finding]:
    """Compute losses on the plane, and the lengths of gradients; yields how far it is.

    Returns:
        A row for each point (a, b): the loss on each range, and their mean by the ranges' shares of the training's
        draws. The summary's ``gradients`` has for all timesteps and each range ‖∇L‖; the same without noise, the root
        of ⟨∇L_A, ∇L_B⟩ of two halves A, B of the images; and ‖∇L‖·‖θ‖/L, the relative change of the loss by a relative
        step.
    """
    settings, seed = _settings(subject), subject.settings.seed
    weights, shares = subject.base.network.state_dict(), draw_shares(subject)
    directions = [filter_normalised(weights, seed, name) for name in ("first", "second")]
    plane = Plane(subject, weights, directions, fixed_images(subject, settings.num_images))
    axis = np.linspace(-settings.span, settings.span, settings.num_points)
    losses = (yield from plane.grid(NAME, "plane", axis, 0, len(axis) ** 2)).numpy()
    yield Progress(NAME, len(axis) ** 2, len(axis) ** 2)
    centre = subject.kept.tensor("centre", plane.losses, 0.0, 0.0).numpy()
    rows = []
    for (a, b), values in zip(np.ndindex(*losses.shape[:2]), losses.reshape(-1, len(shares)), strict=True):
        each = {f"loss_{k}": float(v) for k, v in enumerate(values)}
        rows.append({"a": float(axis[a]), "b": float(axis[b]), **each, "loss": float(values @ shares)})
    summary = {
        "ranges": [[r.low, r.high] for r in subject.ranges],
        "centre": {"loss": float(centre @ shares)} | {f"loss_{k}": float(v) for k, v in enumerate(centre)},
        **_gradients(subject, weights, shares, centre),
    }
    return Finding(rows, summary, _sentence(summary))


def _gradients(subject: Subject, weights: Tensors, shares: np.ndarray, losses: np.ndarray) -> dict[str, Any]:
    images = fixed_images(subject, _settings(subject).num_gradient_images // 2 * 2)
    sketch: Sketch = sketch_of(weights, len(shares), subject.settings.seed)

    def make() -> Tensor:
        computer = GradientRows(subject.base, weights, sketch, subject.device, subject.batch_size)
        spread = [subject.base.process.spread(own, len(images) // 2) for own in subject.ranges]
        return torch.stack([computer.halves(images, t)[0] for t in spread])

    (grams,) = grams_of(subject.kept.tensor("gradients", make), sketch.widths(weights))
    whole = ((grams.aa + grams.bb + grams.ab + grams.ab.T) / 4).numpy()
    shared = ((grams.ab + grams.ab.T) / 2).numpy()
    size = float(sum(v.double().square().sum() for v in weights.values() if v.is_floating_point())) ** 0.5

    def describe(mix: np.ndarray) -> dict[str, float]:
        norm, loss = _root(mix @ whole @ mix), float(mix @ losses)
        quiet = _root(mix @ shared @ mix)
        return {"norm": norm, "norm_without_noise": quiet, "relative": quiet * size / loss, "loss": loss}

    quiet = np.sqrt(shared.diagonal().clip(min=0))
    mean = float(quiet @ shares)
    return {
        "gradients": {"all": describe(shares)} | {str(k): describe(one) for k, one in enumerate(np.eye(len(shares)))},
        "all_over_mean": _root(shares @ shared @ shares) / mean if mean else None,
        "if_orthogonal": _root((shares * quiet) @ (shares * quiet)) / mean if mean else None,
    }


def _root(square: Any) -> float:
    return max(float(square), 0.0) ** 0.5


def _sentence(summary: dict[str, Any]) -> str:
    found = {name: one["norm_without_noise"] for name, one in summary["gradients"].items()}
    each = ", ".join(f"{found[str(k)]:.2g} on {range_label(*own)}" for k, own in enumerate(summary["ranges"]))
    if summary["all_over_mean"] is None:
        return f"No gradient stands out of the noise: {each}."
    return (
        f"The gradient's length over all timesteps is {found['all']:.2g}, {summary['all_over_mean']:.2f} of the mean "
        f"over ranges ({each}); if they were orthogonal it would be {summary['if_orthogonal']:.2f}."
    )


def draw(finding: Finding) -> dict[str, Any]:
    """Draw the maps side by side, and the gradients' lengths."""
    ranges = finding.summary["ranges"]
    columns = ["loss", *(f"loss_{k}" for k in range(len(ranges)))]
    names = ["all timesteps", *(range_label(*own) for own in ranges)]
    size = (3.1 * len(columns) + 1, 6)
    figure, axes = plt.subplots(2, len(columns), figsize=size, layout="constrained", height_ratios=(3, 1))
    side = round(len(finding.rows) ** 0.5)
    a, b = (np.array([row[name] for row in finding.rows]).reshape(side, side) for name in ("a", "b"))
    changes = {
        column: 100 * (np.array([row[column] for row in finding.rows]).reshape(side, side) / centre - 1)
        for column, centre in finding.summary["centre"].items()
    }
    # Far away a loss may overflow.
    found = np.array(list(changes.values()))
    limit = max(float(np.quantile(np.abs(found[np.isfinite(found)]), 0.5)), 1e-6)
    changes = {column: np.ma.masked_invalid(change) for column, change in changes.items()}
    levels = np.linspace(-limit, limit, 25)
    for axis, column, name in zip(axes[0], columns, names, strict=True):
        image = axis.contourf(a, b, changes[column], levels=levels, cmap=SIGNED, extend="both")
        axis.contour(a, b, changes[column], levels=levels, colors="black", linewidths=0.4)
        axis.plot(0, 0, "o", color="black", markersize=4)
        axis.set(title=name, aspect="equal", xlabel="first direction")
    axes[0, 0].set_ylabel("second direction")
    figure.colorbar(image, ax=axes[0], shrink=0.8, ticks=ticks_within(limit)).set_label("loss against the centre, %")
    _draw_norms(figure, axes[1], finding, names)
    return {"": figure}


def _draw_norms(figure: Any, axes: Any, finding: Finding, names: list[str]) -> None:
    grid = axes[0].get_gridspec()
    for axis in axes:
        axis.remove()
    axis = figure.add_subplot(grid[1, :])
    found = [one["norm_without_noise"] for one in finding.summary["gradients"].values()]
    colours = ["black", *range_colours(len(names) - 1)]
    bars = axis.barh(names, found, color=colours)
    axis.bar_label(bars, fmt="{:.2g}", padding=3)
    axis.invert_yaxis()
    axis.set(xlabel="‖∇L‖ without noise", xlim=(0, 1.15 * max(*found, 1e-12)))
