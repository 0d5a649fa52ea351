"""The analyses of a run: computed once, and written as a table, a summary and figures."""

import csv
import hashlib
import io
from collections.abc import Iterator, Sequence

import matplotlib.pyplot as plt

from .. import __version__
from ..analysis import analyses, open_analysis
from ..analysis.subject import Finding, Subject
from ..models.base import tensors_sha256
from ..storage.files import atomic_path, write_json, write_text
from ..storage.reading import AGAIN, read_record
from .plan import Plan, load_experts


def analyze(plan: Plan, only: Sequence[str] = ()) -> Iterator[str]:
    """Do the analyses of a run that aren't done yet; yields lines for the user.

    Each leaves ``analysis/<name>.csv``, its summary beside it as JSON, and ``figures/<name>.png`` and ``.svg``.

    Args:
        only: their names; all where none is given.

    Raises:
        UserError: there is no such analysis, or an expert is missing, damaged, or of another base.
    """
    chosen = {name: open_analysis(name) for name in only or analyses()}
    subject = Subject(plan.base, load_experts(plan), plan.ranges)
    made_from = {
        "base_sha256": plan.base.sha256,
        "experts_sha256": [tensors_sha256(e) for e in subject.experts],
        "ranges": [[r.low, r.high] for r in subject.ranges],
        "decouple_merge": __version__,
    }
    for name, analysis in chosen.items():
        table, summary = plan.run.analysis(f"{name}.csv"), plan.run.analysis(f"{name}.json")
        if summary.exists() and read_record(summary, AGAIN).get("made_from") == made_from:
            yield f"{name}: done, {table}"
            continue
        finding: Finding = yield from analysis.compute(subject)
        write_text(table, _as_csv(finding))
        _save(plan, name, analysis.draw(finding))
        # Last: a summary means that the rest is there.
        write_json(summary, {"made_from": made_from, **finding.summary})
        yield f"{name}: {table}"


def _as_csv(finding: Finding) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(finding.rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(finding.rows)
    return text.getvalue()


def _save(plan: Plan, name: str, figure: object) -> None:
    assert isinstance(figure, plt.Figure)
    # Without date and with names by content, the same finding gives the same bytes.
    with plt.rc_context({"svg.hashsalt": hashlib.sha256(name.encode()).hexdigest()}):
        for suffix, metadata in (("png", {}), ("svg", {"Date": None})):
            with atomic_path(plan.run.figure(f"{name}.{suffix}")) as temporary:
                figure.savefig(temporary, dpi=120, format=suffix, metadata=metadata)
    plt.close(figure)
