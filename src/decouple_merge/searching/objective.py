"""From weights to a distance: the objective of the search, and what a training is watched by."""

import time
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..config import Distance
from ..diffusion.timesteps import TimestepRange
from ..evaluation.features import METRICS, Extractor, load_extractor, weights_of
from ..evaluation.references import Reference, make_reference
from ..evaluation.scores import score
from ..executors.devices import default_device
from ..experiment.plan import Plan, build_network, ensemble_denoiser, open_prompts
from ..merging.arithmetic import Stacked, Tensors, cast, cut_blocks, merge
from ..models.base import tensors_sha256
from ..models.ensemble import TimestepEnsemble
from ..sampling.sampler import Denoiser, Prompts, denoiser, sample_images, sampling_copy
from .strategies import Weights
from .study import Level, Score


def load_features(plan: Plan, extractor: str, device: torch.device) -> Extractor:
    """Load a feature network that a run's metrics are measured on."""
    settings = plan.config.evaluate
    # Networks draw weights before they load theirs.
    with torch.random.fork_rng(devices=[]):
        return load_extractor(extractor, device, weights_of(extractor, settings.inception_weights, settings.encoders))


def load_compared(plan: Plan, extractor: str, device: torch.device) -> tuple[Extractor, Reference]:
    """Load a feature network, and compute or read from the cache what a run's images are compared with."""
    loaded, num = load_features(plan, extractor, device), plan.config.evaluate.num_reference_images
    return loaded, make_reference(plan.config.data.source, plan.references, loaded, num)


def training_distance(plan: Plan, own: TimestepRange, settings: Distance) -> Callable[[Tensors], float]:
    """Make the function that scores weights while they are trained on a range.

    It draws with them on their range and with the base on the others, always from the same initial noise. Neither the
    weights nor any global random state are changed.

    Args:
        own: in timesteps; all of them for the baseline.
    """
    config, base, device = plan.config, plan.base, default_device()
    # Every call has a network of its own, and compiling it takes longer than drawing so few images.
    drawing = config.sample.model_copy(update={"num_steps": settings.num_steps, "compile": False})
    compared = load_compared(plan, METRICS[settings.metric], device)
    prompts = open_prompts(plan, device)
    edges = sorted({0, own.low, own.high, base.num_train_timesteps})
    ranges = [TimestepRange(low, high) for low, high in pairwise(edges)]
    others = sampling_copy(base.network, drawing, device) if len(ranges) > 1 else base.network

    def distance(weights: Tensors) -> float:
        trained = sampling_copy(build_network(plan, weights), drawing, device)
        networks = [trained if r == own else others for r in ranges]
        model = denoiser(TimestepEnsemble(networks, ranges, base.num_train_timesteps))
        seeds = config.distance_seeds[: settings.num_images]
        batches = sample_images(model, base, seeds, drawing, device, prompts=prompts)
        return score(batches, [settings.metric], [compared])[settings.metric]

    return distance


class Objective:
    """The distance between the images of a merge and the reference, always from the same initial noise."""

    def __init__(self, plan: Plan, experts: list[Tensors]) -> None:
        self.plan, self.experts = plan, experts
        self.device = default_device()

    # Made when the first candidate is scored: a search that is finished needs neither features nor networks.
    @cached_property
    def blocks(self) -> list[tuple[Tensors, list[Tensors]]]:
        """Base and experts, cut into the blocks that have weights of their own."""
        return cut_blocks(self.plan.base.network.state_dict(), self.experts, self.plan.config.search.blocks)

    @cached_property
    def stacked(self) -> list[Stacked]:
        return [Stacked(start, experts, self.device) for start, experts in self.blocks]

    @cached_property
    def compared(self) -> tuple[Extractor, Reference]:
        return load_compared(self.plan, METRICS[self.plan.config.search.metric], self.device)

    @cached_property
    def prompts(self) -> Prompts | None:
        return open_prompts(self.plan, self.device)

    @cached_property
    def network(self) -> nn.Module:
        untouched = self._stacked_merge([[0.0] * len(self.experts)] * len(self.stacked))
        network = sampling_copy(build_network(self.plan, untouched), self.plan.config.sample, self.device)
        for name, parameter in network.named_parameters():
            if self._in_place(parameter):
                parameter.data = untouched[name]
        return network

    def _in_place(self, tensor: Tensor) -> bool:
        """Say whether a tensor of the network can be a view of the merge: both are float32 to the end."""
        return tensor.dtype == self.plan.base.dtype == torch.float32

    def merge(self, weights: Weights) -> Tensors:
        """Merge the experts; the next candidate may overwrite the tensors."""
        settings, dtype, num = self.plan.config.search, self.plan.base.dtype, len(self.experts)
        rows = [list(weights[i : i + num]) for i in range(0, len(weights), num)]
        if settings.method == "linear":
            return cast(self._stacked_merge(rows), dtype)
        merged: Tensors = {}
        for (start, experts), row in zip(self.blocks, rows, strict=True):
            merged |= merge(start, experts, row, settings.method, settings.density)
        return cast(merged, dtype)

    def _stacked_merge(self, rows: list[list[float]]) -> Tensors:
        merged: Tensors = {}
        for stack, row in zip(self.stacked, rows, strict=True):
            merged |= stack.merge(row)
        return merged

    def load(self, weights: Weights) -> str:
        """Put a merge into the network's own storage; returns the hash of its tensors."""
        state = self.network.state_dict()
        merged = self.merge(weights)
        with torch.no_grad():
            for key, value in state.items():
                if value.data_ptr() != merged[key].data_ptr():
                    value.copy_(merged[key])
        return tensors_sha256(merged)

    def score(self, model: Denoiser, level: Level) -> float:
        settings = self.plan.config
        batches = sample_images(
            model, self.plan.base, level.seeds, settings.sample, self.device, level.num_steps, self.prompts
        )
        return score(batches, [settings.search.metric], [self.compared])[settings.search.metric]

    def __call__(self, weights: Weights, level: Level) -> Score:
        sha256 = self.load(weights)
        return Score(self.score(denoiser(self.network), level), sha256)

    def score_ensemble(self, level: Level) -> float:
        """Score the ensemble of experts as if it were a candidate."""
        return self.score(ensemble_denoiser(self.plan, self.experts, self.device), level)

    def seconds_per_image(self, level: Level) -> float:
        """Estimate the cost of an image from one batch of two steps, after one to warm up."""
        settings = self.plan.config
        num_steps = level.num_steps or settings.sample.num_steps
        size = min(settings.sample.batch_size, len(level.seeds))
        x = torch.randn(size, *self.plan.base.shape)
        model = denoiser(self.network)
        if self.prompts is not None:
            model = self.prompts.guide(model, level.seeds[:size])
        with torch.no_grad():
            model(x.to(self.device), 0)
            started = time.monotonic()
            for _ in range(2):
                model(x.to(self.device), 0)
        return (time.monotonic() - started) / 2 * num_steps / size
