"""What the section ``search`` asks of a base and its experts, checked before anything is computed."""

from ..config import Search
from ..merging.keys import group_keys
from ..models.base import Base
from .checkpoints import load_checkpoints
from .levels import check_weights
from .study import check_storage


def check_search(settings: Search, base: Base, num_combined: int) -> None:
    """Require that weights, blocks, checkpoints and storage fit each other, the models that are combined, and the base.

    Raises:
        ValueError: they don't.
    """
    if settings.over == "nothing":
        return
    check_weights(settings, num_combined)
    group_keys(list(base.network.state_dict()), settings.blocks)
    load_checkpoints(settings, base)
    if settings.storage is not None:
        check_storage(settings.storage)
