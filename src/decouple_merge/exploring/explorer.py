"""What a page asks of a run: images of a merge at any weights, and the merge itself as a model."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from ..config import Merge, Text
from ..errors import UserError
from ..executors.devices import default_device
from ..merging.merger import Merger
from ..merging.recipes import merge_models
from ..merging.rules.rule import Context, Settings
from ..models.run_experts import open_run
from ..sampling.model import run_prompts
from ..sampling.sampler import (
    Denoiser,
    blank_sampling_network,
    denoiser,
    ensemble_denoiser,
    open_prompts,
    sample_images,
    sampling_copy,
)
from ..searching.strategies import Weights
from ..storage.reading import AGAIN, read_record
from ..storage.run_folder import Run

NUM_IMAGES = 8
METHODS = ("linear", "ties")
# Of the merges with other methods and densities that are kept ready to merge again.
MAX_MERGERS = 4


class Explorer:
    """A run's base and experts, held in memory, merged and drawn on demand, always from the same seeds.

    Args:
        folder: of a run with finished experts.
        num_steps: of the sampler; as the search's screening where not given.

    Attributes:
        seeds: the run's first search seeds.
        bounds: of every weight, those of the search.

    Raises:
        UserError: it is no run, an expert is missing or damaged, or the run merges checkpoints in place of experts.
    """

    def __init__(self, folder: Path, num_steps: int | None = None) -> None:
        self.run = Run(folder)
        self.config, self.base, self.ranges, self.experts, _ = open_run(folder)
        search = self.config.search
        if not search.combines_experts:
            raise UserError(f"{folder} merges other models than its experts, expected a run that merges those")
        self.device = default_device()
        self.bounds, self.blocks = (search.low, search.high), search.blocks
        self.num_steps = num_steps or search.num_steps or self.config.sample.num_steps
        self.sample = self.config.sample.model_copy(update={"batch_size": NUM_IMAGES, "compile": False})
        # Whoever chooses by them must not report on them.
        first = search.first_seed
        self.seeds = range(first, first + NUM_IMAGES)
        prompts = run_prompts(self.run, self.base, Text(), self.config.text) if self.base.encoders is not None else []
        self.prompts = open_prompts(self.base, prompts, self.config.text, self.device)
        self._mergers: dict[tuple[str, float], tuple[Merger, nn.Module]] = {}

    @property
    def names(self) -> list[str]:
        """Name every weight: its range, and its block where there are several."""
        blocks = [f"{pattern} " if len(self.blocks) > 1 else "" for pattern in self.blocks]
        return [f"{block}{own}" for block in blocks for own in self.ranges]

    @property
    def best(self) -> Weights:
        """The weights of the run's merged model; where there is none, of the uniform merge."""
        path = self.run.merged / "merge.json"
        if not path.exists():
            return (1 / len(self.ranges),) * len(self.names)
        record = read_record(path, AGAIN, weights=list, settings=dict)
        rows: list[list[float]] = [*record["settings"].get("blocks", {}).values(), record["weights"]]
        return tuple(w for row in rows for w in row)

    @property
    def density(self) -> float:
        """The density of the run's merge, which a search may have tuned; 1 where there is none for all experts."""
        path, found = self.run.merged / "merge.json", self.config.search.density
        if path.exists():
            found = read_record(path, AGAIN, settings=dict)["settings"].get("density", found)
        return float(found) if isinstance(found, int | float) else 1.0

    def draw(self, weights: Weights, method: str, density: float) -> UInt8[Tensor, "n c h w"]:
        """Draw the seeds by the merge of some weights.

        Raises:
            UserError: there is not a weight for each expert and block, or images are NaN.
        """
        merger, network = self._merger(method, density)
        merger.write(weights)
        return self._images(denoiser(self.base, network))

    @cached_property
    def pretrained(self) -> UInt8[Tensor, "n c h w"]:
        """The seeds as the base draws them."""
        return self._images(denoiser(self.base, sampling_copy(self.base.network, self.sample, self.device)))

    @cached_property
    def ensemble(self) -> UInt8[Tensor, "n c h w"]:
        """The seeds as the experts draw them, each at its own timesteps."""
        return self._images(ensemble_denoiser(self.base, self.ranges, self.experts, self.sample, self.device))

    def export(self, weights: Weights, method: str, density: float, out: Path) -> Iterator[Any]:
        """Write the merge of some weights as a stock pipeline with its recipe; yields what ``merge_models`` does.

        Raises:
            UserError: ``out`` holds something else, or as ``merge_models``.
        """
        num = len(self.ranges)
        rows = [list(weights[i : i + num]) for i in range(0, len(weights), num)]
        blocks = dict(zip(self.blocks[:-1], rows[:-1], strict=True))
        settings = Merge(method=method, weights=rows[-1], blocks=blocks, **self._settings(method, density))
        experts = [self.run.expert(i) for i in range(num)]
        yield from merge_models(self.config.base, experts, settings, out)

    def _settings(self, method: str, density: float) -> dict[str, Any]:
        """List a rule's settings: those of the search, where it merged by that rule, but for the density."""
        search = self.config.search
        return (search.rule_settings() if method == search.method else {}) | {"density": density}

    def _merger(self, method: str, density: float) -> tuple[Merger, nn.Module]:
        key = (method, density if method == "ties" else 1.0)
        if key not in self._mergers:
            if len(self._mergers) == MAX_MERGERS:
                del self._mergers[next(iter(self._mergers))]
            merger = Merger(
                self.base.network.state_dict(),
                self.experts,
                method=method,
                context_of=lambda name: Context(name, Settings(**self._settings(*key))),
                patterns=self.blocks,
                dtype=self.base.dtype,
                device=self.device,
            )
            network = blank_sampling_network(self.base, merger.has_trunk, self.sample, self.device)
            merger.attach(network)
            self._mergers[key] = merger, network
        return self._mergers[key]

    def _images(self, model: Denoiser) -> UInt8[Tensor, "n c h w"]:
        drawn = sample_images(
            model, self.base, self.seeds, self.sample, self.device, num_steps=self.num_steps, prompts=self.prompts
        )
        return torch.cat(list(drawn))
