"""DeMe as a weighting of the loss: what its merging weights amount to, beside weightings that are known."""

from collections.abc import Generator
from typing import Any

import numpy as np
import torch

from ..diffusion.timesteps import TimestepRange, range_index
from ..diffusion.weightings import WEIGHTINGS
from ..merging.arithmetic import Tensors
from .style import label_ends, plt
from .subject import Cost, Finding, Subject
from .task_vectors import gram_matrix

TITLE = "The merge as a weighting of the loss"
CAPTIONS = {
    "": "To first order a merge is finetuning with weights w(t) = w_i on range i (the paper's supplement, 1.2). Left "
    "the weight of the squared error of x0 that this amounts to, beside known weightings; right the same over that of "
    "a plain loss of the network's output.",
    "other": "Cosines of the changes of the weights: the merge, and models of the other run.",
}
NEEDS = ("experts", "merged")
NUM_POINTS = 200
# How each is called in the figure.
NAMES = {
    "standard": "SNR",
    "snr_plus_one": "SNR + 1",
    "truncated_snr": "max(SNR, 1)",
    "min_snr": "min(SNR, 5)",
    "p2": "P2",
}


def cost(subject: Subject) -> Cost:
    """Say that no network runs."""
    return Cost()


def compute(subject: Subject) -> Generator[str, None, Finding]:
    """Compute the weights w(t) of the merge and of known weightings; yields lines for the user.

    The merge's are those of the linear merge that is nearest to it: w = G⁻¹·⟨τ_m, τ_i⟩, with G the inner products of
    the task vectors. Of a linear merge they are its merging weights.

    Returns:
        A row for each of evenly spread timesteps: SNR, and in x0-space the merge's weight and each of the known ones.
        With another run the summary has the cosine of its models' changes with the merge's.
    """
    assert subject.merged is not None
    base, process = subject.base.network.state_dict(), subject.base.process
    gram = gram_matrix(base, [*subject.experts, subject.merged])
    num = len(subject.experts)
    weights = torch.linalg.lstsq(gram[:num, :num], gram[:num, num], driver="gelsd").solution
    size = float(gram[num, num])
    share = float(weights @ gram[:num, :num] @ weights) / size if size else 1.0
    listed = ", ".join(f"{own} {w:.3f}" for own, w in zip(subject.ranges, weights.tolist(), strict=True))
    yield f"weights of the nearest linear merge: {listed}; it holds {share:.1%} of the merge's squared change"
    t = process.spread(TimestepRange(0, process.num_train_timesteps), min(NUM_POINTS, process.num_train_timesteps))
    # A loss of the output weighs the error of x0 by this.
    plain = 1 / process.x0_error(t).double()
    own = torch.tensor([weights[range_index(list(subject.ranges), float(one))] for one in t], dtype=torch.float64)
    if (trained := subject.weight(process, t)) is not None:
        own = own * trained.double()
    snr = process.snr(t).double()
    columns = {"merge": own * plain, **{name: WEIGHTINGS[name](snr) for name in NAMES}}
    rows = [
        {"timestep": float(one), "snr": float(snr[i]), "plain": float(plain[i])}
        | {name: float(values[i]) for name, values in columns.items()}
        for i, one in enumerate(t)
    ]
    cosines = {name: _cosine(base, subject.merged, other) for name, other in subject.others.items()}
    yield from (f"the change of {name} has the cosine {c:.3f} with the merge's" for name, c in cosines.items())
    summary = {
        "ranges": [[r.low, r.high] for r in subject.ranges],
        "weights": weights.tolist(),
        "share_of_change": share,
        "cosines": cosines,
    }
    return Finding(rows, summary, _sentence(summary))


def _cosine(base: Tensors, merged: Tensors, other: Tensors) -> float:
    gram = gram_matrix(base, [merged, other])
    size = float((gram[0, 0] * gram[1, 1]).sqrt())
    return float(gram[0, 1]) / size if size else 0.0


def _sentence(summary: dict[str, Any]) -> str:
    listed = ", ".join(f"{w:.2f}" for w in summary["weights"])
    start = f"The merge weighs the ranges, the cleanest first, by {listed}"
    if not summary["cosines"]:
        return f"{start}."
    name, cosine = max(summary["cosines"].items(), key=lambda item: item[1])
    return f"{start}; its change and that of {name} have a cosine of {cosine:.2f}."


def draw(finding: Finding) -> dict[str, Any]:
    """Draw w(t) in x0-space, and over the plain loss; and the cosines, where another run was given."""
    cosines = finding.summary["cosines"]
    return {"": _draw_weights(finding)} | ({"other": _draw_cosines(cosines)} if cosines else {})


def _draw_weights(finding: Finding) -> Any:
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    t, plain = (np.array([row[name] for row in finding.rows]) for name in ("timestep", "plain"))
    # Okabe and Ito's, which the colour-blind tell apart.
    colours = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"]
    lines = [("merge", "the merge", "black"), *((k, v, c) for (k, v), c in zip(NAMES.items(), colours, strict=True))]
    ends: tuple[list[Any], list[Any]] = ([], [])
    for key, name, colour in lines:
        values = np.array([row[key] for row in finding.rows])
        width = 2.6 if key == "merge" else 1.5
        for axis, heights, end in ((left, values, ends[0]), (right, values / plain, ends[1])):
            axis.plot(t, heights, color=colour, linewidth=width)
            end.append((t[-1], heights[-1], name, colour))
    left.set(xlabel="timestep", title="weight of the error of x0")
    left.set_yscale("symlog", linthresh=max(1e-4, float(np.abs(plain).min())))
    right.set(xlabel="timestep", title="the same over a plain loss of the output")
    right.set_yscale("symlog", linthresh=0.1)
    for axis, end in zip((left, right), ends, strict=True):
        axis.set_xlim(0, t[-1])
        axis.spines[["top", "right"]].set_visible(False)
        axis.axhline(0, color="0.6", linewidth=0.5)
        for _, edge in finding.summary["ranges"][:-1]:
            axis.axvline(edge, color="0.85", linewidth=0.8, zorder=0)
        figure.draw_without_rendering()
        label_ends(axis, end)
    return figure


def _draw_cosines(cosines: dict[str, float]) -> Any:
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.4 * len(cosines)), layout="constrained")
    bars = axis.barh(list(cosines), list(cosines.values()), color="0.4")
    axis.bar_label(bars, fmt="{:.2f}", padding=3)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set(xlabel="cosine of the change with the merge's", xlim=(-1, 1))
    return figure
