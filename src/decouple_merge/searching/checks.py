"""What the section ``search`` asks of a base and its experts, checked before anything is computed."""

from ..config import Search
from ..merging.keys import group_keys
from ..models.base import Base
from .checkpoints import load_checkpoints
from .levels import check_weights


def check_search(settings: Search, base: Base, num_ranges: int) -> None:
    """Require that weights, blocks and checkpoints fit each other and the base.

    Raises:
        ValueError: they don't.
    """
    check_weights(settings, len(settings.checkpoints) or num_ranges)
    group_keys(list(base.network.state_dict()), settings.blocks)
    load_checkpoints(settings, base)
