"""The analyses of a run: computed once, and written as a table, what was found, and figures."""

import csv
import hashlib
import io
import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from .. import __version__
from ..analysis import analyses, open_analysis
from ..analysis.cost import describe, measure_speed
from ..analysis.subject import Finding, Kept, Progress, Subject
from ..config import Analyze, load_config
from ..errors import UserError
from ..executors import run_all
from ..models.base import tensors_sha256
from ..models.identity import base_parts
from ..storage.files import atomic_path, write_json, write_text
from ..storage.locks import enter, hold
from ..storage.reading import AGAIN, read_record
from ..storage.run_folder import Run
from ..training.made_from import data_parts
from .plan import check, prepare
from .planned import Plan
from .pretraining import open_pretrained
from .subjects import FINISH, HELD, REMEDIES, subject_of


def open_run(folder: Path, dry_run: bool = False) -> Plan:
    """Open a run, or the training of a base, which has no experts.

    Args:
        dry_run: write nothing into it.

    Raises:
        UserError: as ``prepare``.
    """
    config = load_config(Run(folder).config)
    if (folder / "pipeline").is_dir():
        return open_pretrained(config, folder)
    return check(config, folder) if dry_run else prepare(config, folder)


def analyze(
    plan: Plan,
    only: Sequence[str] = (),
    settings: Analyze | None = None,
    dry_run: bool = False,
    wait: bool = False,
    others: Sequence[Path] = (),
) -> Iterator[str | Progress]:
    """Do the analyses of a run that aren't done yet; yields lines for the user, and how far a long one is.

    Each leaves ``analysis/<name>.csv``, ``analysis/<name>.json`` with what was found, ``analysis/<name>.npz`` where
    there is more than a table holds, and ``figures/<name>*.png`` and ``.svg``.

    Args:
        only: their names; where none is given, all for which the run holds what they need.
        settings: instead of those of the run's config.
        dry_run: say only what they will cost.
        wait: until no other process analyses the run, instead of refusing.
        others: folders of runs that this one is compared with.

    Raises:
        UserError: there is no such analysis, the run lacks what it needs or it is damaged, there are too few images,
            or another process analyses the run.
    """
    settings = settings or plan.config.analyze
    chosen, left_out = _choose(plan, only, others)
    yield from left_out
    subject = subject_of(plan, settings, {name: module.NEEDS for name, module in chosen.items()}, others)
    lock = plan.run.lock("analyze")
    if not dry_run:
        yield from enter(lock, wait)
    with nullcontext() if dry_run else hold(lock, "deme analyze", wait):
        depends_on, waiting = _depends_on(plan, subject, chosen), []
        for name in chosen:
            if _is_done(plan, name, depends_on[name]):
                yield f"{name}: done, {plan.run.analysis(f'{name}.csv')}"
            else:
                waiting.append(name)
        costs = {name: chosen[name].cost(subject) for name in waiting}
        if any(cost.is_any for cost in costs.values()):
            speed = measure_speed(subject)
            yield from (describe(name, cost, speed) for name, cost in costs.items() if cost.is_any)
        if dry_run:
            yield from (f"{name}: reads what is there" for name, cost in costs.items() if not cost.is_any)
        if not dry_run:
            del subject
            yield from _analyze_each(plan, settings, others, {name: depends_on[name] for name in waiting})


def _analyze_each(
    plan: Plan, settings: Analyze, others: Sequence[Path], depends_on: dict[str, dict[str, Any]]
) -> Iterator[str | Progress]:
    """Do some analyses, each as a piece of work: where the run's config says, so many at once as it says."""
    calls = [(plan, settings, others, name, own) for name, own in depends_on.items()]
    yield from run_all(_open_and_analyze, calls, *plan.config.where, folder=plan.run.folder)


def _open_and_analyze(
    plan: Plan, settings: Analyze, others: Sequence[Path], name: str, depends_on: dict[str, Any]
) -> Iterator[str | Progress]:
    module = open_analysis(name)
    yield from _analyze(plan, subject_of(plan, settings, {name: module.NEEDS}, others), name, module, depends_on)


def _choose(plan: Plan, only: Sequence[str], others: Sequence[Path]) -> tuple[dict[str, Any], list[str]]:
    """Open the analyses that are wanted, or all for which the run holds what they need, and say which are left out."""
    chosen, lines = {name: open_analysis(name) for name in only or analyses()}, []
    for name, module in list(chosen.items()):
        if needs := [need for need in module.NEEDS if not HELD[need](plan, others)]:
            line = f"{name} needs {' and '.join(needs)}, which {plan.run.folder} doesn't hold"
            if only:
                raise UserError(f"{line}; {REMEDIES.get(needs[0], FINISH)}")
            lines.append(f"{line}: left out")
            del chosen[name]
    return chosen, lines


def _depends_on(plan: Plan, subject: Subject, chosen: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Say all that each finding depends on: settings, and hashes of what it was made from."""
    settings, found = subject.settings, {}
    common = {
        "base": base_parts(plan.base),
        "data": data_parts(plan.images, plan.config.data),
        "ranges": [[r.low, r.high] for r in subject.ranges],
    }
    # What no analysis needs isn't loaded.
    loaded: dict[str, Any] = {"experts": [tensors_sha256(e) for e in subject.experts]}
    if subject.merged is not None:
        loaded["merged"] = tensors_sha256(subject.merged)
    for name, module in chosen.items():
        hashes = {f"{need}_sha256": loaded[need] for need in ("experts", "merged") if need in module.NEEDS}
        own, values = settings.of(name), {"seed": settings.seed, "batch_size": subject.batch_size}
        found[name] = {
            "settings": values | (own.model_dump(mode="json") if own else {}),
            "made_from": common | hashes | subject.hashes.get(name, {}) | {"decouple_merge": __version__},
        }
    return found


def _is_done(plan: Plan, name: str, depends_on: dict[str, Any]) -> bool:
    found = plan.run.analysis(f"{name}.json")
    return found.exists() and depends_on.items() <= read_record(found, AGAIN).items()


def _analyze(
    plan: Plan, subject: Subject, name: str, module: Any, depends_on: dict[str, Any]
) -> Generator[str | Progress, None, None]:
    digest = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:16]
    kept = plan.run.analysis(f"{name}.parts") / digest
    finding: Finding = yield from module.compute(subject.with_kept(Kept(kept)))
    table = plan.run.analysis(f"{name}.csv")
    write_text(table, _as_csv(finding))
    if finding.arrays:
        with atomic_path(table.with_suffix(".npz")) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **finding.arrays)
    figures = [
        {"file": _save(plan, name, part, figure), "caption": module.CAPTIONS[part]}
        for part, figure in module.draw(finding).items()
    ]
    record = {
        "name": name,
        "title": module.TITLE,
        "caption": module.CAPTIONS[""],
        "finding": finding.sentence,
        **depends_on,
        "figures": figures,
        "table": table.name,
        "arrays": f"{name}.npz" if finding.arrays else None,
        "summary": finding.summary,
    }
    # Last: it means that the rest is there.
    write_json(table.with_suffix(".json"), record)
    shutil.rmtree(kept.parent, ignore_errors=True)
    yield f"{name}: {finding.sentence}"
    yield f"{name}: {table}"


def _as_csv(finding: Finding) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(finding.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(finding.rows)
    return text.getvalue()


def _save(plan: Plan, name: str, part: str, figure: object) -> str:
    """Write a figure as PNG and SVG; returns the PNG's name."""
    assert isinstance(figure, plt.Figure)
    stem = f"{name}-{part}" if part else name
    # Without date and with names by content, the same finding gives the same bytes.
    with plt.rc_context({"svg.hashsalt": hashlib.sha256(stem.encode()).hexdigest()}):
        for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
            with atomic_path(plan.run.figure(f"{stem}.{suffix}")) as temporary:
                figure.savefig(temporary, dpi=120, format=suffix, metadata=metadata)
    plt.close(figure)
    return f"{stem}.png"
