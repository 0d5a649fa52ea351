"""Comparing records: paired by seeds, and refused where anything but the model differs."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from decouple_merge.evaluation.compare import compare
from decouple_merge.evaluation.records import COMPARED_FIELDS

COMMON = {
    "num_images": 100,
    "extractor": "inception:aa",
    "reference": "data:bb:60000",
    "sampler": "DDIM",
    "num_steps": 50,
    "timestep_spacing": "leading",
    "precision": "fp32",
    "prompts": "24 texts 0123456789abcdef, guidance 7",
    "resize": "256, centre square, Lanczos of Pillow",
    "decoding": 2,
}


def record(model: str, value: float, first: int | None = 0, metric: str = "fid", **changes: Any) -> dict[str, Any]:
    seeds = None if first is None else [first, first + 99]
    return {"model": model, "metric": metric, "value": value, "seeds": seeds, **COMMON, **changes}


def write(path: Path, *records: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_values_are_paired_by_their_seeds(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", record("a", 10, 0), record("a", 12, 100), record("a", 14, 200))
    b = write(tmp_path / "b.jsonl", record("b", 13.5, 200), record("b", 9, 0), record("b", 11.25, 100))
    (found,) = compare(a, b)
    assert (found.a, found.b) == (12, pytest.approx(11.25))
    assert found.paired == [-1, -0.75, -0.5]
    # Each side alone spreads over 4; what they share cancels.
    assert found.standard_error == pytest.approx(0.25 / 3**0.5)
    assert str(found) == (
        "fid: A 12, B 11.25, B - A -0.75, -1 to -0.5 over 3 sets of the same seeds, standard error 0.14"
    )


def test_only_seeds_that_both_have_count(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", record("a", 10, 0), record("a", 50, 100))
    b = write(tmp_path / "b.jsonl", record("b", 9, 0), record("b", 90, 300))
    (found,) = compare(a, b)
    assert (found.a, found.b, found.paired, found.standard_error) == (10, 9, [-1], None)
    assert "on the same seeds, spread unknown: score more sets of seeds" in str(found)


def test_different_images_are_not_paired(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", record("a", 10, 0), record("a", 12, 100))
    b = write(tmp_path / "b.jsonl", record("b", 9, 200), record("b", 12, 300), record("b", 12, 400))
    (found,) = compare(a, b)
    assert found.paired == []
    expected = (statistics.variance([10, 12]) / 2 + statistics.variance([9, 12, 12]) / 3) ** 0.5
    assert found.standard_error == pytest.approx(expected)
    assert "B - A +0 on different images, standard error 1.4" in str(found)


def test_images_without_seeds_are_compared_without_a_spread(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{m}.jsonl", record(m, v, None)) for m, v in (("a", 3.0), ("b", 2.5)))
    (found,) = compare(a, b)
    assert (found.b - found.a, found.paired, found.standard_error) == (-0.5, [], None)


def test_the_last_record_of_the_same_seeds_counts(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", record("a", 99, 0), record("a", 10, 0))
    b = write(tmp_path / "b.jsonl", record("b", 9, 0))
    assert next(compare(a, b)).paired == [-1]


@pytest.mark.parametrize("field", COMPARED_FIELDS)
@pytest.mark.parametrize("side", ["between", "within"])
def test_records_that_are_not_comparable_are_refused_by_the_field(field: str, side: str, tmp_path: Path) -> None:
    odd = record("b", 9, 100, **{field: "other"})
    a = write(tmp_path / "a.jsonl", record("a", 10))
    b = write(tmp_path / "b.jsonl", *([record("b", 9)] if side == "within" else []), odd)
    with pytest.raises(ValueError, match=rf"records of fid differ in {field} \({COMMON[field]}, other\), expected the"):
        list(compare(a, b))


def test_a_reference_is_known_by_its_hash_and_not_by_its_path(tmp_path: Path) -> None:
    names = [f"{name}:0123456789abcdef:60000" for name in ("datasets:org/name", "/data/images")]
    a = write(tmp_path / "a.jsonl", record("a", 10, reference=names[0]))
    b = write(tmp_path / "b.jsonl", record("b", 9, reference=names[1]))
    assert next(compare(a, b)).paired == [-1]
    b = write(tmp_path / "b.jsonl", record("b", 9, reference=names[1].replace("60000", "10000")))
    with pytest.raises(ValueError, match="records of fid differ in reference"):
        list(compare(a, b))


def test_nothing_is_printed_before_every_metric_is_known_to_be_comparable(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", record("a", 1), record("a", 2, metric="kid"))
    b = write(tmp_path / "b.jsonl", record("b", 1), record("b", 2, metric="kid", num_steps=10))
    with pytest.raises(ValueError, match="records of kid differ in num_steps"):
        next(compare(a, b))


def test_one_of_several_models_is_picked_by_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run / "metrics.jsonl", record("pretrained", 10), record("merged", 8), record("merged", 3, metric="kid"))
    (found,) = compare(f"{run}:pretrained", f"{run / 'metrics.jsonl'}:merged")
    assert (found.metric, found.paired) == ("fid", [-2])
    with pytest.raises(ValueError, match="has records of pretrained, merged; expected one model: append :MODEL"):
        list(compare(str(run), f"{run}:merged"))
    with pytest.raises(ValueError, match="has no records of 'best', only of pretrained, merged"):
        list(compare(f"{run}:best", f"{run}:merged"))


def test_files_that_hold_no_records_are_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", record("a", 1))
    with pytest.raises(ValueError, match=r"there is no metrics file .*nowhere; expected FILE or FILE:MODEL"):
        list(compare(str(tmp_path / "nowhere"), good))
    for name, text in {"text": "no json", "list": "[1]\n", "keys": '{"model": "a"}\n'}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}(: expected records as deme evaluate writes|, line 1)"):
            list(compare(good, str(tmp_path / name)))
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match="empty has no records"):
        list(compare(str(tmp_path / "empty"), good))
    other = write(tmp_path / "other.jsonl", record("b", 1, metric="kid"))
    with pytest.raises(ValueError, match=r"has fid and .* has kid, expected a metric in common"):
        list(compare(good, other))
