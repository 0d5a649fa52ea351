"""What a run folder holds, as plain data; nothing of it need be there but the config."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config, load_config
from ..evaluation.records import newest
from ..storage.files import read_records
from ..storage.reading import AGAIN, read_record
from ..storage.run_folder import Run, check_run

Record = dict[str, Any]


@dataclass(frozen=True)
class Training:
    """A training of a run.

    Attributes:
        range_index: of the range that is its own; None where it is trained on all timesteps.
        ranges: [low, high) in timesteps, of the losses in its log.
        log: its validations.
    """

    name: str
    range_index: int | None
    ranges: list[tuple[float, float]]
    log: list[Record]


@dataclass(frozen=True)
class Analysis:
    """An analysis of a run.

    Attributes:
        summary: its JSON: title, caption, finding, settings and hashes, as far as it says them.
        table: its CSV, where there is one.
        figures: PNG files, each with its caption.
    """

    name: str
    summary: Record
    table: Path | None
    figures: list[tuple[Path, str]]


@dataclass(frozen=True)
class Contents:
    """What a run folder holds.

    Attributes:
        metrics: records, of the models as they are now.
        samples: model to its images by seed.
    """

    run: Run
    config: Config
    manifest: Record
    metrics: list[Record]
    trainings: list[Training]
    trials: list[Record]
    candidates: Record
    merge: Record
    samples: dict[str, dict[int, Path]]
    analyses: list[Analysis]
    costs: list[Record]

    @property
    def name(self) -> str:
        return self.run.folder.resolve().name

    @property
    def drawn_with(self) -> str:
        """Say how the images that were scored were drawn."""
        last = self.metrics[-1] if self.metrics else {}
        sample = self.config.report_sample
        sampler, num_steps = (last.get(k) or getattr(sample, k) for k in ("sampler", "num_steps"))
        return f"{sampler or 'the sampler of the base'}, {num_steps} steps"

    @property
    def models(self) -> list[str]:
        """The models with numbers, in the order in which they are compared."""
        return in_order(r["model"] for r in self.metrics)

    def values(self, model: str, metric: str) -> dict[tuple[int, ...], float]:
        """Look up a model's numbers by the seeds that they are of."""
        found = [r for r in self.metrics if (r["model"], r["metric"]) == (model, metric) and r.get("seeds")]
        return {tuple(r["seeds"]): float(r["value"]) for r in found}


def in_order(models: Any) -> list[str]:
    """List models once: pretrained, what has its compute, ensemble, merged, others."""
    kinds = ("pretrained", "baseline-", "ensemble", "merged", "distilled")
    places = {m: next((i for i, k in enumerate(kinds) if m.startswith(k)), len(kinds)) for m in dict.fromkeys(models)}
    return sorted(places, key=lambda m: places[m])


def read_run(folder: Path) -> Contents:
    """Read what a run folder holds by now.

    Raises:
        UserError: it is no run folder, or a file of it is damaged.
    """
    run = Run(folder)
    check_run(folder)
    records = read_records(run.metrics, model=str, metric=str, value=(int, float))
    return Contents(
        run=run,
        config=load_config(run.config),
        manifest=_record(run.manifest),
        metrics=newest(records),
        trainings=list(_trainings(run)),
        trials=read_records(run.trials, level=str, weights=list, seconds=(int, float)),
        candidates=_record(run.candidates),
        merge=_record(run.merged / "merge.json"),
        samples=_samples(run),
        analyses=[_analysis(run, path) for path in sorted(run.analysis("").glob("*.json"))],
        costs=read_records(run.costs, stage=str, seconds=(int, float)),
    )


def _record(path: Path) -> Record:
    return read_record(path, AGAIN) if path.exists() else {}


def _trainings(run: Run) -> Iterator[Training]:
    folders = sorted(run.expert(0).parent.glob("*"), key=lambda p: (len(p.name), p.name))
    for folder in [*folders, *sorted(run.baseline("").glob("*"))]:
        if not (folder / "expert.json").is_file():
            continue
        record = read_record(folder / "expert.json", AGAIN, name=str, own=dict, ranges=list)
        ranges = [(float(r["low"]), float(r["high"])) for r in record["ranges"]]
        own = (float(record["own"]["low"]), float(record["own"]["high"]))
        index = ranges.index(own) if own in ranges and len(ranges) > 1 else None
        log = read_records(folder / "log.jsonl", update=int, validation=list)
        yield Training(record["name"], index, ranges, log)


def _samples(run: Run) -> dict[str, dict[int, Path]]:
    found = {}
    for folder in run.samples("").glob("*"):
        files = {int(p.stem): p for p in folder.glob("*.png") if p.stem.isdecimal()}
        if files:
            found[folder.name] = dict(sorted(files.items()))
    return {model: found[model] for model in in_order(sorted(found))}


def _analysis(run: Run, path: Path) -> Analysis:
    summary, table = read_record(path, AGAIN), path.with_suffix(".csv")
    listed = [(run.figure(f["file"]), str(f["caption"])) for f in summary.get("figures", [])]
    figures = [(file.with_suffix(".png"), caption) for file, caption in listed]
    return Analysis(path.stem, summary, table if table.is_file() else None, [f for f in figures if f[0].is_file()])
