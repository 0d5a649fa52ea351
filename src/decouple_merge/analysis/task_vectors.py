"""Task vectors: how long they are in each layer, how they lie to each other, and how many directions they use."""

from collections.abc import Generator, Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..merging.arithmetic import Tensors, versions
from .subject import Finding, Subject

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
    return Finding(rows, summary)


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


def draw(finding: Finding) -> Any:
    """Draw the cosines as a map around 0, and for each range the sizes of its layers' changes as boxes."""
    matrix = np.array(finding.summary["cosines"])
    ranges = list(dict.fromkeys((row["low"], row["high"]) for row in finding.rows))
    labels = [f"[{low:g}, {high:g})" for low, high in ranges]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(1, 1.4))
    off = matrix[~np.eye(len(matrix), dtype=bool)]
    limit = max(0.1, float(np.abs(off).max(initial=0.0)))
    image = left.imshow(np.where(np.eye(len(matrix)), np.nan, matrix), cmap="RdBu_r", vmin=-limit, vmax=limit)
    for i, j in np.ndindex(*matrix.shape):
        is_dark = i != j and abs(matrix[i, j]) > 0.6 * limit
        colour = "white" if is_dark else "black"
        left.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=9, color=colour)
    left.set(xticks=range(len(labels)), yticks=range(len(labels)), title="cosine of task vectors")
    left.set_xticklabels(labels, rotation=30, ha="right")
    left.set_yticklabels(labels)
    figure.colorbar(image, ax=left, shrink=0.8)
    sizes = [[r["mean_size"] for r in finding.rows if (r["low"], r["high"]) == own] for own in ranges]
    boxes = right.boxplot(sizes, tick_labels=labels, patch_artist=True, medianprops={"color": "black"})
    for index, box in enumerate(boxes["boxes"]):
        box.set_facecolor(plt.get_cmap("viridis")(0.25 + 0.65 * index / max(1, len(ranges) - 1)))
    right.set(yscale="log", ylabel="mean |τ| of a tensor", xlabel="timesteps", title="size of the change, each tensor")
    return figure
