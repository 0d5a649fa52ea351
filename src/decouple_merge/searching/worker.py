"""A worker of a search that is led elsewhere."""

import os
import socket
import time
from collections.abc import Iterator

from ..config import Config
from .leader import LeaderWatch
from .levels import levels
from .study import OpenLevel, evaluate_next, help_others
from .trial import Helper, Objective, Trial, help_nobody


def work(
    open_level: OpenLevel, config: Config, num_experts: int, objective: Objective, helper: Helper = help_nobody
) -> Iterator[Trial | str]:
    """Evaluate what a search proposes, until it is finished; yields each trial of this worker, and lines for the user.

    Where no candidate waits, others are helped with theirs.

    Raises:
        UserError: the search has had no leader for too long.
    """
    name = f"{socket.gethostname()}-{os.getpid()}"
    every = [(level, open_level(level.name)) for level in levels(config, num_experts)]
    bounds = (config.search.low, config.search.high)
    watch = LeaderWatch(every[0][1])
    while not every[0][1].user_attrs.get("finished"):
        done = [t for level, study in every for t in evaluate_next(study, name, level, bounds, objective)]
        yield from done
        yield from watch.look()
        if not done and not any(help_others(study, level, helper) for level, study in every):
            time.sleep(0.5)
