"""Merge rules: what each version of a tensor contributes to the merged one; pure functions.

A rule answers with one coefficient for the base and one for each expert, a number or a tensor of the parameter's shape,
and ``combine`` sums: θ_merged = c_0·θ + Σ c_i·θ_i. Task arithmetic on task vectors τ_i = θ_i - θ is that sum with
c_0 = 1 - Σ c_i, a form that is exact where a coefficient is 1 and the others are 0, whatever the magnitudes. Where
coefficients are tensors, the answer is better a function that makes them chunk by chunk, ``Pointwise``. A rule that
works on matrices answers with the change that is added to the base.

``merge_tensor`` does both, on experts in the order of ``summing_order``, so that the order they are given in is none of
a merge's business, bit for bit. Where a rule computes something of each task vector, it is of float32 task vectors, or
of float64 where the base is.

A rule of your own is a function of the same arguments, added to ``RULES`` under a name.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UserError
from . import averages, elections, regression, selecting, sparsifiers, spectral
from .rule import Bounds, Rule, Settings

DENSITY: dict[str, Bounds | None] = {"density": (0.1, 1.0)}
SUM: dict[str, Bounds | None] = {"normalize": None, "scale": None}
ELECTION: dict[str, Bounds | None] = SUM | {"vote": None}
TRIM, OUTLIERS, BY_RANK = (s.measure for s in (sparsifiers.TRIM, sparsifiers.OUTLIERS, sparsifiers.DROP_BY_RANK))
WITHIN = sparsifiers.chances_within
GAMMA: dict[str, Bounds | None] = {"gamma": (0.0, 0.2)}
# Of chances from density - ε to density + ε, at the default ε.
CHANCES: dict[str, Bounds | None] = {"density": (0.15, 0.85), "epsilon": None}
TASKS: dict[str, Bounds | None] = {"threshold": (0.05, 1.0), "min_tasks": None, "max_tasks": None}
SCALE: dict[str, Bounds | None] = {"scale": None}

RULES: dict[str, Rule] = {
    "linear": Rule(averages.linear),
    "ties": Rule(elections.ties, DENSITY | ELECTION, measure=TRIM),
    "dare": Rule(elections.dare, DENSITY | SUM, ["seeds"]),
    "dare_ties": Rule(elections.dare_ties, DENSITY | ELECTION, ["seeds"]),
    "della": Rule(elections.della, CHANCES | ELECTION, ["seeds"], requires=WITHIN, measure=BY_RANK),
    "della_linear": Rule(elections.della_linear, CHANCES | SUM, ["seeds"], requires=WITHIN, measure=BY_RANK),
    "breadcrumbs": Rule(elections.breadcrumbs, DENSITY | GAMMA | SUM, measure=OUTLIERS),
    "breadcrumbs_ties": Rule(elections.breadcrumbs_ties, DENSITY | GAMMA | ELECTION, measure=OUTLIERS),
    "consensus": Rule(elections.consensus, TASKS | SUM, requires=elections.enough_tasks),
    "emr": Rule(elections.emr, SCALE),
    "sce": Rule(selecting.sce, DENSITY | SCALE, num_tensors=5),
    "iso_c": Rule(spectral.iso_c, SCALE, only_finite=True, num_tensors=9),
    "tsv_m": Rule(
        spectral.tsv_m,
        SCALE,
        measure=spectral.leading_factors,
        kept=spectral.num_leading,
        only_finite=True,
        num_tensors=12,
    ),
    "model_stock": Rule(averages.model_stock, only_finite=True),
    "geometric_median": Rule(averages.geometric_median, low=0.0, only_finite=True),
    "karcher": Rule(averages.karcher, low=0.0, only_finite=True),
    "fisher": Rule(averages.fisher, needs=["fishers"], low=0.0),
    "regmean": Rule(
        regression.regmean,
        SCALE | {"off_diagonal": (0.5, 1.0)},
        ["grams"],
        low=0.0,
        only_finite=True,
        num_tensors=16,
        work=regression.num_bytes,
    ),
    "slerp": Rule(averages.slerp, requires=averages.one_or_two),
}


def check_method(name: str) -> None:
    """Require that a rule of this name is in ``RULES``.

    Raises:
        UserError: there is none.
    """
    if name not in RULES:
        raise UserError(f"method: expected one of {', '.join(RULES)}, found {name!r}")


def check_read(name: str, given: Sequence[str]) -> None:
    """Require that a rule reads the settings that a user gave it.

    Args:
        given: names of settings; those that are no rule's are passed over.

    Raises:
        UserError: another rule reads one, and this doesn't.
    """
    every = {key for rule in RULES.values() for key in (*rule.params, *rule.needs)}
    own = {*RULES[name].params, *RULES[name].needs}
    for key in given:
        need = {"seed": "seeds"}.get(key, key)
        if need in every - own:
            readers = [method for method, rule in RULES.items() if need in (*rule.params, *rule.needs)]
            raise UserError(
                f"{key} is set, and method {name} doesn't read it; leave it out, or take method {' or '.join(readers)}"
            )


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Require that a rule reads the settings that a config or a recipe changes from their defaults.

    Raises:
        UserError: as ``check_read``.
    """
    defaults = Settings()
    check_read(name, [key for key, value in settings.items() if value != getattr(defaults, key)])


def check_weights(weights: Sequence[float], num_experts: int) -> None:
    """Require a finite weight for each expert.

    Raises:
        UserError: there are more or fewer, or one is NaN or infinite.
    """
    if len(weights) != num_experts:
        raise UserError(f"{len(weights)} weights for {num_experts} experts, expected one each")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"weights are {list(weights)}, expected finite numbers")
