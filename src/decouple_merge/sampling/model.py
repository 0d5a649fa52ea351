"""Open any model to draw with: a pipeline, the ensemble of a run's experts, or a mixture."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from ..config import Sample, Text
from ..data.prompts import load_prompts
from ..diffusion.routing import RangeRouter
from ..errors import UserError
from ..models.base import Base, load_base
from ..models.identity import model_sha256
from ..models.mixture import Mixture, mixture_of, open_any
from ..models.network import load_network, new_network
from ..models.parts import texts_to_encode
from ..models.run_experts import open_run
from ..models.schedulers import sampler_of
from ..seeds import check_seeds
from ..storage.layouts import PROJECTIONS_FILE
from ..storage.reading import AGAIN, is_document, read_record
from ..storage.run_folder import Run
from .sampler import (
    Denoiser,
    Prompts,
    check_prompts,
    choose_prompts,
    denoiser,
    mixture_denoiser,
    prompts_label,
    sample_images,
    sampling_copy,
    sampling_fields,
)
from .shares import unlike_shares

# Which of the settings of texts say what the prompts are.
PROMPT_SETTINGS = {"prompts", "template", "prompt_seed"}


@dataclass(frozen=True)
class OpenedModel:
    """A model that draws. Networks and texts are made ready for it when the first image is asked for.

    Attributes:
        network: of a pipeline.
        mixture: of a file, or a run's experts.
        prompts: all that images may be drawn from; empty for a model that reads none.
        first_seed: which has the first prompt.
    """

    base: Base
    network: nn.Module | None
    mixture: Mixture | None
    settings: Sample
    text: Text
    prompts: list[str]
    first_seed: int

    def prompts_of(self, seeds: Sequence[int]) -> list[str]:
        """Look up the prompts of some seeds; none of a model that reads none."""
        return choose_prompts(self.prompts, seeds, self.first_seed) if self.prompts else []

    def check(self, seeds: Sequence[int]) -> None:
        """Require that the model can draw some seeds: they differ, and it has prompts if it reads them.

        Raises:
            ValueError: as said.
        """
        check_seeds(seeds)
        check_prompts(self.base, bool(self.prompts))
        if self.base.encoders is not None:
            texts_to_encode(self.base.encoders, self.prompts_of(seeds), self.text)

    def notes(self) -> Iterator[str]:
        """Say what is to be known before it draws: that an ensemble's sampler isn't what its ranges were cut for."""
        if self.mixture is not None and self.mixture.kept is not None:
            num, of = len(self.mixture.kept), self.mixture.num_slots
            yield f"the schedule runs {num} of its {of} steps, whatever num_steps is"
        elif self.mixture is not None and isinstance(self.mixture.router, RangeRouter):
            ranges = self.mixture.router.ranges
            yield from unlike_shares(self.base, ranges, self.settings, self.mixture.step_shares)

    @property
    def fields(self) -> dict[str, Any]:
        """What an image depends on besides model and seed, as records carry it."""
        label = prompts_label(self.prompts, self.text) if self.prompts else None
        return sampling_fields(self.base, self.settings, label)

    @cached_property
    def sha256(self) -> str:
        """The hash of all that is read, as ``models.identity`` counts it."""
        if self.mixture is not None:
            return self.mixture.sha256
        assert self.network is not None
        return model_sha256(self.base, [self.network.state_dict()])

    @property
    def identity(self) -> dict[str, Any]:
        """What images depend on besides seed and prompt: hashes of all that is read, and how it is used."""
        return {"model_sha256": self.sha256, **drawn_with(self.base, self.settings, self.text)}

    def draw(
        self, seeds: Sequence[int], device: torch.device, share: slice = slice(None)
    ) -> Iterator[UInt8[Tensor, "batch c h w"]]:
        """Draw one image for each seed, or a share of the batches, as ``sample_images`` does."""
        prompts = None
        if self.base.encoders is not None:
            prompts = Prompts(
                self.base.encoders, self.prompts, self.text, device, first_seed=self.first_seed, seeds=seeds
            )
        model = self._denoiser(device)
        kept = None if self.mixture is None else self.mixture.kept
        batches = sample_images(model, self.base, seeds, self.settings, device, None, prompts, share, kept)
        yield from batches

    def _denoiser(self, device: torch.device) -> Denoiser:
        if self.mixture is not None:
            return mixture_denoiser(self.mixture, self.settings, device)
        assert self.network is not None
        return denoiser(self.base, sampling_copy(self.network, self.settings, device))


def schedule_settings(base: Base, settings: Sample, num_slots: int) -> Sample:
    """Take a schedule's own number of steps, on the base's own grid.

    Raises:
        UserError: the settings ask for another grid.
    """
    own = sampler_of(base, None)
    if sampler_of(base, settings.sampler).removesuffix("Scheduler") != own or settings.timestep_spacing is not None:
        raise UserError(
            f"sampler is {settings.sampler} and timestep_spacing {settings.timestep_spacing}, and a schedule of models "
            f"has the grid of the base's {own}: leave both out"
        )
    return settings.model_copy(update={"num_steps": num_slots})


def drawn_with(base: Base, settings: Sample, text: Text) -> dict[str, Any]:
    """Say what an image depends on besides model, seed and prompt, as PNGs carry it."""
    fields: dict[str, Any] = {
        key: value for key, value in sampling_fields(base, settings, None).items() if key != "prompts"
    }
    if base.encoders is not None:
        fields |= {"guidance_scale": text.guidance_scale, "negative_prompt": text.negative_prompt}
    return fields


def is_run(name: str) -> bool:
    """Say whether a name is that of a run's folder."""
    return (Path(name) / "config.yaml").exists()


def open_model(name: str, settings: Sample, text: Text, first_seed: int = 0) -> OpenedModel:
    """Open a pipeline, a mixture's file, or the ensemble of a run folder, with the prompts for it.

    Args:
        settings: how it draws.
        text: prompts and guidance of a text-to-image model; what it doesn't set is a run's own. A run's prompts are
            those in its folder.
        first_seed: which has the first prompt of a file.

    Raises:
        ValueError: the model is none, a run has no finished experts, or the prompts can't be read.
    """
    if is_run(name):
        run = open_run(Path(name))
        both = run.config.text.model_copy(update=text.model_dump(include=text.model_fields_set))
        prompts = run_prompts(Run(Path(name)), run.base, text, both)
        mixture = mixture_of(run.base, run.ranges, run.experts, run.step_shares)
        return OpenedModel(run.base, None, mixture, settings, both, prompts, first_seed if text.prompts else 0)
    prompts = load_prompts(text)
    if is_document(name):
        mixture = open_any(Path(name))
        if mixture.num_slots is not None:
            settings = schedule_settings(mixture.base, settings, mixture.num_slots)
        return OpenedModel(mixture.base, None, mixture, settings, text, prompts, first_seed)
    base = load_base(name)
    network = base.network
    if (Path(name) / PROJECTIONS_FILE).exists():
        network = new_network(base, "trunk")
        network.load_state_dict(load_network(Path(name)))
    return OpenedModel(base, network, None, settings, text, prompts, first_seed)


def run_prompts(run: Run, base: Base, given: Text, both: Text) -> list[str]:
    """Find a run's prompts: those of a file that is given now, or those in its folder; its data aren't needed."""
    if base.encoders is None:
        return load_prompts(given)
    if PROMPT_SETTINGS & given.model_fields_set and (prompts := load_prompts(both)):
        return prompts
    if not run.prompts.exists():
        raise UserError(f"{run.folder} has no prompts.json; start deme run again, which writes it, or give --prompts")
    return read_record(run.prompts, AGAIN, prompts=list)["prompts"]
