"""From weights to a distance: what a search minimises."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ..config import Sample
from ..errors import NotFiniteError
from ..evaluation.extractors import Extractor
from ..evaluation.references import Reference
from ..evaluation.score import Features, extract, score_features
from ..evaluation.shared_features import SharedFeatures
from ..executors.devices import synchronize
from ..merging.merger import Merger
from ..models.base import Base
from ..sampling.sampler import Denoiser, Prompts, blank_sampling_network, denoiser, sample_images
from ..storage.made_from import digest_of
from .strategies import Weights
from .trial import Level, Score


class Scorer:
    """Score merges by the distance between their images and the reference, always from the same initial noise.

    The images of a candidate are shared: whoever has none of its own to score draws some of another's.

    Args:
        merger: of this base; from now on it writes into the scorer's network.
        metric: a distance on the features of ``compared``.
        prompts: of a text-to-image or class-conditional base.
        folder: of this search, where those who score share features; None scores alone.
    """

    def __init__(
        self,
        base: Base,
        merger: Merger,
        metric: str,
        compared: tuple[Extractor, Reference],
        sample: Sample,
        prompts: Prompts | None = None,
        folder: Path | None = None,
    ) -> None:
        self.base, self.merger, self.metric, self.compared, self.folder = base, merger, metric, compared, folder
        self._written: Weights | None = None
        self.sample, self.prompts, self.device = sample, prompts, merger.device
        self.network = blank_sampling_network(base, merger.has_trunk, sample, self.device)
        merger.attach(self.network)

    def __call__(self, weights: Weights, level: Level) -> Score:
        """Merge by the weights and score the images of the level's seeds; a candidate that draws NaN is lost."""
        sha256, shared = self._write(weights), self._shared(weights, level)
        features = shared.gather(lambda share: self._features(level, share)) if shared else self._features(level)
        value, failure = math.inf, ""
        try:
            value = self._distance(features)
        except NotFiniteError as error:
            failure = str(error)
        if shared:
            shared.end()
        return Score(value, sha256, failure, shared.seconds_of_others if shared else 0.0)

    def help(self, weights: Weights, level: Level) -> bool:
        """Draw a share of the images of a candidate that another scores; says whether there was one left."""
        shared = self._shared(weights, level)

        def draw(share: slice) -> Iterator[Features]:
            if self._written != weights:
                self._write(weights)
            return self._features(level, share)

        return shared is not None and shared.is_begun and shared.draw_next(draw)

    def _write(self, weights: Weights) -> str:
        # Not known while it is written: an error may leave half of each.
        self._written = None
        sha256 = self.merger.write(weights)
        self._written = weights
        return sha256

    def _shared(self, weights: Weights, level: Level) -> SharedFeatures | None:
        """Open what a candidate's images are shared by; None where they are one batch, or drawn alone."""
        size = self.sample.batch_size
        if self.folder is None or len(level.seeds) <= size:
            return None
        asked = {"weights": weights, "seeds": str(level.seeds), "num_steps": level.num_steps, "batch_size": size}
        return SharedFeatures(self.folder / digest_of(asked), len(level.seeds), size)

    def _features(self, level: Level, share: slice = slice(None), model: Denoiser | None = None) -> Iterator[Features]:
        """Draw a share of a level's batches by the network, or by another model, and extract their features."""
        drawn_by = model or denoiser(self.base, self.network)
        images = sample_images(
            drawn_by, self.base, level.seeds, self.sample, self.device, level.num_steps, self.prompts, share
        )
        return extract(images, [self.compared[0]])

    def distance(self, model: Denoiser, level: Level) -> float:
        """Score any model as if it were a candidate.

        Raises:
            NotFiniteError: its images, their features or the distance are NaN or infinite.
        """
        return self._distance(self._features(level, model=model))

    def _distance(self, features: Iterator[Features]) -> float:
        found = score_features(features, [self.metric], [self.compared])[0][self.metric]
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
        synchronize(self.device)
        started = time.monotonic()
        for _ in range(2):
            model(x, 0)
        synchronize(self.device)
        return (time.monotonic() - started) / 2 / size
