"""Gradient similarity: which timesteps pull the weights the same way, and which against each other."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.analyze import GradientSimilarity
from ..diffusion.timesteps import TimestepRange, range_index
from ..errors import UserError
from ..merging.arithmetic import Tensors
from .fixed import FixedImages, fixed_images
from .gradients import GradientRows, Grams, Sketch, grams_of, layer_of, next_prime
from .style import SIGNED, plt, range_colours, range_label, signed_map
from .subject import Cost, Finding, Progress, Subject

TITLE = "Similarity of gradients"
CAPTIONS = {
    "": "Cosine of the loss's gradients at every two timesteps, on the same images and noise. Left all images at once, "
    "as is usual. In the middle two disjoint halves of them, so that noise doesn't shrink it; the diagonal shows the "
    "cosine of the halves at one timestep, 1 where there is no noise; grey is where noise is all that was found. Right "
    "the histograms of the left map.",
    "layers": "Mean cosine in each layer, within each range and between every two.",
    "training": "The left map at checkpoints of the base's training.",
}
NEEDS = ()
# Timesteps whose gradients are kept together.
BLOCK = 4
NUM_BINS = 80
# More rows can't be read.
MAX_LAYERS = 60
BASE = "base"
# Below this cosine of a gradient with itself, from other images, nearly all of it is noise.
LOUD = 0.1


def _settings(subject: Subject) -> GradientSimilarity:
    return subject.settings.gradient_similarity


def _timesteps(subject: Subject) -> Tensor:
    total, stride = subject.base.num_train_timesteps, _settings(subject).stride
    if total < 2 * stride:
        raise UserError(f"gradient_similarity.stride is {stride}, expected at most {total // 2}, half of the timesteps")
    return subject.base.process.spread(TimestepRange(0, total), total // stride)


def _sketch(subject: Subject) -> Sketch:
    settings = _settings(subject)
    sizes = {k: v.numel() for k, v in subject.base.network.state_dict().items() if v.is_floating_point()}
    groups: dict[str, list[str]] = {}
    for key in sizes:
        groups.setdefault(layer_of(key) if settings.per_layer else "all", []).append(key)
    num_bytes = 2 * 4 * len(_timesteps(subject)) * sum(sizes.values())
    is_whole = num_bytes <= settings.max_gigabytes * 1e9
    return Sketch(groups, None if is_whole else next_prime(settings.num_projected), subject.settings.seed)


def _width(subject: Subject, sketch: Sketch) -> int:
    return sum(sketch.widths(subject.base.network.state_dict()))


def cost(subject: Subject) -> Cost:
    """Count the gradients, and the bytes of those that are compared."""
    num, num_networks = len(_timesteps(subject)), 1 + len(subject.checkpoints)
    num_bytes = 2 * 4 * num * _width(subject, _sketch(subject))
    return Cost(num_backward=num * num_networks * (_settings(subject).num_images // 2 * 2), num_bytes=num_bytes)


@dataclass(frozen=True)
class _Maps:
    """Of one network: inner products by group, and the error of the projection."""

    grams: dict[str, Grams]
    norm_error: float

    @property
    def whole(self) -> Grams:
        first, *others = self.grams.values()
        return sum(others, first)


def compute(subject: Subject) -> Generator[str | Progress, None, Finding]:
    """Compare the gradients of the loss at every two timesteps; yields lines for the user and how far it is.

    Returns:
        A row for each network (the base; a checkpoint of its training), layer (``all``; with ``per_layer`` each) and
        pair of ranges: mean, smallest and largest cosine, and the share of those below 0, of the usual estimate, and
        the median of that from two halves; the same timestep twice doesn't count. Maps and histograms are arrays.
    """
    t, sketch = _timesteps(subject), _sketch(subject)
    images = fixed_images(subject, _settings(subject).num_images // 2 * 2)
    if sketch.size is not None:
        error = sketch.size**-0.5
        yield f"gradients are projected to {sketch.size} numbers: a cosine near 0 has an error of {error:.3f}"
    networks: dict[str, Any] = {str(update): load for update, load in subject.checkpoints.items()}
    networks[BASE] = subject.base.network.state_dict
    places = [range_index(list(subject.ranges), float(one)) for one in t]
    rows: list[dict[str, Any]] = []
    arrays = {"timesteps": t.numpy()}
    errors = {}
    for name, load in networks.items():
        maps = yield from _maps(subject, name, load(), images, t, sketch)
        errors[name] = maps.norm_error
        layers = maps.grams if len(sketch.groups) > 1 else {}
        for layer, grams in {"all": maps.whole, **layers}.items():
            rows += [{"network": name, "layer": layer, **row} for row in _pairs(subject, grams, places)]
        usual, halves = (found.float().numpy() for found in (maps.whole.usual(), maps.whole.halves()))
        arrays |= {f"usual-{name}": usual, f"halves-{name}": halves}
        if layers:
            arrays[f"layers-{name}"] = np.stack([grams.usual().float().numpy() for grams in layers.values()])
        arrays[f"histograms-{name}"] = _histograms(maps.whole.usual(), places, len(subject.ranges))
    summary = {
        "ranges": [[r.low, r.high] for r in subject.ranges],
        "num_timesteps": len(t),
        "num_train_timesteps": subject.base.num_train_timesteps,
        "num_images": len(images),
        "projected_to": sketch.size,
        "cosine_error": None if sketch.size is None else sketch.size**-0.5,
        "measured_norm_error": errors if sketch.size is not None else None,
        **_statistics(arrays[f"usual-{BASE}"], arrays[f"halves-{BASE}"], np.array(places)),
    }
    return Finding(rows, summary, _sentence(summary), arrays)


def _maps(
    subject: Subject, name: str, weights: Tensors, images: FixedImages, t: Tensor, sketch: Sketch
) -> Generator[Progress, None, _Maps]:
    rows, norms = [], []
    computer: GradientRows | None = None

    def make(block: Tensor) -> Tensors:
        nonlocal computer
        if computer is None:
            computer = GradientRows(subject.base, weights, sketch, subject.device, subject.batch_size)
        found = [computer.halves(images, one) for one in block]
        return {"rows": torch.stack([f[0] for f in found]), "norms": torch.stack([f[1] for f in found])}

    label = "gradient-similarity" if name == BASE else f"gradient-similarity at update {name}"
    for index, block in enumerate(t.split(BLOCK)):
        yield Progress(label, index * BLOCK, len(t))
        part = subject.kept.get(f"{name}-{index:04}", make, block)
        rows.append(part["rows"])
        norms.append(part["norms"])
    yield Progress(label, len(t), len(t))
    whole = torch.cat(rows)
    grams = dict(zip(sketch.groups, grams_of(whole, sketch.widths(weights)), strict=True))
    maps = _Maps(grams, 0.0)
    found = torch.stack([maps.whole.aa.diagonal(), maps.whole.bb.diagonal()], 1)
    error = (found / torch.cat(norms).clamp(min=1e-300) - 1).square().mean().sqrt()
    return _Maps(grams, float(error))


def _pairs(subject: Subject, grams: Grams, places: list[int]) -> Iterator[dict[str, Any]]:
    usual, halves, at = grams.usual().numpy(), grams.halves().numpy(), np.array(places)
    for i, first in enumerate(subject.ranges):
        for j, second in list(enumerate(subject.ranges))[i:]:
            chosen = (at[:, None] == i) & (at[None] == j) & ~np.eye(len(at), dtype=bool)
            if not chosen.any():
                continue
            values, other = usual[chosen], halves[chosen]
            other = other[np.isfinite(other)]
            yield {
                "first_low": first.low,
                "first_high": first.high,
                "second_low": second.low,
                "second_high": second.high,
                "mean": float(values.mean()),
                "smallest": float(values.min()),
                "largest": float(values.max()),
                "negative_share": float((values < 0).mean()),
                # Where noise is most of it, single ones are anything.
                "halves_median": float(np.median(other)) if len(other) else None,
            }


def _histograms(usual: Tensor, places: list[int], num_ranges: int) -> np.ndarray:
    """Count the cosines of pairs, over all timesteps and inside each range, in bins over [-1, 1]: [1 + N, bins]."""
    at, above = np.array(places), np.triu_indices(len(places), 1)
    values, same = usual.numpy()[above], np.where(at[above[0]] == at[above[1]], at[above[0]], -1)
    groups = [values, *(values[same == index] for index in range(num_ranges))]
    return np.stack([np.histogram(group.clip(-1, 1), NUM_BINS, (-1, 1))[0] for group in groups])


def _statistics(usual: np.ndarray, halves: np.ndarray, at: np.ndarray) -> dict[str, float | None]:
    others, same = ~np.eye(len(at), dtype=bool), at[:, None] == at[None]

    def mean(values: np.ndarray, chosen: np.ndarray, average: Callable[[np.ndarray], Any] = np.mean) -> float | None:
        found = values[chosen & np.isfinite(values)]
        return float(average(found)) if len(found) else None

    return {
        "neighbours": float(usual.diagonal(1).mean()) if len(at) > 1 else None,
        "inside_ranges": mean(usual, same & others),
        "between_ranges": mean(usual, ~same),
        "halves_inside_ranges": mean(halves, same & others, np.median),
        "halves_between_ranges": mean(halves, ~same, np.median),
        "negative_share": mean((usual < 0).astype(float), others),
        "noise_ceiling": float(halves.diagonal().mean()),
        "undefined_share": float(np.isnan(halves[others]).mean()) if others.any() else 0.0,
    }


def _sentence(summary: dict[str, Any]) -> str:
    # A pair's cosine is that of its noise then, and the medians are of what happened to come out above 0.
    if not summary["noise_ceiling"] >= LOUD or summary["undefined_share"] > 0.5:
        return (
            f"Most of these gradients is noise: one timestep's, from two halves of {summary['num_images']} images, "
            f"have a mean cosine of {summary['noise_ceiling']:.2f}. Set gradient_similarity.num_images higher."
        )
    inside, between, negative = (summary[k] for k in ("inside_ranges", "between_ranges", "negative_share"))
    if inside is None or between is None:
        return f"{(negative or 0):.0%} of the pairs of timesteps have gradients that conflict."
    found = [summary[f"halves_{k}"] for k in ("inside_ranges", "between_ranges")]
    quiet = "" if None in found else " From two halves of the images the medians are {:.2f} and {:.2f}.".format(*found)
    return (
        f"Gradients at two timesteps of one range have a mean cosine of {inside:.2f}, of two ranges {between:.2f}; "
        f"{negative:.0%} of all pairs conflict.{quiet}"
    )


def draw(finding: Finding) -> dict[str, Any]:
    """Draw both maps and the histograms; the layers, and the checkpoints of a training, where there are some."""
    figures = {"": _draw_maps(finding)}
    if len({row["layer"] for row in finding.rows}) > 1:
        figures["layers"] = _draw_layers(finding)
    if len({row["network"] for row in finding.rows}) > 1:
        figures["training"] = _draw_training(finding)
    return figures


def _draw_map(axis: Any, values: np.ndarray, summary: dict[str, Any], title: str) -> Any:
    end = summary["num_train_timesteps"]
    image = axis.imshow(values, cmap=SIGNED, vmin=-1, vmax=1, extent=(0, end, end, 0), interpolation="nearest")
    for _, edge in summary["ranges"][:-1]:
        axis.axvline(edge, color="black", linewidth=0.5)
        axis.axhline(edge, color="black", linewidth=0.5)
    axis.set_facecolor("0.8")
    axis.set_title(title, fontsize=10)
    axis.set(xlabel="timestep")
    return image


def _draw_maps(finding: Finding) -> Any:
    summary = finding.summary
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    _draw_map(left, finding.arrays[f"usual-{BASE}"], summary, f"cosine, {summary['num_images']} images")
    title = "cosine from two halves; diagonal: noise ceiling; grey: noise alone"
    image = _draw_map(middle, finding.arrays[f"halves-{BASE}"], summary, title)
    left.set(ylabel="timestep")
    figure.colorbar(image, ax=[left, middle], shrink=0.8)
    counts = finding.arrays[f"histograms-{BASE}"]
    names = ["all timesteps", *(range_label(*r) for r in summary["ranges"])]
    for place, (count, colour) in enumerate(zip(counts, ["black", *range_colours(len(counts) - 1)], strict=True)):
        heights = place - 0.85 * count / max(1, count.max())
        right.stairs(heights, np.linspace(-1, 1, NUM_BINS + 1), baseline=place, color=colour, fill=True)
    right.axvline(0, color="0.6", linewidth=0.8)
    right.set(xlabel="cosine", xlim=(-1, 1), xticks=(-1, -0.5, 0, 0.5, 1))
    right.set(ylim=(len(names) - 0.9, -1), yticks=range(len(names)), yticklabels=names)
    right.set_title("pairs of timesteps, each row by its highest bin", fontsize=10)
    return figure


def _draw_layers(finding: Finding) -> Any:
    rows = [row for row in finding.rows if row["network"] == BASE]
    whole, *layers = dict.fromkeys(row["layer"] for row in rows)
    step = -(-len(layers) // MAX_LAYERS)
    layers = [whole, *layers[::step]]
    numbers = {r[0]: i for i, r in enumerate(finding.summary["ranges"])}
    pairs = list(dict.fromkeys((numbers[row["first_low"]], numbers[row["second_low"]]) for row in rows))
    values = np.full((len(layers), len(pairs)), np.nan)
    for row in rows:
        place = pairs.index((numbers[row["first_low"]], numbers[row["second_low"]]))
        if row["layer"] in layers:
            values[layers.index(row["layer"]), place] = row["mean"]
    labels = [f"range {i} and {j}" if i != j else f"within range {i}" for i, j in pairs]
    size = (4 + 0.6 * len(pairs), 1.5 + 0.2 * len(layers))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    figure.colorbar(signed_map(axis, values, layers, labels, 7), ax=axis, shrink=0.5)
    axis.tick_params(axis="y", labelsize=7)
    axis.set_title("mean cosine" if step == 1 else f"mean cosine, one layer in {step}", fontsize=10)
    return figure


def _draw_training(finding: Finding) -> Any:
    names = list(dict.fromkeys(row["network"] for row in finding.rows))
    num_columns = min(4, len(names))
    num_rows = -(-len(names) // num_columns)
    size = (3.2 * num_columns + 1, 3.3 * num_rows)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        title = "finished" if name == BASE else f"update {int(name):,}"
        image = _draw_map(axis, finding.arrays[f"usual-{name}"], finding.summary, title)
    figure.colorbar(image, ax=axes, shrink=0.6)
    return figure
