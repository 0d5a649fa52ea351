"""What the section ``search`` asks of a base and its experts, checked before anything is computed."""

from ..config import Search
from ..errors import UserError
from ..merging.keys import group_keys
from ..merging.rules import RULES, check_method
from ..merging.rules.rule import Settings
from ..models.base import Base
from .candidates import check_weights
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


def _check_rule(settings: Search, num_combined: int) -> None:
    """Require that the rule takes so many models, such weights, and finds what it needs."""
    check_method(settings.method)
    rule = RULES[settings.method]
    Settings(**settings.rule_settings()).densities(num_combined)
    if settings.low < rule.low:
        raise UserError(
            f"search.low is {settings.low:g}, and method {settings.method} takes no weights below {rule.low:g}: set "
            f"low to {rule.low:g}"
        )
    if settings.method == "slerp" and num_combined > 2:
        raise UserError(f"search.method is slerp, which takes two models, found {num_combined}; take karcher")
    needs = [need for need in rule.needs if need != "seeds"]
    if needs and not settings.combines_experts:
        raise UserError(
            f"search.method {settings.method} needs {' and '.join(needs)} of the run's experts, and other models are "
            "combined; take another method, or merge them by deme merge"
        )
