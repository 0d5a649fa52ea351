"""The same seeds and prompts drawn by every model; which are shown is a rule, never a choice."""

import textwrap
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..config.analyze import Qualitative
from .style import plt
from .subject import Cost, Finding, Progress, Subject

TITLE = "The same seeds"
CAPTIONS = {
    "": "The first report seeds, drawn by every model from the same noise. Below, the root mean square difference of "
    "the merged model's image and the pretrained model's, of 255.",
    "largest": "Of the first report seeds those that the merged model changed most, by root mean square "
    "difference to the pretrained model's image; the largest change is left.",
}
NEEDS = ("experts", "merged", "models")
NAME = "qualitative"
# Images that are drawn and kept together.
BLOCK = 16
PRETRAINED, MERGED = "pretrained", "merged"


def _settings(subject: Subject) -> Qualitative:
    return subject.settings.qualitative


def cost(subject: Subject) -> Cost:
    """Count the calls of the networks for all candidates of all models."""
    return Cost(num_forward=len(subject.models) * _settings(subject).num_candidates * subject.calls_per_image)


def compute(subject: Subject) -> Generator[str | Progress, None, Finding]:
    """Draw the first report seeds by every model, and choose which are shown; yields how far it is.

    Returns:
        A row for each seed: its prompt, the root mean square difference of each model's image to the pretrained
        model's, in values of 0 to 255, and which figures show it.
    """
    settings = _settings(subject)
    seeds = [subject.first_seed + i for i in range(settings.num_candidates)]
    images: dict[str, Tensor] = {}
    total = len(subject.models) * len(seeds)
    for number, model in enumerate(subject.models):
        blocks = []
        for first in range(0, len(seeds), BLOCK):
            yield Progress(NAME, number * len(seeds) + first, total)
            own = seeds[first : first + BLOCK]
            blocks.append(subject.kept.tensor(f"{model}-{first:05}", subject.draw, model, own))
        images[model] = torch.cat(blocks)
    yield Progress(NAME, total, total)
    changes = {model: root_mean_square(drawn, images[PRETRAINED]) for model, drawn in images.items()}
    num_shown = min(settings.num_shown, len(seeds))
    by_change = changes[MERGED].argsort(descending=True, stable=True).tolist()
    shown = {"": list(range(num_shown)), "largest": by_change[:num_shown]}
    prompts = subject.prompts_of(seeds)
    rows = [
        {
            "seed": seed,
            "prompt": prompts[i] if prompts else "",
            **{f"change_{model}": float(change[i]) for model, change in changes.items() if model != PRETRAINED},
            "is_first": i in shown[""],
            "is_largest": i in shown["largest"],
        }
        for i, seed in enumerate(seeds)
    ]
    summary = {
        "models": list(images),
        "shown": {part: [seeds[i] for i in places] for part, places in shown.items()},
        "median_change": {model: float(change.median()) for model, change in changes.items()},
    }
    arrays = {
        f"images-{part or 'first'}": torch.stack([drawn[places] for drawn in images.values()]).numpy()
        for part, places in shown.items()
    }
    return Finding(rows, summary, _sentence(rows, summary), arrays)


def _sentence(rows: list[dict[str, Any]], summary: dict[str, Any]) -> str:
    worst = max(rows, key=lambda row: row[f"change_{MERGED}"])
    return (
        f"An image of the merged model differs from the pretrained model's by {summary['median_change'][MERGED]:.1f} "
        f"of 255 (root mean square, median of {len(rows)} seeds), by {worst[f'change_{MERGED}']:.1f} at seed "
        f"{worst['seed']}."
    )


def root_mean_square(a: UInt8[Tensor, "n c h w"], b: UInt8[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Compute √ mean (a - b)² of each image, in values of 0 to 255."""
    return (a.double() - b.double()).square().flatten(1).mean(1).sqrt()


def draw(finding: Finding) -> dict[str, Any]:
    """Draw a row for each model and a column for each seed."""
    prompts = {row["seed"]: row["prompt"] for row in finding.rows}
    changes = {row["seed"]: row[f"change_{MERGED}"] for row in finding.rows}
    figures = {}
    for part, seeds in finding.summary["shown"].items():
        images = finding.arrays[f"images-{part or 'first'}"]
        size = (1.25 * len(seeds) + 1.6, 1.25 * len(images) + (1.0 if any(prompts.values()) else 0.5))
        figure, axes = plt.subplots(*images.shape[:2], figsize=size, layout="constrained", squeeze=False)
        for (i, j), axis in np.ndenumerate(axes):
            pixels = images[i, j].transpose(1, 2, 0)
            axis.imshow(pixels.repeat(3, 2) if pixels.shape[2] == 1 else pixels, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if i == 0:
                words = textwrap.shorten(prompts[seeds[j]], 60, placeholder="…")
                title = "\n".join([f"seed {seeds[j]}", *textwrap.wrap(words, 20)])
                axis.set_title(title, fontsize=7, parse_math=False)
            if j == 0:
                name = finding.summary["models"][i].replace("baseline-finetuned", "equally\nfinetuned")
                axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
            if i == len(images) - 1:
                axis.set_xlabel(f"{changes[seeds[j]]:.0f}", fontsize=7)
        figures[part] = figure
    return figures
