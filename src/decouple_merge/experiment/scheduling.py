"""The job of ``deme schedule``: measure, score random schedules, learn to rank them, evolve, and score for real."""

import math
import random
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import __version__
from ..analysis.figures import schedule_front
from ..config import Schedule, Zoo, dump_document
from ..errors import UserError
from ..executors.devices import device_name
from ..searching.predictor import Predictor, fit_predictor, kendall_tau, predict
from ..searching.schedules import Slots, cost_of, evolve, longest_even, random_slots
from ..searching.zoo import OpenedZoo
from ..seeds import stream_seed
from ..storage.files import append_record, read_records, write_json, write_text
from ..storage.locks import enter, hold
from ..storage.made_from import differences, plain, told
from ..storage.outputs import SCHEDULE, SCHEDULE_MARK, SCHEDULE_SEARCH, check_output
from ..storage.reading import AGAIN, read_record
from .located import located_name

# Of the random schedules, what is said of one in so many.
SAID_EVERY = 10


@dataclass(frozen=True)
class Scored:
    """A schedule, or one model alone, with what it costs and the distance of its images."""

    name: str
    seconds: float
    value: float


class Folder:
    """Where a search for a schedule keeps what is done: beside the schedule's file, in a folder of its name."""

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out.with_suffix("")
        self.search, self.latency = self.folder / "search.json", self.folder / "latency.json"
        self.scored, self.front = self.folder / "scored.jsonl", self.folder / "front.jsonl"
        self.result, self.figure = self.folder / "result.json", self.folder / "front.png"


def find_schedule(zoo: Zoo, budget: float, out: Path, wait: bool = False) -> Iterator[str]:
    """Find which network runs at each step so that images are best within a time (OMS-DPM, Liu et al. 2023).

    Yields lines for the user. What was scored is not scored again where the search goes on.

    Args:
        budget: seconds that the network's calls take for a batch of ``sample.batch_size`` images.
        out: the schedule's YAML; all else lies in a folder of its name.
        wait: until no other process works on that folder, instead of refusing.

    Raises:
        UserError: as ``OpenedZoo``; the budget pays for no call of the cheapest model; ``out`` or the folder of its
            name is something else or an input, or the folder was made from another zoo.
    """
    if not 0 < budget < math.inf:
        raise UserError(f"--budget is {budget:g}, expected a number of seconds above 0")
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out is {out}, expected a path that ends in .yaml, by which a schedule is known")
    folder, inputs = Folder(out), [zoo.base, zoo.reference, *zoo.models.values()]
    check_output(out, SCHEDULE, inputs)
    check_output(folder.folder, SCHEDULE_SEARCH, inputs)
    lock = folder.folder / "locks/schedule.lock"
    yield from enter(lock, wait)
    opened = OpenedZoo(zoo)
    with hold(lock, "deme schedule", wait):
        _claim(folder, opened)
        seconds = yield from _latency(folder, opened)
        cheapest = min(range(len(seconds)), key=lambda k: seconds[k])
        if budget < seconds[cheapest]:
            raise UserError(
                f"--budget is {budget:g} s, and one call of the cheapest model, {opened.names[cheapest]}, takes "
                f"{seconds[cheapest]:.3g} s for a batch of {opened.settings.batch_size} images: give more"
            )
        known = yield from _score_random(folder, opened, seconds, budget)
        predictor, tau, num_held = _learn(zoo, opened, known)
        told_tau = "unknown" if tau is None else f"{tau:.3f}"
        yield f"Kendall's τ between predictions and distances of {num_held} held-out schedules: {told_tau}"
        best: dict[float, Slots] = {}
        for share in zoo.schedule.shares:
            if share * budget < seconds[cheapest]:
                continue
            best[share] = _evolved(folder, opened, predictor, seconds, share * budget, known)
            slots = best[share]
            yield (
                f"{share:.0%} of the budget: {sum(map(bool, slots))} of {len(slots)} steps, "
                f"{cost_of(slots, seconds):.3g} s, {opened.metric} {_score(folder, opened, slots):.4g}"
            )
        yield from _report(folder, opened, seconds, budget, best, tau)


def _claim(folder: Folder, opened: OpenedZoo) -> None:
    """Require that what is there was scored as it would be now."""
    schedule, zoo = opened.zoo.schedule, opened.zoo
    record = plain(
        {
            "models": dict(zip(opened.names, opened.sha256, strict=True)),
            "metric": opened.metric,
            "reference": opened.compared[1].name,
            "extractor": opened.compared[0].label,
            "seeds": [schedule.seeds.start, schedule.seeds.stop - 1],
            "report_seeds": [schedule.report_seeds.start, schedule.report_seeds.stop - 1],
            "num_slots": schedule.num_slots,
            "sample": opened.settings.model_dump(mode="json"),
            "text": zoo.text.model_dump(mode="json"),
            "prompts": opened.prompts and opened.prompts.label,
            "decouple_merge": __version__,
        }
    )
    if folder.search.exists():
        if found := differences(read_record(folder.search, AGAIN), record):
            raise UserError(f"{folder.folder} was made from another zoo: {told(found)}; give another --out")
    else:
        write_json(folder.search, record)


def _latency(folder: Folder, opened: OpenedZoo) -> Generator[str, None, list[float]]:
    """Measure what a call of each model takes, once for a folder and device."""
    device, size = device_name(opened.device), opened.settings.batch_size
    if folder.latency.exists():
        record = read_record(folder.latency, AGAIN, device=str, seconds=dict)
        if record["device"] != device:
            raise UserError(
                f"{folder.latency} was measured on {record['device']}, and this is {device}: give another --out"
            )
    else:
        measured = dict(zip(opened.names, opened.measure(), strict=True))
        record = {"device": device, "batch_size": size, "seconds": measured}
        write_json(folder.latency, record)
    seconds = [float(record["seconds"][name]) for name in opened.names]
    yield f"a call on {size} images, {device}: " + ", ".join(
        f"{name} {found:.3g} s" for name, found in zip(opened.names, seconds, strict=True)
    )
    return seconds


def _score(folder: Folder, opened: OpenedZoo, slots: Slots) -> float:
    """Score a schedule on the seeds that choose, or read what it scored before."""
    for record in read_records(folder.scored, slots=list, value=float):
        if tuple(record["slots"]) == slots:
            return record["value"]
    value = opened.distance(slots, opened.zoo.schedule.seeds)
    append_record(folder.scored, {"slots": slots, "value": value})
    return value


def _score_random(
    folder: Folder, opened: OpenedZoo, seconds: list[float], budget: float
) -> Generator[str, None, dict[Slots, float]]:
    """Score random schedules around the budget."""
    settings, known = opened.zoo.schedule, dict[Slots, float]()
    # Other work on the machine while calls were timed would show here.
    least, name = min(zip(seconds, opened.names, strict=True))
    yield f"the budget pays for {int(budget / least)} calls of {name}, of {settings.num_slots} steps"
    for i in range(settings.num_schedules):
        chance = random.Random(stream_seed(opened.zoo.seed, "schedule", i))
        slots = random_slots(settings.num_slots, seconds, budget, chance)
        known[slots] = _score(folder, opened, slots)
        if (i + 1) % SAID_EVERY == 0:
            yield f"{i + 1} of {settings.num_schedules} random schedules scored, the best {min(known.values()):.4g}"
    return known


def _learn(zoo: Zoo, opened: OpenedZoo, known: dict[Slots, float]) -> tuple[Predictor, float | None, int]:
    """Fit a predictor to all but the last of the scored schedules.

    Returns:
        The predictor, Kendall's τ on the schedules that it didn't see, None where they have no order, and their number.
    """
    finite = [v for v in known.values() if v < float("inf")]
    if not finite:
        raise UserError(
            f"none of {len(known)} random schedules drew finite images, expected some: look at what each model of the "
            "zoo draws alone"
        )
    worst = max(finite)
    schedules, values = list(known), [min(value, worst) for value in known.values()]
    settings = zoo.schedule
    num = max(2, len(schedules) - max(2, round(settings.held_out * len(schedules))))
    predictor = fit_predictor(schedules[:num], values[:num], len(opened.names), settings.num_updates, zoo.seed)
    held = schedules[num:]
    tau = kendall_tau(predict(predictor, held), values[num:]) if len(held) > 1 else math.nan
    return predictor, None if math.isnan(tau) else tau, len(held)


def _evolved(
    folder: Folder,
    opened: OpenedZoo,
    predictor: Predictor,
    seconds: list[float],
    budget: float,
    known: dict[Slots, float],
) -> Slots:
    """Evolve schedules under a budget, and choose the best of the last ones for real.

    With them compete as many even steps of each single model as the budget pays for, and the best random schedule.
    """
    settings = opened.zoo.schedule
    chance = random.Random(stream_seed(opened.zoo.seed, "evolution"))
    even = [longest_even(k + 1, settings.num_slots, seconds, budget) for k in range(len(seconds))]
    single = [slots for slots in even if slots is not None]
    paid = sorted((s for s in known if cost_of(s, seconds) <= budget), key=lambda slots: known[slots])
    start = [random_slots(settings.num_slots, seconds, budget, chance) for _ in range(settings.population)]

    def ranked(schedules: list[Slots]) -> list[float]:
        return predict(predictor, schedules)

    last = evolve(
        ranked,
        [*single, *paid[: settings.population], *start],
        seconds,
        budget,
        settings.num_generations,
        settings.population,
        chance,
    )
    finalists = dict.fromkeys([*last[: settings.num_finalists], *single, *paid[:1]])
    return min(finalists, key=lambda slots: _score(folder, opened, slots))


def _report(
    folder: Folder, opened: OpenedZoo, seconds: list[float], budget: float, best: dict[float, Slots], tau: float | None
) -> Iterator[str]:
    """Score what was found, and single models by the plain sampler, on seeds that chose nothing; write all down."""
    settings, seeds = opened.zoo.schedule, opened.zoo.schedule.report_seeds
    points: dict[str, list[Scored]] = {}
    for slots in dict.fromkeys(best.values()):
        value = _reported(folder, {"slots": list(slots)}, partial(opened.distance, slots, seeds))
        points.setdefault("schedules", []).append(Scored("schedule", cost_of(slots, seconds), value))
    for name in opened.zoo.baselines:
        model = opened.names.index(name) + 1
        for num in settings.baseline_steps:
            alone = partial(opened.distance_alone, model, num, seeds)
            value = _reported(folder, {"model": name, "steps": num}, alone)
            point = Scored(f"{name}, {num} steps", num * seconds[model - 1], value)
            points.setdefault(f"{name} alone", []).append(point)
    for line, found in points.items():
        for point in found:
            yield f"{line}: {point.name}, {point.seconds:.3g} s, {opened.metric} {point.value:.4g}"
    _write(folder, opened, seconds, budget, best, tau, points)
    yield f"schedule: {folder.out}; the front: {folder.figure}"


def _reported(folder: Folder, key: dict[str, Any], measure: Callable[[], float]) -> float:
    """Score for the front, or read what was scored before."""
    for record in read_records(folder.front, value=float):
        if key.items() <= record.items():
            return record["value"]
    value = measure()
    append_record(folder.front, {**key, "value": value})
    return value


def _write(
    folder: Folder,
    opened: OpenedZoo,
    seconds: list[float],
    budget: float,
    best: dict[float, Slots],
    tau: float | None,
    points: dict[str, list[Scored]],
) -> None:
    slots, metric, seeds = best[1.0], opened.metric, opened.zoo.schedule.report_seeds
    names = {k + 1: name for k, name in enumerate(opened.names)}
    used = {names[k]: opened.zoo.models[names[k]] for k in sorted({k for k in slots if k})}
    schedule = Schedule(
        base=located_name(opened.zoo.base),
        models={name: given if given == "base" else located_name(given) for name, given in used.items()},
        steps=[names[k] if k else 0 for k in slots],
    )
    result = {
        "budget_seconds": budget,
        "kendall_tau": tau,
        "metric": metric,
        "report_seeds": [seeds.start, seeds.stop - 1],
        "schedules": [
            {"share": share, "seconds": cost_of(found, seconds), "steps": [names.get(k, 0) for k in found]}
            for share, found in best.items()
        ],
        "front": {line: [vars(point) for point in found] for line, found in points.items()},
    }
    schedule_front(
        {line: [(point.seconds, point.value) for point in found] for line, found in points.items()},
        f"seconds of network calls for {opened.settings.batch_size} images",
        f"{metric} of {len(seeds)} images",
        folder.figure,
    )
    write_json(folder.result, result)
    head = f"{SCHEDULE_MARK}: {cost_of(slots, seconds):.4g} s of a budget of {budget:g} s for a batch of images.\n"
    write_text(folder.out, head + dump_document(schedule.model_dump()))
