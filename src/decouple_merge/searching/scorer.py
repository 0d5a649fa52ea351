"""From weights to a distance: what a search minimises."""

import math
import time

import torch

from ..config import Sample
from ..errors import NotFiniteError
from ..evaluation.extractors import Extractor
from ..evaluation.references import Reference
from ..evaluation.score import score
from ..merging.merger import Merger
from ..models.base import Base
from ..sampling.sampler import Denoiser, Prompts, blank_sampling_network, denoiser, sample_images
from .strategies import Weights
from .trial import Level, Score


class Scorer:
    """Score merges by the distance between their images and the reference, always from the same initial noise.

    Args:
        merger: of this base; from now on it writes into the scorer's network.
        metric: a distance on the features of ``compared``.
        prompts: of a text-to-image or class-conditional base.
    """

    def __init__(
        self,
        base: Base,
        merger: Merger,
        metric: str,
        compared: tuple[Extractor, Reference],
        sample: Sample,
        prompts: Prompts | None = None,
    ) -> None:
        self.base, self.merger, self.metric, self.compared = base, merger, metric, compared
        self.sample, self.prompts, self.device = sample, prompts, merger.device
        self.network = blank_sampling_network(base, merger.has_trunk, sample, self.device)
        merger.attach(self.network)

    def __call__(self, weights: Weights, level: Level) -> Score:
        """Merge by the weights and score the images of the level's seeds; a candidate that draws NaN is lost."""
        sha256 = self.merger.write(weights)
        try:
            return Score(self.distance(denoiser(self.base, self.network), level), sha256)
        except NotFiniteError as error:
            return Score(math.inf, sha256, str(error))

    def distance(self, model: Denoiser, level: Level) -> float:
        """Score any model as if it were a candidate.

        Raises:
            NotFiniteError: its images, their features or the distance are NaN or infinite.
        """
        images = sample_images(model, self.base, level.seeds, self.sample, self.device, level.num_steps, self.prompts)
        found = score(images, [self.metric], [self.compared])[self.metric]
        if not math.isfinite(found):
            raise NotFiniteError(f"{self.metric} is {found}, expected a number: check the images that are drawn")
        return found

    @torch.no_grad()
    def seconds_per_step(self, seeds: range) -> float:
        """Estimate what a step of the sampler takes for one image, from one batch of two steps after one to warm up."""
        size = min(self.sample.batch_size, len(seeds))
        x, model = torch.zeros(size, *self.base.shape, device=self.device), denoiser(self.base, self.network)
        if self.prompts is not None:
            model = self.prompts.guide(model, seeds[:size])
        model(x, 0)
        started = time.monotonic()
        for _ in range(2):
            model(x, 0)
        return (time.monotonic() - started) / 2 / size
