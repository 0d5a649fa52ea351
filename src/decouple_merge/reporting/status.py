"""What a folder says of a run or a study, which may go on elsewhere: nothing of it is opened but small files."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..storage.locks import holders
from ..storage.reading import AGAIN, MAX_LINES_BYTES, parse_json, read_record, read_text
from ..storage.run_folder import LOCKS, Run, check_run
from ..storage.study_folder import StudyFolder
from .job import Job, Record

ADVICE = "start the command that makes the run again, which writes it"


@dataclass(frozen=True)
class Status:
    """A run as its folder shows it.

    Attributes:
        holders: who works on it now, by lock.
        made: what it holds for use, by what it is.
    """

    folder: Path
    job: Job
    holders: dict[str, dict[str, str]]
    made: dict[str, str]

    @property
    def state(self) -> str:
        """In a word: running, finished or stopped."""
        if self.holders:
            return "running"
        return "finished" if self.job.is_done() else "stopped"

    def record(self) -> Record:
        """Say all as JSON's types."""
        job = self.job
        trainings = [
            {**asdict(t), "last": {k: v for k, v in t.last.items() if k not in ("name", "update", "num_updates")}}
            for t in job.trainings.values()
        ]
        levels = [
            {k: v for k, v in asdict(level).items() if k != "trials"}
            | {"num_done": len(level.trials), "last": level.values[-1:], "best": sorted(level.values)[:1]}
            for level in job.levels.values()
        ]
        return {
            "run": str(self.folder),
            "state": self.state,
            "holders": self.holders,
            "seconds_left": job.seconds_left(),
            "stages": [asdict(stage) for stage in job.stages()],
            "trainings": trainings,
            "search": levels,
            "results": job.means(),
            "made": self.made,
        }


@dataclass(frozen=True)
class StudyStatus:
    """A study as its folder shows it.

    Attributes:
        holders: who works on it now, by lock.
        runs: by name, in the order of arms; None of one that isn't begun.
    """

    folder: Path
    holders: dict[str, dict[str, str]]
    runs: dict[str, Status | None]

    @property
    def state(self) -> str:
        """In a word: running, finished or stopped."""
        if self.holders:
            return "running"
        is_done = all(run is not None and run.job.is_done() for run in self.runs.values())
        return "finished" if is_done else "stopped"

    @property
    def made(self) -> dict[str, str]:
        """What it holds for use, by what it is."""
        places = {"tables": StudyFolder(self.folder).results("md"), "figure": StudyFolder(self.folder).figure}
        return {name: str(path) for name, path in places.items() if path.exists()}

    def record(self) -> Record:
        """Say all as JSON's types."""
        runs = {name: run and run.record() for name, run in self.runs.items()}
        return {
            "study": str(self.folder),
            "state": self.state,
            "holders": self.holders,
            "runs": runs,
            "made": self.made,
        }


def read_study(folder: Path) -> StudyStatus | None:
    """Read what a study's folder says by now; None of a folder that is no study's.

    Raises:
        UserError: a file of it is damaged.
    """
    path = StudyFolder(folder).work
    if not path.is_file():
        return None
    names = read_record(path, "start deme study again, which writes it", runs=list)["runs"]
    runs = {name: read_status(folder / name) if Run(folder / name).work.is_file() else None for name in names}
    return StudyStatus(folder, holders(folder / LOCKS), runs)


def read_status(folder: Path) -> Status:
    """Read what a run folder says by now.

    Raises:
        UserError: it is no run folder, or a file of it is damaged.
    """
    run = Run(folder)
    check_run(folder)
    held = holders(folder / LOCKS)
    # Whoever trains the parts around a denoiser hasn't counted its work yet.
    job = Job({}) if held and not run.work.exists() else read_job(run)
    return Status(folder, job, held, _made(run))


def read_job(run: Run) -> Job:
    """Read what a run has done so far.

    Raises:
        UserError: a file of it is missing or damaged.
    """
    job = Job(read_record(run.work, ADVICE, trainings=list, levels=list, models=list, sets=list))
    for training in job.work["trainings"]:
        folder, name = run.folder / training["folder"], training["name"]
        for record in _lines(folder / "log.jsonl"):
            job.add_step({"name": name, "num_updates": training["num_updates"], **record})
        if run.progress(name).is_file():
            job.add_step(read_record(run.progress(name), AGAIN, name=str, update=int, num_updates=int))
        job.trainings[name].is_finished = (folder / "model.safetensors").is_file()
    for record in _lines(run.trials):
        job.add_trial(record)
    job.is_search_done = not job.levels or run.candidates.is_file()
    for record in _lines(run.metrics):
        job.add_number(record)
    for cost in _lines(run.costs):
        job.costs[cost["stage"]] = job.costs.get(cost["stage"], 0.0) + cost["seconds"]
    return job


def _lines(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    lines = read_text(path, AGAIN, MAX_LINES_BYTES).splitlines()
    return [parse_json(line, f"{path}, line {i}", AGAIN) for i, line in enumerate(lines, start=1)]


def _made(run: Run) -> dict[str, str]:
    places = {
        "merged model": run.merged,
        "merged LoRA": run.merged_lora,
        "pipeline": run.folder / "pipeline",
        "report": run.report,
        "samples": run.sample_figure,
    }
    found = {name: str(path) for name, path in places.items() if path.exists()}
    if analyses := sorted(path.stem for path in run.analysis("").glob("*.json")):
        found["analyses"] = ", ".join(analyses)
    return found
