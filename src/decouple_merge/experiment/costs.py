"""What the stages of a run cost in time and how far they are, apart from all that is made again to the same bytes."""

import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..executors.devices import default_device
from ..executors.distributed import is_first
from ..storage.files import append_record, write_json
from ..storage.run_folder import Run
from ..training.records import StepRecord

# What takes less did nothing but look at what is there.
MIN_SECONDS = 1.0
# Who looks on from another terminal wants no more.
SECONDS_BETWEEN_FILES = 2.0


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


def told(path: Path, records: Iterable[StepRecord]) -> Iterator[StepRecord]:
    """Yield a training's records, and keep the newest in a file, for those who look on from elsewhere."""
    written = -SECONDS_BETWEEN_FILES
    for record in records:
        now = time.monotonic()
        if now - written >= SECONDS_BETWEEN_FILES or record.update == record.num_updates:
            write_json(path, asdict(record))
            written = now
        yield record
