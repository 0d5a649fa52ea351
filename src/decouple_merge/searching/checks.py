"""What the section ``search`` asks of a base and its experts, checked before anything is computed."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..config import Search
from ..errors import UserError
from ..merging.keys import group_keys
from ..merging.rules import RULES, check_method
from ..merging.rules.rule import Settings
from ..models.base import Base
from .candidates import check_weights, space_of
from .checkpoints import load_checkpoints


def check_search(settings: Search, base: Base, num_combined: int) -> None:
    """Require that weights, blocks and checkpoints fit each other, the models that are combined, and the base.

    Raises:
        ValueError: they don't.
    """
    if settings.over == "nothing":
        return
    check_weights(settings, num_combined)
    _check_rule(settings, num_combined)
    group_keys(list(base.network.state_dict()), settings.blocks)
    load_checkpoints(settings, base)


def _rows(settings: Search, num_combined: int) -> Iterator[list[float]]:
    """List the weights of each block that are sure to be tried: the base's, and those that the config says."""
    num_weights = num_combined * len(settings.blocks)
    fixed = [settings.frozen.get(i, 0.0) for i in range(num_weights)]
    for point in ([0.0] * num_weights, fixed, *settings.start):
        yield from (list(point[i : i + num_combined]) for i in range(0, num_weights, num_combined))


def _check_rule(settings: Search, num_combined: int) -> None:
    """Require that the rule takes so many models, such weights, and finds what it needs."""
    check_method(settings.method)
    rule, chosen = RULES[settings.method], Settings(**settings.rule_settings())
    if settings.low < rule.low:
        raise UserError(
            f"search.low is {settings.low:g}, and method {settings.method} takes no weights below {rule.low:g}: set "
            f"low to {rule.low:g}"
        )
    if settings.method == "slerp" and settings.low < 0:
        raise UserError(f"search.low is {settings.low:g}, and two weights of slerp may not cancel: set low to 0")
    # A tuned setting may be at either of its bounds.
    corners = itertools.product(*(space_of(settings, num_combined).tuned))
    for corner in corners:
        tuned: dict[str, Any] = dict(zip(settings.tune, corner, strict=True))
        for weights in _rows(settings, num_combined):
            try:
                rule.check(weights, replace(chosen, **tuned))
            except UserError as error:
                at = "".join(f", search.tune reaches {name} {value:g}" for name, value in tuned.items())
                raise UserError(f"search.method is {settings.method}{at}: {error}") from None
    needs = [need for need in rule.needs if need != "seeds"]
    if needs and not settings.combines_experts:
        raise UserError(
            f"search.method {settings.method} needs {' and '.join(needs)} of the run's experts, and other models are "
            "combined; take another method, or merge them by deme merge"
        )
