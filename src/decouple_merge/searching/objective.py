"""From weights to a distance: the objective of the search, and what a training is watched by."""

import time
from functools import cached_property

import torch
from torch import Tensor, nn

from ..evaluation.comparison import open_compared
from ..evaluation.features import METRICS, Extractor
from ..evaluation.references import Reference
from ..evaluation.scores import score
from ..executors.devices import default_device
from ..experiment.plan import Plan
from ..merging.arithmetic import Stacked, Tensors, cast, cut_blocks, merge
from ..models.base import build_network, tensors_sha256
from ..sampling.sampler import (
    Denoiser,
    Prompts,
    denoiser,
    sample_images,
    sampling_copy,
)
from .strategies import Weights
from .study import Level, Score


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
        return open_compared(
            METRICS[self.plan.config.search.metric],
            self.plan.config.evaluate,
            self.plan.config.data.source,
            self.plan.references,
            self.device,
        )

    @cached_property
    def prompts(self) -> Prompts | None:
        return self.plan.open_prompts(self.device)

    @cached_property
    def network(self) -> nn.Module:
        untouched = self._stacked_merge([[0.0] * len(self.experts)] * len(self.stacked))
        network = sampling_copy(build_network(self.plan.base, untouched), self.plan.config.sample, self.device)
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
        return self.score(
            self.plan.ensemble(self.experts, self.device),
            level,
        )

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
