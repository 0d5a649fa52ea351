"""Weightings of the denoising loss over timesteps: one table, by name.

A weighting is a weight w(SNR) on the squared error of x0. What it means for ε, x0, v or a velocity follows from the
process: w·‖x0 - x0_θ‖² = w·c·‖target - output‖² with c = ``Process.x0_error`` (the supplement of DeMe, section 1).
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import UserError
from .process import Process, Timesteps
from .timesteps import exact

Weighting = Callable[..., Tensor]
Weight = Callable[[Process, Timesteps], Tensor | None]


def standard(snr: Tensor) -> Tensor:
    """The loss of an ε-model, w = SNR (Ho et al. 2020)."""
    return snr


def snr_plus_one(snr: Tensor) -> Tensor:
    """The loss of a v-model, w = SNR + 1 (Salimans & Ho 2022)."""
    return snr + 1


def truncated_snr(snr: Tensor) -> Tensor:
    """w = max(SNR, 1) (Salimans & Ho 2022)."""
    return snr.clamp(min=1)


def min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR-γ, w = min(SNR, γ) (Hang et al. 2023)."""
    return snr.clamp(max=gamma)


def soft_min_snr(snr: Tensor, gamma: float = 5.0) -> Tensor:
    """Soft Min-SNR, w = SNR·γ / (SNR + γ) (Crowson et al. 2024)."""
    # Written so that a clean image, whose SNR is infinite, gets γ.
    return gamma / (1 + gamma / snr)


def p2(snr: Tensor, k: float = 1.0, gamma: float = 1.0) -> Tensor:
    """P2, w = SNR / (k + SNR)^γ (Choi et al. 2022)."""
    return snr / (k + snr) ** gamma


def debiased(snr: Tensor) -> Tensor:
    """Debiased estimation, w = √SNR (Yu et al. 2024)."""
    return snr.sqrt()


WEIGHTINGS: dict[str, Weighting] = {
    "standard": standard,
    "snr_plus_one": snr_plus_one,
    "truncated_snr": truncated_snr,
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "p2": p2,
    "debiased": debiased,
}


# Weights that are trained along have parameters: see training/balancing.py.
LEARNED = ("uncertainty", "ant_uw", "ant_nash", "pcgrad")


def weight_of(name: str | Sequence[float] | None, **options: float) -> Weight:
    """Look up a weighting, and bind its options; None weighs the error of the output itself by 1.

    Args:
        name: or a table w(t) >= 0 of the output's errors, [n]: its i-th number counts on [i·T/n, (i + 1)·T/n). DeMe is
            to first order such a weighting by its N ranges (its supplement, section 1.2).

    Returns:
        The function from a process and timesteps [batch] to the weights of the output's errors, [batch].

    Raises:
        UserError: there is no such weighting, or it has no such option.
    """
    if options and not isinstance(name, str):
        raise UserError(f"weighting_options are {options} and no weighting has a name; set weighting, or leave them")
    if name is None:
        return lambda process, t: None
    if not isinstance(name, str):
        return partial(_looked_up, torch.tensor(list(name)))
    if name in LEARNED:
        raise UserError(
            f"weighting is {name!r}, which is learned: set balancing to it; a weighting may stand beside it"
        )
    if name not in WEIGHTINGS:
        raise UserError(f"weighting is {name!r}, expected one of {', '.join(WEIGHTINGS)}")
    weighting = WEIGHTINGS[name]
    known = list(inspect.signature(weighting).parameters)[1:]
    if unknown := [option for option in options if option not in known]:
        raise UserError(f"weighting {name} has no option {unknown[0]!r}, expected {', '.join(known) or 'none'}")
    return lambda process, t: output_weights(process, t, lambda snr: weighting(snr, **options))


def _looked_up(table: Float[Tensor, " n"], process: Process, t: Timesteps) -> Float[Tensor, " batch"]:
    part = (exact(t) * len(table) / process.num_train_timesteps).long().clamp(max=len(table) - 1)
    return table.to(t.device)[part]


def output_weights(process: Process, t: Timesteps, weighting: Weighting) -> Float[Tensor, " batch"]:
    """Compute w(SNR)·c, float32; where the SNR is 0 or c infinite, the limit from less noise where there is one."""
    snr, factor = exact(process.snr(t)), exact(process.x0_error(t))
    tiny = torch.finfo(torch.float32).tiny
    # ε at zero terminal SNR: c is infinite, w may be 0, and their product is finite for standard, Min-SNR and P2.
    is_void = factor.isinf()
    snr = torch.where(is_void, tiny, snr)
    factor = torch.where(is_void, 1 / snr, factor)
    return (weighting(snr) * factor).float()


def check_weighting(name: str | Sequence[float] | None, options: dict[str, float], process: Process) -> None:
    """Require that a weighting exists, and that its weights are finite and not negative on all timesteps.

    Raises:
        UserError: they aren't; of an ε-model with zero terminal SNR some have no limit.
    """
    t = process.spread(process.split(1)[0], process.num_train_timesteps)
    weights = weight_of(name, **options)(process, t)
    # What is beyond this drowns all other timesteps.
    if weights is not None and not bool(weights.any()):
        raise UserError("weighting holds zeros alone, which leave nothing to train")
    if weights is not None and bool((broken := (weights < 0) | weights.isnan()).any()):
        first = int(broken.int().argmax())
        raise UserError(
            f"weighting {name} with {options or 'its defaults'} has the weight {weights[first]:g} at timestep "
            f"{t[first]:g}, expected 0 or more: change weighting_options"
        )
    if weights is not None and not bool((weights < 1e12).all()):
        worst = int(t[weights.argmax()])
        raise UserError(
            f"weighting {name} with {options or 'its defaults'} has no finite weight at timestep {worst}, where the "
            "base's schedule has no signal left; take min_snr or p2, or a base that predicts v"
        )
