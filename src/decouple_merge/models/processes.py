"""Which noise process a base was trained on, read from its scheduler's config."""

import inspect
import math
from typing import Any

from ..diffusion.process import PREDICTION_TYPES, VP, Flow, Process
from ..errors import UserError
from .family import Family

# Schedulers that can sample a flow, but draw noise that no seed of ours decides, or run time backwards.
UNSUPPORTED = ("stochastic_sampling", "invert_sigmas")


def process_of(name: str, family: Family, network: Any, scheduler: Any, shape: tuple[int, ...]) -> Process:
    """Read from a pipeline's scheduler how images are mixed with noise, and what the network says of the mixture.

    Args:
        name: of the base, for messages.
        shape: of what the network denoises, by which some schedulers shift.

    Raises:
        UserError: the scheduler is of a process that the family isn't trained on, or of none.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    if is_flow(scheduler):
        if not family.flows:
            raise UserError(
                f"base {name!r} has a {kind}, which is for flow matching, and no {family.pipelines[0]} draws with one; "
                "expected a VP schedule, which has ᾱ_t"
            )
        if found := [key for key in UNSUPPORTED if config.get(key)]:
            raise UserError(f"base {name!r} has a {kind} with {found[0]}, which is not supported: expected it false")
        shift = _shift(name, family.num_tokens(network, shape), scheduler)
        if not (isinstance(shift, int | float) and 0 < shift < math.inf):
            raise UserError(f"base {name!r}: its scheduler's shift is {shift!r}, expected a number above 0")
        return Flow(shift, num_train_timesteps=config.num_train_timesteps)
    prediction_type = config.get("prediction_type", "epsilon")
    if getattr(scheduler, "alphas_cumprod", None) is None or prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"base {name!r} has a {kind} with prediction type {prediction_type!r}; expected a VP schedule, which has "
            f"ᾱ_t, and {', '.join(PREDICTION_TYPES)}"
        )
    if family.flows == "only":
        raise UserError(
            f"base {name!r} has a {kind}, whose schedule is a table of ᾱ_t, and a {family.network.__name__} is trained "
            "by flow matching; expected a FlowMatchEulerDiscreteScheduler"
        )
    alphas = scheduler.alphas_cumprod
    falls = len(alphas) and alphas[0] <= 1 and alphas[-1] >= 0 and bool((alphas.diff() <= 0).all())
    if not falls:
        raise UserError(
            f"base {name!r}: its scheduler's ᾱ_t goes from {alphas[:1].tolist()} to {alphas[-1:].tolist()}, expected a "
            "fall within [0, 1]; mend beta_start, beta_end or trained_betas in scheduler_config.json"
        )
    return VP(alphas.float(), prediction_type)


def is_flow(scheduler: Any) -> bool:
    """Say whether a scheduler is for flow matching."""
    is_prediction = scheduler.config.get("prediction_type") == "flow_prediction"
    return type(scheduler).__name__.startswith("FlowMatch") or is_prediction


def dynamic_mu(config: Any, num_tokens: int) -> float:
    """Compute μ of a scheduler that shifts by the number of tokens of an image: linear between two of them."""
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (last - first)
    return num_tokens * slope + (low - slope * first)


def _shift(name: str, num_tokens: int | None, scheduler: Any) -> float:
    """Read the shift at the size that is trained on."""
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        # A config may hold what was another class's.
        parameters = inspect.signature(type(scheduler)).parameters
        return config.get("flow_shift" if "flow_shift" in parameters else "shift", 1.0)
    if num_tokens is None:
        raise UserError(
            f"base {name!r}: its scheduler has use_dynamic_shifting, and its pipeline tells it no number of tokens: "
            "set its shift"
        )
    mu = dynamic_mu(config, num_tokens)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def flow_arguments(process: Flow, scheduler: Any, sampler: type) -> dict[str, Any]:
    """List what a class of schedulers must be told beside the base's config to sample its flow, at its shift.

    Raises:
        UserError: the class can't sample a flow.
    """
    parameters = inspect.signature(sampler).parameters
    if sampler is type(scheduler):
        return {}
    if sampler.__name__.startswith("FlowMatch"):
        return {"shift": process.shift, "use_dynamic_shifting": False}
    if "use_flow_sigmas" in parameters:
        changes = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": process.shift}
        return changes | {"use_dynamic_shifting": False}
    raise UserError(
        f"sampler {sampler.__name__} can't sample a flow, and the base is one; take {type(scheduler).__name__}, which "
        "is its own, or DPMSolverMultistep or UniPCMultistep"
    )
