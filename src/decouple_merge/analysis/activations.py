"""Activations before and after: the change of their means by channel and by pixel, and how alike they stay."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config.analyze import Activations
from ..errors import UserError
from ..merging.arithmetic import Tensors
from ..models.network import build_network, predict
from .fixed import FixedImages, fixed_images
from .style import SIGNED, plt, range_label
from .subject import Cost, Finding, Progress, Subject

TITLE = "Activations before and after"
CAPTIONS = {
    "": "Linear CKA of each block's output with the pretrained model's, at one timestep of each range: left of the "
    "range's own expert, right of the merge. 1 is the same up to rotation and scale.",
    "channels": "Change of each channel's mean activation from the pretrained model to the range's own expert; a row "
    "is a timestep.",
    "pixels": "Change of the mean activation at each pixel from the pretrained model to the range's own expert.",
}
NEEDS = ("experts", "merged")
NAME = "activations"
# More can't be told from each other in a figure.
MAX_BLOCKS = 9
MODELS = ("expert", "merged")


def _settings(subject: Subject) -> Activations:
    return subject.settings.activations


def _timesteps(subject: Subject) -> list[float]:
    process = subject.base.process
    middles = [float(process.spread(own, 1)[0]) for own in subject.ranges]
    chosen = _settings(subject).timesteps
    for t in chosen or ():
        if not any(t in own for own in subject.ranges):
            raise UserError(f"activations.timesteps has {t:g}, expected some within 0 to {subject.ranges[-1].high:g}")
        if t != int(t) and not process.spread(subject.ranges[0], 1).is_floating_point():
            raise UserError(f"activations.timesteps has {t:g}, expected whole numbers: the base's schedule is a table")
    return chosen or middles


def _layers(subject: Subject, network: nn.Module) -> dict[str, Any]:
    layers, chosen = subject.base.family.output_layers(network), _settings(subject).blocks
    for name in chosen or ():
        if name not in layers:
            raise UserError(f"activations.blocks has {name!r}, expected some of {', '.join(layers)}")
    return {name: layers[name] for name in chosen} if chosen else layers


def cost(subject: Subject) -> Cost:
    """Count the images that go through base, expert and merge."""
    _layers(subject, subject.base.network)
    return Cost(num_forward=3 * _settings(subject).num_images * len(_timesteps(subject)))


def linear_cka(a: Float[Tensor, "n p"], b: Float[Tensor, "n q"]) -> float:
    """Compute the linear CKA of two representations of n >= 4 samples, by the unbiased HSIC.

    HSIC(K, L) ∝ tr(K·L) + (1ᵀK1)(1ᵀL1) / ((n - 1)(n - 2)) - 2·1ᵀKL1 / (n - 2), with K = a·aᵀ and L = b·bᵀ without
    their diagonals (Song et al. 2012, Eq. 5); CKA = HSIC(K, L) / √(HSIC(K, K)·HSIC(L, L)) (Kornblith et al. 2019,
    Nguyen et al. 2021). At most 1; around 0, and maybe below, for unrelated ones. NaN where one is constant.
    """
    k, l = (x.double() @ x.double().T for x in (a - a.mean(0), b - b.mean(0)))  # noqa: E741
    n = len(k)
    for gram in (k, l):
        gram.fill_diagonal_(0)

    def hsic(x: Tensor, y: Tensor) -> float:
        return float((x * y).sum() + x.sum() * y.sum() / ((n - 1) * (n - 2)) - 2 * (x.sum(0) @ y.sum(0)) / (n - 2))

    size = hsic(k, k) * hsic(l, l)
    return hsic(k, l) / size**0.5 if size > 0 else float("nan")


@contextmanager
def recorded(layers: dict[str, Any]) -> Iterator[dict[str, list[Tensor]]]:
    """Keep what layers write while the context lasts, on the CPU in float32, batch by batch."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: found[name].append(output.detach().float().cpu())

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def channels_first(found: Tensor) -> Float[Tensor, "n c p"]:
    """Lay out feature maps [n, c, h, w] or tokens [n, p, c] as channels and places."""
    return found.flatten(2) if found.dim() == 4 else found.transpose(1, -1).flatten(2)


@torch.no_grad()
def _activations(subject: Subject, weights: Tensors, images: FixedImages, t: float) -> dict[str, Tensor]:
    network, device = build_network(subject.base, weights), subject.device
    times = torch.full((len(images),), t).to(subject.base.process.spread(subject.ranges[0], 1).dtype)
    network.to(device)
    with recorded(_layers(subject, network)) as found:
        for batch in images.batches(times, subject.batch_size):
            condition = {name: value.to(device) for name, value in batch.condition.items()}
            predict(subject.base, network, batch.x_t.to(device), batch.t.to(device), **condition)
    # Of two denoisers one alone is called at a timestep.
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def compute(subject: Subject) -> Generator[str | Progress, None, Finding]:
    """Compare what the blocks write before and after finetuning and merging; yields how far it is.

    A block's output is that of the layer which writes it, as ``Family.output_layers`` says.

    Returns:
        A row for each timestep, model (the range's ``expert``, or ``merged``) and block: linear CKA with the base, and
        ‖change‖/‖before‖ of the mean activations by channel and by place. The means' changes are arrays, by timestep,
        model and block.
    """
    images, timesteps = fixed_images(subject, _settings(subject).num_images), _timesteps(subject)
    assert subject.merged is not None
    rows: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    for index, t in enumerate(timesteps):
        yield Progress(NAME, index, len(timesteps))
        own = next(i for i, r in enumerate(subject.ranges) if t in r)
        models = {"expert": subject.experts[own], "merged": subject.merged}
        part = subject.kept.get(f"{index}", _compare, subject, models, images, t)
        for key, value in part.items():
            kind, model, block = key.split("|")
            if kind == "numbers":
                names = ("cka", "channel_change", "place_change")
                numbers = {n: float(v) if np.isfinite(v) else None for n, v in zip(names, value.tolist(), strict=True)}
                rows.append({"timestep": t, "range": own, "model": model, "block": block, **numbers})
            else:
                arrays[f"{kind}|{index}|{model}|{block}"] = value.numpy()
    yield Progress(NAME, len(timesteps), len(timesteps))
    order = list(_layers(subject, subject.base.network))
    rows.sort(key=lambda row: (timesteps.index(row["timestep"]), row["model"], order.index(row["block"])))
    summary = {"timesteps": timesteps, "ranges": [[r.low, r.high] for r in subject.ranges], "blocks": order}
    return Finding(rows, summary, _sentence(rows), arrays)


def _compare(subject: Subject, models: dict[str, Tensors], images: FixedImages, t: float) -> Tensors:
    found: Tensors = {}
    before = _activations(subject, subject.base.network.state_dict(), images, t)
    for model, weights in models.items():
        for block, after in _activations(subject, weights, images, t).items():
            start, end = channels_first(before[block]), channels_first(after)
            numbers = [linear_cka(start.flatten(1), end.flatten(1))]
            for kind, axes in (("channels", (0, 2)), ("places", (0, 1))):
                old, new = start.double().mean(axes), end.double().mean(axes)
                numbers.append(float((new - old).norm() / old.norm().clamp(min=1e-300)))
                change = (new - old).float()
                if kind == "places" and after.dim() == 4:
                    change = change.view(after.shape[2:])
                found[f"{kind}|{model}|{block}"] = change
            found[f"numbers|{model}|{block}"] = torch.tensor(numbers, dtype=torch.float64)
    return found


def _sentence(rows: list[dict[str, Any]]) -> str:
    known = [row for row in rows if row["cka"] is not None and row["model"] == "expert"]
    if not known:
        return "No block's output varies between images."
    least = min(known, key=lambda row: row["cka"])
    mean = np.mean([row["cka"] for row in known])
    return (
        f"The expert changes {least['block']} at timestep {least['timestep']:g} most: linear CKA {least['cka']:.3f} "
        f"with the pretrained model; the mean over blocks and timesteps is {mean:.3f}."
    )


def draw(finding: Finding) -> dict[str, Any]:
    """Draw CKA by block and timestep, and the changes of channels and pixels by the experts."""
    return {"": _draw_cka(finding), "channels": _draw_channels(finding), "pixels": _draw_pixels(finding)}


def _labels(finding: Finding) -> list[str]:
    ranges = finding.summary["ranges"]
    owners = [next(r for r in ranges if r[0] <= t < r[1]) for t in finding.summary["timesteps"]]
    return [f"t = {t:g}, {range_label(*r)}" for t, r in zip(finding.summary["timesteps"], owners, strict=True)]


def _shown(finding: Finding) -> list[str]:
    blocks = [b for b in finding.summary["blocks"] if _changes(finding, "channels", b)]
    return blocks[:: -(-len(blocks) // MAX_BLOCKS)]


def _changes(finding: Finding, kind: str, block: str) -> dict[int, np.ndarray]:
    """Find a block's changes by the expert, by the timestep's place: of two denoisers one alone runs at a timestep."""
    keys = {i: f"{kind}|{i}|expert|{block}" for i in range(len(finding.summary["timesteps"]))}
    return {i: finding.arrays[key] for i, key in keys.items() if key in finding.arrays}


def _draw_cka(finding: Finding) -> Any:
    blocks, labels = finding.summary["blocks"], _labels(finding)
    size = (5 + 1.5 * len(labels), 1.6 + 0.32 * len(blocks))
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    found = {(row["model"], row["block"], row["timestep"]): row["cka"] for row in finding.rows}
    # They are often all near 1.
    low = min(0.9, float(np.floor(10 * min((v for v in found.values() if v is not None), default=1.0)) / 10))
    for axis, model in zip(axes, MODELS, strict=True):
        each = [[found.get((model, block, t)) for t in finding.summary["timesteps"]] for block in blocks]
        values = np.array(each, dtype=float)
        image = axis.imshow(values, cmap="viridis", vmin=low, vmax=1, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            colour = "white" if value < 0.4 * low + 0.6 else "black"
            told = f"{value:.3f}" if np.isfinite(value) else ""
            axis.text(j, i, told, ha="center", va="center", color=colour, size=8)
        axis.set(xticks=range(len(labels)), yticks=range(len(blocks)), title=f"pretrained and {model}")
        axis.set_xticklabels(labels, rotation=30, ha="right", fontsize=8)
        axis.set_yticklabels(blocks, fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8).set_label("linear CKA")
    return figure


def _draw_channels(finding: Finding) -> Any:
    blocks, labels = _shown(finding), _labels(finding)
    size = (9, 0.8 + len(blocks) * (0.5 + 0.16 * len(labels)))
    figure, axes = plt.subplots(len(blocks), 1, figsize=size, layout="constrained", squeeze=False)
    for axis, block in zip(axes[:, 0], blocks, strict=True):
        found = _changes(finding, "channels", block)
        values = np.full((len(labels), len(next(iter(found.values())))), np.nan)
        for i, change in found.items():
            values[i] = change
        limit = max(float(np.nanmax(np.abs(values))), 1e-12)
        image = axis.imshow(values, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        axis.set(yticks=range(len(labels)), xticks=[])
        axis.set_yticklabels(labels, fontsize=6)
        axis.set_title(f"{block}, {values.shape[1]} channels", fontsize=8, loc="left")
        figure.colorbar(image, ax=axis, aspect=8).ax.tick_params(labelsize=6)
    return figure


def _draw_pixels(finding: Finding) -> Any:
    blocks, labels = _shown(finding), _labels(finding)
    size = (1.5 * len(blocks) + 1.5, 1.6 * len(labels) + 0.5)
    figure, axes = plt.subplots(len(labels), len(blocks), figsize=size, layout="constrained", squeeze=False)
    for column, block in enumerate(blocks):
        maps = _changes(finding, "places", block)
        limit = max(*(float(np.abs(values).max()) for values in maps.values()), 1e-12)
        for row, axis in enumerate(axes[:, column]):
            if row in maps:
                square = _as_square(maps[row])
                axis.imshow(square, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if column == 0:
                axis.set_ylabel(labels[row].replace(", ", "\n", 1), fontsize=8)
        axes[0, column].set_title(f"{block}\n±{limit:.2g}", fontsize=7)
    return figure


def _as_square(values: np.ndarray) -> np.ndarray:
    """Lay tokens out as the square that they were cut from; as a row where they are none, as with texts among them."""
    if values.ndim == 2:
        return values
    side = round(values.size**0.5)
    return values.reshape(side, side) if side**2 == values.size else values[None]
