"""Signs of life of who leads a search, in the storage that its workers look at."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import UserError
from .study import Study, beating

LEADER = "leader"
# A worker says so after the first, and ends after the second.
SILENT_SECONDS, LEADERLESS_SECONDS = 60, 600


@contextmanager
def leading(study: Study) -> Iterator[None]:
    """Say in a search's first study, while the context lasts, that it has a leader; of a finished one nothing."""
    if study.user_attrs.get("finished"):
        yield
        return
    name = f"{socket.gethostname()}-{os.getpid()}-{time.time()}"
    study.set_user_attr(LEADER, name)
    with beating(lambda count: study.set_user_attr(LEADER, f"{name}-{count}")):
        yield


class LeaderWatch:
    """A worker's look at its leader: for how long there was no sign of life, which no other clock enters."""

    def __init__(self, study: Study) -> None:
        self.study, self.last, self.since = study, study.user_attrs.get(LEADER), time.monotonic()
        self.is_told = False

    def look(self) -> Iterator[str]:
        """Look again; yields a line where the leader has fallen silent.

        Raises:
            UserError: it was for too long.
        """
        now, found = time.monotonic(), self.study.user_attrs.get(LEADER)
        if found != self.last:
            self.last, self.since, self.is_told = found, now, False
        silent_seconds = now - self.since
        if silent_seconds > LEADERLESS_SECONDS:
            raise UserError(
                f"the search has had no leader for {silent_seconds:.0f} s; start deme search RUN or deme run, then its "
                "workers again"
            )
        if silent_seconds > SILENT_SECONDS and not self.is_told:
            self.is_told = True
            yield f"the search has had no leader for {silent_seconds:.0f} s; this worker ends at {LEADERLESS_SECONDS} s"
