"""What every stage of a run starts from: its config with everything that it names opened."""

from dataclasses import dataclass

import torch

from ..config import Config
from ..data.batches import Examples
from ..data.images import Images
from ..diffusion.timesteps import TimestepRange
from ..merging.arithmetic import Tensors
from ..models.base import Base
from ..sampling.sampler import Denoiser, Prompts, ensemble_denoiser, open_prompts, prompts_label
from ..storage.run_folder import Run

BASELINE, DISTILLED = "baseline-finetuned", "distilled"


@dataclass
class Plan:
    """A config with everything it names opened and checked.

    Attributes:
        images: what is trained on; for a text-to-image base the images' latents, with their captions.
        references: what the images of a model are compared with.
        prompts: what a text-to-image model is asked for; empty for others.
    """

    config: Config
    run: Run
    base: Base
    images: Examples
    ranges: tuple[TimestepRange, ...]
    references: Images
    prompts: list[str]

    @property
    def prompts_label(self) -> str | None:
        """What a text-to-image model is asked for, as records carry it; None of other models."""
        return prompts_label(self.prompts, self.config.text) if self.prompts else None

    def open_prompts(self, device: torch.device) -> Prompts | None:
        """Load what a text-to-image model needs to draw a run's images; None for other models."""
        return open_prompts(self.base, self.prompts, self.config.text, device, self.config.data.cache_precision)

    def ensemble(self, experts: list[Tensors], device: torch.device) -> Denoiser:
        """Combine the experts as a run samples from them."""
        return ensemble_denoiser(self.base, self.ranges, experts, self.config.sample, device)


# The runs of a study, by arm and training seed.
Plans = dict[tuple[str, int], Plan]
