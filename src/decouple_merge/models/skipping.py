"""Schedulers that go over some of their steps alone, from each to the next that is kept."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from ..errors import UserError

# What diffusers decorates, mypy doesn't read.
DDIM: Any = DDIMScheduler
Euler: Any = FlowMatchEulerDiscreteScheduler


class SkippingDDIM(DDIM):
    """DDIM over steps of uneven size. With all steps kept it is DDIM to the bit."""

    kept: tuple[int, ...] = ()
    num_slots: int = 0
    timesteps: Any
    sigmas: Any

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Set the grid of steps, and leave out those that are skipped."""
        _check_slots(num_inference_steps, self.num_slots)
        super().set_timesteps(num_inference_steps, device)
        grid = self.timesteps.tolist()
        size = self.config.num_train_timesteps // num_inference_steps
        ends = [*(t for t in grid[1:]), grid[-1] - size]
        following = [*self.kept[1:], len(grid)]
        # Where the next step is kept it is as far as DDIM itself goes, which rounds the grid in its own way.
        self.sizes = {
            grid[i]: size if after == i + 1 else grid[i] - ends[after - 1]
            for i, after in zip(self.kept, following, strict=True)
        }
        self.timesteps = self.timesteps[list(self.kept)]

    def step(self, model_output: Any, timestep: Any, sample: Any, **settings: Any) -> Any:
        """Go from a step to the next that is kept."""
        # DDIM asks for the number of steps alone, by which it divides T.
        size = self.sizes[int(timestep)]
        self.num_inference_steps: Any = Fraction(self.config.num_train_timesteps, size)
        return super().step(model_output, timestep, sample, **settings)


class SkippingEuler(Euler):
    """Euler's steps on a flow, of uneven size."""

    kept: tuple[int, ...] = ()
    num_slots: int = 0
    timesteps: Any
    sigmas: Any

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Set the grid of steps, and leave out those that are skipped; pipelines look for ``sigmas`` by name."""
        given: Any = next((each for each in (sigmas, timesteps) if each is not None), [])
        _check_slots(num_inference_steps or len(given), self.num_slots)
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        places = torch.tensor([*self.kept, len(self.timesteps)])
        self.sigmas = self.sigmas[places]
        self.timesteps = self.timesteps[places[:-1]]


SKIPPING: dict[type, Any] = {DDIMScheduler: SkippingDDIM, FlowMatchEulerDiscreteScheduler: SkippingEuler}


def skipping(kind: type, kept: Sequence[int], num_slots: int) -> type:
    """Give the class of a sampler that goes over some of its steps.

    Args:
        kept: the places of the steps that run, rising, of ``num_slots``.

    Raises:
        UserError: the sampler can't leave steps out.
    """
    if kind not in SKIPPING:
        known = " or ".join(sampler.__name__.removesuffix("Scheduler") for sampler in SKIPPING)
        raise UserError(
            f"sampler is {kind.__name__.removesuffix('Scheduler')}, which can't leave steps out as a schedule "
            f"of models asks for; expected {known}: leave sample.sampler out, or take a base with one of them"
        )
    parent = SKIPPING[kind]
    return type(parent.__name__, (parent,), {"kept": tuple(kept), "num_slots": num_slots})


def _check_slots(found: int | None, expected: int) -> None:
    if found != expected:
        raise UserError(f"found {found} steps, expected num_inference_steps={expected}: the schedule has so many slots")
