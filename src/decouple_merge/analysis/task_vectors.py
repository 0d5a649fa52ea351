"""Task vectors: how long they are in each layer, how they lie to each other, and how many directions they use."""

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..merging.arithmetic import Tensors, versions
from .style import plt, range_colours, range_label, signed_map
from .subject import Cost, Finding, Subject

TITLE = "Task vectors"
CAPTIONS = {
    "": "Cosines of the task vectors of every two ranges, how long they are relative to the base's weights, and how "
    "many of the directions that a tensor has each of them uses.",
    "layers": "Entries of the task vectors in each layer and range: the box holds the middle half, the line 90 %.",
}
NEEDS = ("experts",)
# More rows can't be read.
MAX_LAYERS = 60
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def task_vectors(base: Tensors, experts: list[Tensors]) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """Yield each floating tensor's key, the base's values and every τ_i = θ_i - θ (DeMe, Eq. 8), in float32."""
    for key, (start, *others) in versions(base, experts):
        if start.is_floating_point():
            yield key, start.float(), [other.float() - start.float() for other in others]


def gram_matrix(base: Tensors, experts: list[Tensors]) -> Float[Tensor, "n n"]:
    """Compute the inner products of the task vectors over all tensors, float64."""
    gram = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for _, _, vectors in task_vectors(base, experts):
        flat = torch.stack([v.flatten() for v in vectors]).double()
        gram += flat @ flat.T
    return gram


def cosines(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Compute pairwise cosines from inner products; that of a vector of zeros is 0."""
    norms = gram.diagonal().sqrt()
    return torch.where(gram == 0, 0.0, gram / torch.outer(norms, norms).clamp(min=torch.finfo(torch.float64).tiny))


def sign_agreement(base: Tensors, experts: list[Tensors]) -> float:
    """Compute the share of the entries that all experts move the same way; of N random vectors it is 2^(1 - N)."""
    num_alike = num_entries = 0
    for _, _, vectors in task_vectors(base, experts):
        signs = torch.stack(vectors).sign()
        num_alike += int(((signs == signs[0]).all(0) & (signs[0] != 0)).sum())
        num_entries += signs[0].numel()
    return num_alike / num_entries


def effective_rank(matrix: Float[Tensor, "rows columns"]) -> float:
    """Compute exp of the entropy of the normalised singular values (Roy & Vetterli 2007): 1 to the number of them.

    A matrix of zeros has 0.
    """
    values = torch.linalg.svdvals(matrix.double())
    if not bool(values.any()):
        return 0.0
    shares = values / values.sum()
    return float(torch.exp(torch.special.entr(shares).sum()))


def cost(subject: Subject) -> Cost:
    """Say that the experts are read, a tensor at a time, and no network runs."""
    return Cost()


def compute(subject: Subject) -> Generator[str, None, Finding]:
    """Describe the task vectors of each layer and range; yields lines for the user.

    Returns:
        A row for each tensor and range: norm, norm relative to the base's, mean size and quantiles of the entries, and
        of matrices and kernels, which are flattened behind their first dimension, the effective rank over the largest
        possible. The summary holds norms, cosines and the share of entries with equal signs.
    """
    base, experts = subject.base.network.state_dict(), subject.experts
    num = sum(v.numel() for v in base.values())
    yield f"task vectors: {len(experts)} x {num:,} values, in memory a tensor at a time"
    rows: list[dict[str, Any]] = []
    for key, start, vectors in task_vectors(base, experts):
        for own, vector in zip(subject.ranges, vectors, strict=True):
            rows.append({"key": key, "low": own.low, "high": own.high} | _describe(start, vector))
    gram = gram_matrix(base, experts)
    size = float(sum(v.double().square().sum() for v in base.values() if v.is_floating_point())) ** 0.5
    summary: dict[str, Any] = {
        "norms": gram.diagonal().sqrt().tolist(),
        "relative_norms": (gram.diagonal().sqrt() / size).tolist(),
        "cosines": cosines(gram).tolist(),
        "sign_agreement": sign_agreement(base, experts),
        "sign_agreement_by_chance": 2.0 ** (1 - len(experts)),
    }
    relative, agreement = summary["relative_norms"], summary["sign_agreement"]
    yield "norms over the base's: " + ", ".join(
        f"{own} {n:.4f}" for own, n in zip(subject.ranges, relative, strict=True)
    )
    yield f"all signs agree in {agreement:.1%} of the entries, by chance {summary['sign_agreement_by_chance']:.1%}"
    return Finding(rows, summary, _sentence(subject, summary))


def _sentence(subject: Subject, summary: dict[str, Any]) -> str:
    matrix, relative = np.array(summary["cosines"]), summary["relative_norms"]
    longest = int(np.argmax(relative))
    length = f"the longest is that of {subject.ranges[longest]}, {relative[longest]:.2%} of the base's norm"
    off = matrix[~np.eye(len(matrix), dtype=bool)]
    if not len(off):
        return f"There is one task vector: {length}."
    return f"Cosines of task vectors are {off.min():.3f} to {off.max():.3f}; {length}."


def _describe(start: Tensor, vector: Tensor) -> dict[str, float | None]:
    norm, size = float(vector.double().norm()), float(start.double().norm())
    entries = vector.flatten().numpy()
    matrix = vector.flatten(1) if vector.dim() > 1 else vector[:, None]
    return {
        "norm": norm,
        "relative_norm": norm / size if size else None,
        "mean_size": float(np.abs(entries).mean()),
        **dict(zip((f"q{q:.2f}" for q in QUANTILES), map(float, np.quantile(entries, QUANTILES)), strict=True)),
        "relative_rank": effective_rank(matrix) / min(matrix.shape) if min(matrix.shape) > 1 else None,
    }


def draw(finding: Finding) -> dict[str, Any]:
    """Draw cosines around 0, norms and ranks; and the entries of each layer as boxes."""
    return {"": _draw_whole(finding), "layers": _draw_layers(finding)}


def _by_range(finding: Finding) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in finding.rows:
        rows.setdefault(range_label(row["low"], row["high"]), []).append(row)
    return rows


def _draw_whole(finding: Finding) -> Any:
    matrix, rows = np.array(finding.summary["cosines"]), _by_range(finding)
    labels, colours = list(rows), range_colours(len(rows))
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 3.8), layout="constrained", width_ratios=(1.2, 1, 1)
    )
    off = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)
    figure.colorbar(signed_map(left, off, labels), ax=left, shrink=0.8)
    left.set_title("cosine")
    bars = middle.barh(labels, finding.summary["relative_norms"], color=colours)
    middle.bar_label(bars, fmt="{:.2%}", padding=3)
    middle.set(title="‖τ‖ / ‖θ‖", xlim=(0, 1.25 * max(finding.summary["relative_norms"])))
    middle.xaxis.set_major_formatter("{x:.1%}")
    middle.invert_yaxis()
    ranks = [[r["relative_rank"] for r in of_range if r["relative_rank"] is not None] for of_range in rows.values()]
    boxes = right.boxplot(ranks, orientation="horizontal", tick_labels=labels, patch_artist=True)
    for box, line, colour in zip(boxes["boxes"], boxes["medians"], colours, strict=True):
        box.set_facecolor(colour)
        line.set_color("white")
    right.set(title="effective rank / largest, each tensor", xlim=(0, 1))
    right.invert_yaxis()
    agreement, chance = (finding.summary[f"sign_agreement{end}"] for end in ("", "_by_chance"))
    figure.suptitle(f"all signs agree in {agreement:.1%} of the entries, by chance in {chance:.1%}", fontsize=10)
    return figure


def _draw_layers(finding: Finding) -> Any:
    rows = _by_range(finding)
    names = [r["key"] for r in next(iter(rows.values())) if r["relative_rank"] is not None]
    step = -(-len(names) // MAX_LAYERS)
    places = {name: place for place, name in enumerate(names[::step])}
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.075 * len(rows) * len(places)), layout="constrained")
    for index, (label, colour) in enumerate(zip(rows, range_colours(len(rows)), strict=True)):
        shown = [row for row in rows[label] if row["key"] in places]
        at = [places[row["key"]] + 0.8 * ((index + 0.5) / len(rows) - 0.5) for row in shown]
        low, first, middle, last, high = (np.array([row[f"q{q:.2f}"] for row in shown]) for q in QUANTILES)
        axis.hlines(at, low, high, color=colour, linewidth=0.8)
        axis.barh(at, last - first, 0.7 / len(rows), first, color=colour, label=label)
        axis.plot(middle, at, "|", color="white", markersize=2)
    axis.set(yticks=range(len(places)), ylim=(len(places) - 0.5, -0.5), xlabel="entries of τ")
    axis.set_yticklabels([name.removesuffix(".weight") for name in places], fontsize=6)
    axis.axvline(0, color="0.5", linewidth=0.5, zorder=0)
    note = "" if step == 1 else f", one layer in {step}"
    axis.set_title(f"weights, the first layer on top{note}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(rows), frameon=False, fontsize=8)
    return figure
