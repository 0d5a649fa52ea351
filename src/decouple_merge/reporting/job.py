"""How far a run is and what is left of it, told by its events as they come or by the files of its folder.

Nothing heavy is imported here: who looks on from another terminal gets an answer at once.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

Record = dict[str, Any]

# Whoever finished a candidate in so many times what one takes, before the newest, is at work.
RECENT = 2.0


@dataclass
class Training:
    """A training of a run.

    Attributes:
        own: the range that it is of, in timesteps.
        num_images: of an update.
        num_passes: of the network for one of them.
        last: the newest of its records, with the speed.
        validation: the newest losses on each range.
        distances: all that were taken, by the updates after which they were.
    """

    name: str
    own: tuple[int | float, int | float]
    num_updates: int
    num_images: int = 0
    num_passes: int = 0
    update: int = 0
    last: Record = field(default_factory=dict)
    validation: list[float] = field(default_factory=list)
    distances: dict[int, float] = field(default_factory=dict)
    is_finished: bool = False

    @property
    def seconds_per_pass(self) -> float | None:
        speed = self.last.get("images_per_second")
        return 1 / (speed * self.num_passes) if speed and self.num_passes else None

    def seconds_left(self, seconds_per_pass: float | None) -> float | None:
        """Estimate by its own speed, or before it has one by that of others."""
        if self.is_finished:
            return 0.0
        if (own := self.seconds_per_pass or seconds_per_pass) is None:
            return None
        return (self.num_updates - self.update) * self.num_images * self.num_passes * own


@dataclass
class Level:
    """A level of a run's search.

    Attributes:
        trials: by their numbers, in the order in which they ended.
    """

    name: str
    num_candidates: int
    num_images: int
    num_steps: int
    trials: dict[int, Record] = field(default_factory=dict)

    @property
    def values(self) -> list[float]:
        """Those of the candidates that aren't lost."""
        return [t["value"] for t in self.trials.values() if t["value"] is not None and not t.get("failure")]


@dataclass(frozen=True)
class Stage:
    """A part of the whole job.

    Attributes:
        unit: of what is done.
        seconds_left: about; None where nothing is known yet.
        seconds: that it took so far, as far as it was recorded.
    """

    name: str
    num_done: int
    num_total: int
    unit: str
    seconds_left: float | None
    seconds: float | None = None


class Job:
    """A run: what its trainings, search and report have done, from the records of each.

    Args:
        work: of ``progress/work.json``; nothing where only trainings are told of.
    """

    def __init__(self, work: Record) -> None:
        self.work = work
        self.ranges: list[tuple[float, float]] = [(low, high) for low, high in work.get("ranges", [])]
        self.trainings = {
            t["name"]: Training(t["name"], tuple(t["own"]), t["num_updates"], t["num_images"], t["num_passes"])
            for t in work.get("trainings", [])
        }
        self.levels = {level["name"]: Level(**level) for level in work.get("levels", [])}
        self.numbers: dict[tuple[str, str, int], float] = {}
        self.hashes: dict[str, str | None] = {}
        self.is_search_done = not self.levels
        self.costs: dict[str, float] = {}

    def add_step(self, record: Record) -> None:
        """Take in a ``StepRecord`` or a line of a training's log."""
        name = record["name"]
        if name not in self.trainings:
            self.trainings[name] = Training(name, (0, 0), record["num_updates"])
        training = self.trainings[name]
        training.update = record["update"]
        training.last |= {key: value for key, value in record.items() if value is not None}
        if record.get("validation") is not None:
            training.validation = record["validation"]
        if record.get("distance") is not None:
            training.distances[record["update"]] = record["distance"]
        training.is_finished = training.is_finished or training.update >= training.num_updates

    def add_trial(self, record: Record) -> None:
        """Take in a ``Trial`` or a line of ``trials.jsonl``."""
        if level := self.levels.get(record["level"]):
            level.trials[record["number"]] = record

    def add_number(self, record: Record) -> None:
        """Take in a record of ``metrics.jsonl``; one of another model of that name drops those before.

        What was drawn or compared otherwise than the run does now isn't taken.
        """
        model, seeds = record["model"], record["seeds"]
        if model not in self.work["models"] or record["metric"] not in self.work["metrics"]:
            return
        compared = self.work["compared"][record["metric"]]
        if seeds not in self.work["sets"] or not all(_is_same(record.get(key), compared[key]) for key in compared):
            return
        if self.hashes.setdefault(model, record.get("model_sha256")) != record.get("model_sha256"):
            self.numbers = {key: value for key, value in self.numbers.items() if key[0] != model}
            self.hashes[model] = record.get("model_sha256")
        self.numbers[model, record["metric"], seeds[0]] = record["value"]

    def means(self) -> dict[str, dict[str, float]]:
        """Average what was measured over the sets of images: by model and metric."""
        found: dict[str, dict[str, list[float]]] = {m: {} for m in self.work.get("models", [])}
        for (model, metric, _), value in sorted(self.numbers.items()):
            found[model].setdefault(metric, []).append(value)
        return {m: {k: statistics.fmean(v) for k, v in of_model.items()} for m, of_model in found.items() if of_model}

    def stages(self) -> list[Stage]:
        """List the parts of the job in their order."""
        return list(self._stages())

    def _stages(self) -> Iterator[Stage]:
        if self.trainings:
            every = self.trainings.values()
            done, total = sum(t.update for t in every), sum(t.num_updates for t in every)
            yield Stage("finetune", done, total, "updates", self._training_left(), self.costs.get("finetune"))
        if self.levels:
            done = sum(len(level.trials) for level in self.levels.values())
            total = sum(self._num_expected(level) for level in self.levels.values())
            yield Stage("search", done, total, "candidates", self._search_left(), self.costs.get("search"))
        if self.work.get("models"):
            total = len(self.work["models"]) * len(self.work["sets"])
            done = total - self._num_sets_left()
            yield Stage("evaluate", done, total, "sets of images", self._report_left(), self.costs.get("evaluate"))

    def is_done(self) -> bool:
        """Say whether trainings, search and report are finished."""
        return self.is_search_done and not self._num_sets_left() and all(t.is_finished for t in self.trainings.values())

    def seconds_left(self) -> float | None:
        """Estimate what is left of the whole job; None where nothing is known yet."""
        return _sum(stage.seconds_left for stage in self.stages())

    @property
    def _num_at_once(self) -> int:
        return int(self.work.get("num_at_once", 1))

    def _training_left(self) -> float | None:
        """Estimate how long the trainings take: in their order, each on the process that is free first."""
        known = [t.seconds_per_pass for t in self.trainings.values() if t.seconds_per_pass]
        mean = statistics.fmean(known) if known else None
        ends = [0.0] * self._num_at_once
        for training in self.trainings.values():
            seconds = training.seconds_left(mean)
            if seconds is None:
                return None
            ends[ends.index(min(ends))] += seconds
        return max(ends)

    def _seconds_per_pass(self) -> float | None:
        """Say what one call of the network takes for an image: while candidates were drawn, else while trained."""
        of_search = self._search_pass()
        if of_search is not None:
            return of_search
        known = [t.seconds_per_pass for t in self.trainings.values() if t.seconds_per_pass]
        return statistics.fmean(known) if known else None

    def _search_pass(self) -> float | None:
        seconds = sum(t["seconds"] for t in self._trials())
        passes = sum(len(level.trials) * self._passes(level) for level in self.levels.values())
        return seconds / passes if passes else None

    def _trials(self) -> list[Record]:
        return [t for level in self.levels.values() for t in level.trials.values()]

    def _passes(self, level: Level) -> int:
        """Count the calls of the network for a candidate."""
        return level.num_images * level.num_steps * int(self.work["passes_per_step"])

    def _num_expected(self, level: Level) -> int:
        """Count a level's candidates; one that ended early, as where its strategy converged, has no more."""
        names = list(self.levels)
        has_next = any(self.levels[name].trials for name in names[names.index(level.name) + 1 :])
        return len(level.trials) if has_next or self.is_search_done else level.num_candidates

    def _search_left(self) -> float | None:
        if self.is_search_done:
            return 0.0
        if (per_pass := self._seconds_per_pass()) is None:
            return None
        left = [(self._num_expected(v) - len(v.trials)) * self._passes(v) for v in self.levels.values()]
        return max(sum(left), 0) * per_pass / max(self._num_at_once, self._num_workers())

    def _num_workers(self) -> int:
        """Count who finished a candidate lately, ``deme search --worker`` among them."""
        trials = [t for t in self._trials() if t.get("started")]
        if not trials:
            return 1
        ends = {t["worker"]: _end(t) for t in sorted(trials, key=_end)}
        moment = RECENT * statistics.fmean(t["seconds"] for t in trials)
        return sum(max(ends.values()) - end <= moment for end in ends.values())

    def _num_sets_left(self) -> int:
        every = [(m, s[0]) for m in self.work.get("models", []) for s in self.work["sets"]]
        return sum(any((m, k, s) not in self.numbers for k in self.work["metrics"]) for m, s in every)

    def _report_left(self) -> float | None:
        if not (num := self._num_sets_left()):
            return 0.0
        if (per_pass := self._seconds_per_pass()) is None:
            return None
        first, last = self.work["sets"][0]
        passes = (last - first + 1) * self.work["num_steps"] * self.work["passes_per_step"]
        return float(num * passes * per_pass / self._num_at_once)


def _is_same(found: Any, wanted: Any) -> bool:
    """Compare by value; a reference is known by its hash, whatever its name."""
    return bool(found == wanted or (isinstance(found, str) and found.endswith(f":{wanted}")))


def _end(trial: Record) -> float:
    started: float = datetime.fromisoformat(trial["started"]).timestamp()
    return started + float(trial["seconds"])


def _sum(values: Any) -> float | None:
    found = list(values)
    return None if not found or None in found else sum(found)
