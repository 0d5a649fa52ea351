"""The loss on the plane of two task vectors, with the base, both experts, the run's merge and the minimum."""

from collections.abc import Generator
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.analyze import LandscapeTaskVectors
from ..errors import UserError
from ..merging.arithmetic import Tensors
from ..models.network import num_parameters
from .fixed import fixed_images
from .plane import Plane, draw_shares
from .style import HALO, SIGNED, plt, range_label, ticks_within
from .subject import Cost, Finding, Progress, Subject
from .task_vectors import task_vectors

TITLE = "Loss between task vectors"
CAPTIONS = {
    "": "Denoising loss over all timesteps on the plane of every two task vectors, in the geometry of the weights, as "
    "change from the base's. θ is the base, θ0, θ1, … the experts; the star is the run's merge, projected onto the "
    "plane; the cross is the smallest loss of the grid.",
    "ranges": "The same on the two experts' own ranges alone.",
    "distance": "Distance of the images that the run's search drew, at the weights of the same two experts; the "
    "others' weights differ from point to point.",
}
NEEDS = ("experts", "two experts", "merged")
NAME = "landscape-task-vectors"


def _settings(subject: Subject) -> LandscapeTaskVectors:
    return subject.settings.landscape_task_vectors


def _pairs(subject: Subject) -> list[tuple[int, int]]:
    num = len(subject.ranges)
    pairs = _settings(subject).pairs
    for pair in pairs or ():
        if max(pair) >= num or len(set(pair)) < 2:
            raise UserError(f"landscape_task_vectors.pairs has {list(pair)}, expected two of experts 0 to {num - 1}")
    return pairs or list(combinations(range(num), 2))


def cost(subject: Subject) -> Cost:
    """Count the images at all points of all planes, and the tensors that are held."""
    settings = _settings(subject)
    num_points = len(_pairs(subject)) * settings.num_points**2
    # The base, the experts' and the merge's changes; and a plane's network, origin and two directions.
    num_bytes = 4 * num_parameters(subject.base.network) * (2 + len(subject.ranges) + 4)
    return Cost(num_forward=num_points * settings.num_images * len(subject.ranges), num_bytes=num_bytes)


def compute(subject: Subject) -> Generator[str | Progress, None, Finding]:
    """Compute the loss on the plane of every two task vectors; yields how far it is.

    Returns:
        A row for each pair and point (w_i, w_j): its place (x, y) along orthonormal axes, of which the first is that
        of τ_i, the loss on each range, and their mean by the ranges' shares of the training's draws.
    """
    settings, shares = _settings(subject), draw_shares(subject)
    origin, (*vectors, merged) = _split(subject)
    gram = torch.tensor([[_inner(a, b) for b in vectors] for a in vectors], dtype=torch.float64)
    images = fixed_images(subject, settings.num_images)
    axis = np.linspace(settings.low, settings.high, settings.num_points)
    rows: list[dict[str, Any]] = []
    planes: list[dict[str, Any]] = []
    pairs = _pairs(subject)
    for number, (i, j) in enumerate(pairs):
        plane = Plane(subject, origin, [vectors[i], vectors[j]], images)
        at = number * len(axis) ** 2, len(pairs) * len(axis) ** 2
        losses = yield from plane.grid(NAME, f"{i}-{j}", axis, *at)
        start = subject.kept.tensor(f"{i}-{j}-base", plane.losses, 0.0, 0.0)
        corner = gram[[[i, i], [j, j]], [[i, j], [i, j]]]
        found = _points(axis, losses.numpy(), shares, corner)
        rows += [{"first": i, "second": j, **row} for row in found]
        planes.append(
            _describe((i, j), found, start.numpy(), shares, corner) | _nearest(merged, (vectors[i], vectors[j]), corner)
        )
    yield Progress(NAME, len(rows), len(rows))
    summary = {
        "ranges": [[r.low, r.high] for r in subject.ranges],
        "planes": planes,
        "trials": [[weights, value] for weights, value in subject.trials],
        "metric": subject.metric,
    }
    return Finding(rows, summary, _sentence(planes))


def _split(subject: Subject) -> tuple[Tensors, list[Tensors]]:
    """Cut experts and merge into the base, with projections at the identity, and their changes of it."""
    assert subject.merged is not None
    base, models = subject.base.network.state_dict(), [*subject.experts, subject.merged]
    origin, changes = dict(base), [{} for _ in models]  # type: tuple[Tensors, list[Tensors]]
    for key, start, moved in task_vectors(base, models):
        origin[key] = start
        for change, value in zip(changes, moved, strict=True):
            change[key] = value
    return origin, changes


def _inner(a: Tensors, b: Tensors) -> float:
    return sum(float((a[key].double() * b[key].double()).sum()) for key in a)


def orthonormal(weights: Any, gram: Tensor) -> Any:
    """Map merging weights of two task vectors to places along orthonormal axes, of which the first is that of τ_i.

    (w_i, w_j) → (w_i·‖τ_i‖ + w_j·⟨τ_i, τ_j⟩/‖τ_i‖, w_j·‖τ_j - its part along τ_i‖): Gram–Schmidt.

    Args:
        weights: [..., 2].
        gram: ⟨τ_a, τ_b⟩, [2, 2].
    """
    (ii, ij), (_, jj) = gram.tolist()
    length = max(ii, 1e-300) ** 0.5
    height = max(jj - (ij / length) ** 2, 0.0) ** 0.5
    weights = np.asarray(weights)
    return np.stack([weights[..., 0] * length + weights[..., 1] * ij / length, weights[..., 1] * height], -1)


def _nearest(change: Tensors, vectors: tuple[Tensors, Tensors], gram: Tensor) -> dict[str, Any]:
    """Find the point of a plane that is nearest to the merge: its weights, and its share of the squared change."""
    products = torch.tensor([_inner(change, v) for v in vectors], dtype=torch.float64)
    weights = torch.linalg.lstsq(gram, products, driver="gelsd").solution
    size = _inner(change, change)
    return {"merge": weights.tolist(), "merge_share": float(weights @ gram @ weights) / size if size else 1.0}


def _points(axis: np.ndarray, losses: np.ndarray, shares: np.ndarray, gram: Tensor) -> list[dict[str, Any]]:
    found = []
    for (a, b), values in zip(np.ndindex(*losses.shape[:2]), losses.reshape(-1, len(shares)), strict=True):
        x, y = orthonormal([axis[a], axis[b]], gram)
        row = {"w_first": float(axis[a]), "w_second": float(axis[b]), "x": float(x), "y": float(y)}
        found.append(row | {f"loss_{k}": float(v) for k, v in enumerate(values)} | {"loss": float(values @ shares)})
    return found


def _describe(
    pair: tuple[int, int], rows: list[dict[str, Any]], start: np.ndarray, shares: np.ndarray, gram: Tensor
) -> dict[str, Any]:
    # Far away a loss may overflow; the base's own doesn't.
    lowest = min((row for row in rows if np.isfinite(row["loss"])), key=lambda row: row["loss"])
    return {
        "first": pair[0],
        "second": pair[1],
        "gram": gram.tolist(),
        "base_losses": {"loss": float(start @ shares)} | {f"loss_{k}": float(v) for k, v in enumerate(start)},
        "minimum": [lowest["w_first"], lowest["w_second"]],
        "minimum_loss": lowest["loss"],
    }


def _sentence(planes: list[dict[str, Any]]) -> str:
    best = min(planes, key=lambda plane: plane["minimum_loss"] / plane["base_losses"]["loss"])
    change = best["minimum_loss"] / best["base_losses"]["loss"] - 1
    corners = ([0, 0], [1, 0], [0, 1])
    inner = sum(all(not np.allclose(plane["minimum"], corner) for corner in corners) for plane in planes)
    return (
        f"On {inner} of {len(planes)} planes the smallest loss is at neither the base nor an expert; the best is at "
        f"({best['minimum'][0]:.2g}, {best['minimum'][1]:.2g}) of experts {best['first']} and {best['second']}, "
        f"{change:+.2%} of the base's."
    )


def draw(finding: Finding) -> dict[str, Any]:
    """Draw the planes: over all timesteps, on the experts' own ranges, and the search's distances."""
    planes = finding.summary["planes"]
    figures = {"": _draw_losses(finding, [(plane, ("loss",)) for plane in planes])}
    figures["ranges"] = _draw_losses(
        finding, [(plane, (f"loss_{plane['first']}", f"loss_{plane['second']}")) for plane in planes]
    )
    if finding.summary["trials"]:
        figures["distance"] = _draw_distances(finding)
    return figures


def _cells(num: int, wide: int) -> tuple[Any, list[Any]]:
    columns = min(wide, num)
    rows = -(-num // columns)
    size = (4.3 * columns, 3.7 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[num:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:num])


def _draw_losses(finding: Finding, shown: list[tuple[dict[str, Any], tuple[str, ...]]]) -> Any:
    maps = [(plane, column) for plane, columns in shown for column in columns]
    figure, axes = _cells(len(maps), 3 if len(shown) == len(maps) else 4)
    for axis, (plane, column) in zip(axes, maps, strict=True):
        rows = [r for r in finding.rows if (r["first"], r["second"]) == (plane["first"], plane["second"])]
        side = round(len(rows) ** 0.5)
        x, y, losses = (np.array([r[name] for r in rows]).reshape(side, side) for name in ("x", "y", column))
        start = plane["base_losses"][column]
        change = 100 * (losses / start - 1)
        # The walls around the valley would hide it.
        change = np.ma.masked_invalid(change)
        limit = max(3 * -float(change.min()), float(np.quantile(change.compressed(), 0.75)), 1e-6)
        levels = np.linspace(-limit, limit, 21)
        image = axis.contourf(x, y, change.clip(-limit, None), levels=levels, cmap=SIGNED, extend="max")
        axis.contour(x, y, change, levels=levels, colors="black", linewidths=0.3)
        bar = figure.colorbar(image, ax=axis, shrink=0.8, ticks=ticks_within(limit))
        bar.set_label("loss against θ, %")
        lowest = np.unravel_index(np.nanargmin(losses), losses.shape)
        _mark(axis, plane, (float(x[lowest]), float(y[lowest])))
        axis.set(title=_title(finding, column), aspect="equal")
    return figure


def _title(finding: Finding, column: str) -> str:
    if column == "loss":
        return "all timesteps"
    low, high = finding.summary["ranges"][int(column.removeprefix("loss_"))]
    return f"timesteps {range_label(low, high)}"


def _mark(axis: Any, plane: dict[str, Any], lowest: tuple[float, float]) -> None:
    gram, names = torch.tensor(plane["gram"]), ["θ", f"θ{plane['first']}", f"θ{plane['second']}"]
    places = orthonormal([[0, 0], [1, 0], [0, 1]], gram)
    axis.plot(places[:, 0], places[:, 1], "o", color="black", markersize=5)
    for name, place in zip(names, places, strict=True):
        axis.annotate(name, place, xytext=(5, 5), textcoords="offset points", fontsize=10, path_effects=HALO)
    axis.plot(*orthonormal(plane["merge"], gram), "*", color="black", markeredgecolor="white", markersize=13)
    axis.plot(*lowest, "x", color="black", markersize=8, markeredgewidth=2)
    axis.set(xlabel=f"along τ{plane['first']}", ylabel=f"across, towards τ{plane['second']}")


def _draw_distances(finding: Finding) -> Any:
    planes, trials = finding.summary["planes"], finding.summary["trials"]
    figure, axes = _cells(len(planes), 3)
    values = np.array([value for _, value in trials])
    for axis, plane in zip(axes, planes, strict=True):
        i, j = plane["first"], plane["second"]
        weights = np.array([[w[i], w[j]] for w, _ in trials])
        points = axis.scatter(*weights.T, c=values, cmap="viridis", s=45, edgecolors="white", linewidths=0.5)
        axis.plot(*weights[values.argmin()], "*", color="black", markeredgecolor="white", markersize=14)
        axis.set(xlabel=f"weight {i}", ylabel=f"weight {j}")
    figure.colorbar(points, ax=axes, shrink=0.6).set_label(finding.summary["metric"])
    return figure
