"""What the stages of a run cost in time, kept apart from all that is made again to the same bytes."""

import time
from collections.abc import Generator, Iterator
from typing import Any

from ..executors.devices import default_device
from ..executors.distributed import is_first
from ..storage.files import append_record
from ..storage.run_folder import Run

# What takes less did nothing but look at what is there.
MIN_SECONDS = 1.0


def timed(run: Run, stage: str, events: Iterator[Any]) -> Generator[Any, None, None]:
    """Yield what a stage yields, and at its end, or when it is stopped, add its seconds to ``costs.jsonl``.

    A stage that is done in several goes has a line for each; a process that is killed at once leaves none.
    """
    started = time.monotonic()
    try:
        yield from events
    finally:
        seconds = time.monotonic() - started
        if seconds >= MIN_SECONDS and is_first():
            append_record(run.costs, {"stage": stage, "seconds": round(seconds, 1), "device": str(default_device())})
