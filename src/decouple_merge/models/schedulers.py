"""The samplers: any scheduler of diffusers that keeps to a base's own schedule."""

import inspect
from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np

from ..diffusion.process import VP, Flow
from ..errors import UserError, is_ours
from .base import Base
from .processes import dynamic_mu, flow_arguments
from .skipping import skipping


def sampler_of(base: Base, sampler: str | None) -> str:
    """Name the sampler: the one that is asked for, or else DDIM, which can't sample a flow: of one the base's own."""
    if sampler is not None or not isinstance(base.process, Flow):
        return sampler or "DDIM"
    return type(base.pipeline.scheduler).__name__.removesuffix("Scheduler")


def make_scheduler(
    base: Base,
    sampler: str | None,
    num_steps: int,
    timestep_spacing: str | None,
    kept: Sequence[int] | None = None,
) -> Any:
    """Build any diffusers scheduler from the base's own config, with its timesteps set as the stock pipeline sets them.

    Args:
        sampler: by name, as ``sampler_of`` takes it.
        kept: places of the steps that run, rising; all where not given.

    Raises:
        UserError: diffusers has no such scheduler, it can't sample the base's process or leave steps out, it is for
            another kind of model, or it refuses the number of steps.
    """
    sampler = sampler_of(base, sampler)
    name = sampler if sampler.endswith("Scheduler") else sampler + "Scheduler"
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        known = sorted(
            n.removesuffix("Scheduler") for n in dir(diffusers) if n.endswith("Scheduler") and "Flax" not in n
        )
        raise UserError(f"sampler is {sampler!r}, expected one of {', '.join(known)}")
    own, changes = base.pipeline.scheduler, dict[str, Any]()
    if isinstance(base.process, Flow):
        changes = flow_arguments(base.process, own, cls)
        if timestep_spacing is not None and "timestep_spacing" not in inspect.signature(cls).parameters:
            raise UserError(f"timestep_spacing is {timestep_spacing}, and a {name} has none: leave it out")
    elif name.startswith("FlowMatch"):
        raise UserError(
            f"sampler {name} is for flow matching, and the base has a table of ᾱ_t; take {type(own).__name__}, which "
            "is its own, or DDIM"
        )
    if timestep_spacing is not None:
        changes["timestep_spacing"] = timestep_spacing
    kind: Any = cls if kept is None else skipping(cls, kept, num_steps)
    try:
        scheduler: Any = kind.from_config(own.config, **base.family.sampler_config, **changes)
        scheduler.set_timesteps(num_steps, **_timestep_arguments(base, scheduler, num_steps))
    except (ValueError, TypeError, ImportError, NotImplementedError, KeyError, AttributeError) as error:
        if is_ours(error):
            raise
        raise UserError(f"sampler {name} with {num_steps} steps: {error}") from error
    if reason := _unfit(base, scheduler):
        raise UserError(f"sampler {name} can't sample this base: {reason}; take {type(own).__name__} or DDIM")
    return scheduler


def _unfit(base: Base, scheduler: Any) -> str | None:
    """Say why a scheduler is for another kind of model, or none that starts at noise; None where it may do."""
    if not hasattr(scheduler, "step"):
        return "it has no steps of this kind"
    given, parameters = ("model_output", "timestep", "sample"), inspect.signature(scheduler.step).parameters
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if others := [n for n in needed if n not in given]:
        return f"its steps need {others[0]}"
    first, last, end = float(scheduler.timesteps[0]), float(scheduler.timesteps[-1]), base.num_train_timesteps
    if first < last:
        return f"it goes from the image to the noise, from timestep {first:g} to {last:g}"
    if not 0 <= last <= first <= end:
        return f"its timesteps are {first:g} to {last:g}, expected some of 0 to {end}"
    if isinstance(base.process, VP):
        own, found = base.process.alphas_cumprod, getattr(scheduler, "alphas_cumprod", None)
        # Some hold the last a little above 0.
        if found is None or len(found) != len(own) or not np.allclose(found, own, rtol=0, atol=1e-4):
            return "its noise is not that of the base's schedule"
    return None


def _timestep_arguments(base: Base, scheduler: Any, num_steps: int) -> dict[str, Any]:
    """List what the stock pipeline tells its own scheduler beside the number of steps."""
    if not isinstance(scheduler, type(base.pipeline.scheduler)):
        return {}
    arguments: dict[str, Any] = {}
    num_tokens = base.family.num_tokens(base.network, base.shape)
    if num_tokens is not None and scheduler.config.get("use_dynamic_shifting"):
        arguments["mu"] = dynamic_mu(scheduler.config, num_tokens)
    if base.family.has_even_levels and not scheduler.config.get("use_flow_sigmas"):
        arguments["sigmas"] = np.linspace(1.0, 1 / num_steps, num_steps)
    return arguments
