"""Models that a search combines in place of a run's experts."""

from pathlib import Path

from ..config import Search
from ..errors import UserError
from ..merging.arithmetic import Tensors
from ..merging.keys import check_same_keys
from ..models.base import Base
from ..models.network import load_network
from ..storage.reading import looked_for


def load_checkpoints(settings: Search, base: Base) -> list[Tensors]:
    """Read the checkpoints that a search combines in place of the experts.

    Raises:
        UserError: one is missing, damaged, or doesn't fit the base.
    """
    found = []
    for name in settings.checkpoints:
        if not Path(name).exists():
            raise UserError(
                f"search.checkpoints: {name} doesn't exist{looked_for(name)}; expected pipelines, folders or weight "
                "files"
            )
        found.append(load_network(Path(name)))
        check_same_keys(base.network.state_dict(), found[-1], name)
    return found
