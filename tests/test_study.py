"""Many runs as one job: what arms are, what they share, what the tables say, and going on."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from decouple_merge.config import Config, Study, arm_configs, dump_config, dump_study, load_study
from decouple_merge.errors import UserError
from decouple_merge.evaluation.intervals import paired_ratio
from decouple_merge.experiment import workflow
from decouple_merge.experiment.plan import check
from decouple_merge.experiment.reported import report_references
from decouple_merge.experiment.study import open_plans, run_study
from decouple_merge.experiment.study_plan import count_work, describe_study
from decouple_merge.experiment.study_results import study_lines
from decouple_merge.models.base import tensors_sha256
from decouple_merge.searching.levels import levels
from decouple_merge.storage.files import read_records, read_tensors
from decouple_merge.storage.study_folder import StudyFolder

MakeConfig = Callable[..., Config]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _shared_cache(_isolated: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEME_CACHE", str(cache))


# A Fréchet distance takes a second each.
METRICS = ["kd_effnetlite0", "coverage_effnetlite0"]
SEARCH = {"num_trials": 3, "num_images": 4, "num_finalists": 0, "gradient_batches": 0, "metric": METRICS[0]}
EVALUATE = {"metrics": METRICS, "num_images": 6, "num_seed_sets": 2, "num_sample_images": 1}


@pytest.fixture
def make_study(tiny_config: MakeConfig, tmp_path: Path) -> Callable[..., Study]:
    """Make a study over a tiny config, through its file."""

    def make(arms: dict[str, Any], overrides: list[str] | None = None, **values: Any) -> Study:
        training = {"consistency_weight": 0.0, "num_updates": 3}
        config = tiny_config(finetune=training, search=SEARCH, evaluate=EVALUATE)
        (tmp_path / "config.yaml").write_text(dump_config(config))
        given = {"config": "config.yaml", "seeds": [4, 5], "num_resamples": 50, "arms": arms, **values}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
        return load_study(tmp_path / "study.yaml", overrides)

    return make


# -- what arms are


def test_arms_change_settings_by_section_and_by_dotted_key(make_study: Callable[..., Study]) -> None:
    study = make_study(
        {"a": None, "b": {"finetune": {"global_prob": 1.0}, "finetune.projection.placement": "none"}},
        settings={"sample.num_steps": 2, "evaluate.reference.split": "test"},
    )
    configs = arm_configs(study)
    assert list(configs) == [("a", 4), ("a", 5), ("b", 4), ("b", 5)]
    a, b = configs["a", 5], configs["b", 4]
    assert (a.seed, a.finetune.global_prob, a.finetune.projection.placement) == (5, 0.4, "folded")
    assert (b.seed, b.finetune.global_prob, b.finetune.projection.placement) == (4, 1.0, "none")
    # What no arm names stays the config's.
    assert a.finetune.num_updates == b.finetune.num_updates == 3
    assert all(c.sample.num_steps == 2 and c.evaluate.reference.split == "test" for c in configs.values())  # type: ignore[union-attr]


def test_a_study_is_read_back_as_it_was_written(make_study: Callable[..., Study], tmp_path: Path) -> None:
    study = make_study({"a": {}, "b": {"search": {"frozen": {0: 1.0}}}})
    (tmp_path / "again.yaml").write_text(dump_study(study))
    assert load_study(tmp_path / "again.yaml") == study


def test_set_changes_a_study(make_study: Callable[..., Study]) -> None:
    study = make_study({"a": {}}, ["seeds=[7]", "settings.finetune.num_updates=9"])
    assert [c.finetune.num_updates for c in arm_configs(study).values()] == [9]


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"a": {"finetune.global_probe": 1}}, r"arm a .*unknown key 'finetune.global_probe'.*finetune.global_prob"),
        ({"a": {"finetune..global_prob": 1}}, r"arm a: found the key 'finetune..global_prob', expected names"),
        ({"a/b": {}}, r"an arm is called 'a/b', expected letters"),
        ({"a": {"finetune.num_ranges": 99}}, r"^arm a: "),
        ({}, r"arms"),
    ],
)
def test_a_wrong_arm_is_named_before_anything_is_computed(
    make_study: Callable[..., Study], tmp_path: Path, arms: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_plans(make_study(arms), StudyFolder(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(make_study: Callable[..., Study], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="no study's"):
        next(run_study(make_study({"a": {}}), tmp_path / "out"))


# -- what they share, and what the tables say


def test_arms_share_what_is_equal_and_are_runs_all_the_same(make_study: Callable[..., Study], tmp_path: Path) -> None:
    arms = {"deme": {}, "ties": {"search.method": "ties"}, "control": {"finetune.global_prob": 1.0}}
    study, out = make_study(arms), tmp_path / "out"
    events = list(run_study(study, out))
    # A seed has two experts and a baseline for all, and two experts more for the control.
    assert events[0] == "study: 10 trainings and 6 of 6 runs are left"
    for seed in (4, 5):
        deme, ties, control = (out / f"{arm}-{seed}" for arm in arms)
        for path in ("experts/0", "experts/1", "baselines/baseline-finetuned"):
            assert (deme / path / "model.safetensors").samefile(ties / path / "model.safetensors")
        assert not (deme / "experts/0/model.safetensors").samefile(control / "experts/0/model.safetensors")
        assert (deme / "baselines/baseline-finetuned/log.jsonl").samefile(
            control / "baselines/baseline-finetuned/log.jsonl"
        )
    # A run by itself ends with the same bytes.
    alone = tmp_path / "alone"
    list(workflow.run(arm_configs(study)["ties", 5], alone))
    for path in (f"merged/{WEIGHTS}", "experts/1/model.safetensors"):
        assert (alone / path).read_bytes() == (out / "ties-5" / path).read_bytes()
    values = [{(r["model"], r["metric"], *r["seeds"]): r["value"] for r in read_records(f / "metrics.jsonl")}
              for f in (alone, out / "ties-5")]  # fmt: skip
    assert values[0] == values[1]
    _check_tables(study, out)
    before = (out / "results.json").read_bytes()
    again = run_study(study, out)
    assert next(again) == "study: 0 trainings and 0 of 6 runs are left"
    list(again)
    assert (out / "results.json").read_bytes() == before


def _check_tables(study: Study, out: Path) -> None:
    lines = list(study_lines(study, open_plans(study, StudyFolder(out))))
    by_name = {(line.metric, line.model, tuple(line.arms)): line for line in lines}
    everyone = tuple(study.arms)
    assert [(model, arms) for metric, model, arms in by_name if metric == METRICS[0]] == [
        ("pretrained", everyone),
        ("baseline-finetuned", everyone),
        ("ensemble", ("deme", "ties")),
        ("ensemble", ("control",)),
        *(("merged", (arm,)) for arm in everyone),
    ]

    def mean(arm: str, seed: int, model: str) -> float:
        found = [r["value"] for r in read_records(out / f"{arm}-{seed}" / "metrics.jsonl")
                 if (r["model"], r["metric"]) == (model, METRICS[0])]  # fmt: skip
        assert len(found) == 2
        return sum(found) / 2

    merged = by_name[METRICS[0], "merged", ("control",)]
    of_seeds = [mean("control", seed, "merged") for seed in study.seeds]
    assert (merged.low, merged.high) == (min(of_seeds), max(of_seeds))
    assert merged.mean == pytest.approx(sum(of_seeds) / 2)
    for ratio, other in ((merged.to_pretrained, "pretrained"), (merged.to_equal_compute, "baseline-finetuned")):
        assert ratio is not None
        expected = [m / mean("control", seed, other) for m, seed in zip(of_seeds, study.seeds, strict=True)]
        assert ratio.by_seed == pytest.approx(expected)
        assert ratio.low <= ratio.value <= ratio.high
    assert by_name[METRICS[0], "pretrained", everyone].to_pretrained is None
    assert len({tuple(v) for v in by_name[METRICS[0], "pretrained", everyone].values.values()}) == 1
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == len(lines) == len(json.loads((out / "results.json").read_text())["lines"])
    assert float(rows[6]["mean"]) == merged.mean
    assert (out / "results.md").read_text().count("| merged | control | 2 |") == 2
    assert (out / "figures/study.png").stat().st_size > 1000


def test_a_study_grows_by_arms_and_compares_with_the_equal_compute_of_another(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    out, one = tmp_path / "out", ["seeds=[4]"]
    list(run_study(make_study({"deme": {}}, one), out))
    merged = (out / f"deme-4/merged/{WEIGHTS}").read_bytes()
    whole = {"finetune": {"num_ranges": 1, "num_updates": 6, "baseline": False}}
    study = make_study({"deme": {}, "N=1": whole, "short": {"finetune": {**whole["finetune"], "num_updates": 2}}}, one)
    events = run_study(study, out)
    assert next(events) == "study: 2 trainings and 2 of 3 runs are left"
    list(events)
    assert (out / f"deme-4/merged/{WEIGHTS}").read_bytes() == merged
    lines = {line.arms[0]: line for line in study_lines(study, open_plans(study, StudyFolder(out)))
             if line.model == "merged" and line.metric == METRICS[0]}  # fmt: skip
    # Six updates in one range are as many as three in each of two.
    assert lines["N=1"].to_equal_compute is not None
    assert lines["short"].to_equal_compute is None
    assert lines["short"].to_pretrained is not None


def test_a_study_by_processes_is_that_of_one(make_study: Callable[..., Study], tmp_path: Path) -> None:
    arms = {"deme": {}, "ties": {"search.method": "ties"}}
    for num in (1, 2):
        list(run_study(make_study(arms, ["seeds=[4]"], num_processes=num), tmp_path / f"out{num}"))
    texts = [(tmp_path / f"out{num}" / "results.csv").read_text() for num in (1, 2)]
    assert texts[0] == texts[1]
    hashes = [tensors_sha256(read_tensors(tmp_path / f"out{n}/ties-4/experts/1/model.safetensors")[0]) for n in (1, 2)]
    assert hashes[0] == hashes[1]


def test_a_dry_run_counts_shared_work_once_and_writes_nothing(make_study: Callable[..., Study], tmp_path: Path) -> None:
    study = make_study({"deme": {}, "ties": {"search.method": "ties"}})
    folder = StudyFolder(tmp_path / "out")
    work, _ = count_work(open_plans(study, folder), folder)
    assert (work.num_runs, work.num_trainings) == (4, 6)
    # Each seed: two experts of 3 updates, a baseline of 6, of 4 images each.
    assert work.trained == {False: 2 * 12 * 4}
    # Each run: candidates of 4 images, 2 × 6 of its merge. Each seed: of baseline and ensemble. All: of the base.
    (screen,) = levels(arm_configs(study)["deme", 4], 2)
    assert work.drawn == 4 * (screen.num_candidates * 4 + 12) + 2 * 24 + 12
    text = "\n".join(describe_study(study, tmp_path / "out"))
    assert "left: 4 of 4 runs, 6 trainings of 96 images" in text
    assert "hours: about" in text
    assert not (tmp_path / "out").exists()


# -- the report's reference


def test_a_report_compares_with_images_that_the_search_does_not_see(
    tiny_config: MakeConfig, tmp_path: Path, tiny_images: Path
) -> None:
    other = tmp_path / "other.npz"
    np.savez(other, images=np.random.default_rng(1).integers(0, 256, (20, 8, 8), dtype=np.uint8))
    plain, apart = (
        tiny_config(search=SEARCH, finetune={"num_updates": 2}, evaluate={**EVALUATE, "reference": reference})
        for reference in (None, str(other))
    )
    for name, config in (("plain", plain), ("apart", apart)):
        list(workflow.run(config, tmp_path / name))
    trials = [
        [t["value"] for t in read_records(tmp_path / name / "search/trials.jsonl")] for name in ("plain", "apart")
    ]
    assert trials[0] == trials[1]
    plan = check(apart, tmp_path / "apart")
    _, images = report_references(plan.config, plan.base, plan.references)
    records = read_records(tmp_path / "apart/metrics.jsonl")
    assert {r["reference"] for r in records} == {f"{other}:{images.sha256[:16]}:20"}
    values = [[r["value"] for r in read_records(tmp_path / name / "metrics.jsonl")] for name in ("plain", "apart")]
    assert values[0] != values[1]


@pytest.mark.parametrize("reference", [{"split": "train"}, "copy"])
def test_a_report_on_the_data_itself_is_refused_as_its_reference(
    tiny_config: MakeConfig, tmp_path: Path, tiny_images: Path, reference: Any
) -> None:
    if reference == "copy":
        (tmp_path / "copy.npz").write_bytes(tiny_images.read_bytes())
        reference = str(tmp_path / "copy.npz")
    with pytest.raises(UserError, match=r"evaluate.reference is .* the (data itself|same images)"):
        check(tiny_config(evaluate={"reference": reference}), tmp_path / "run")


# -- ratios


def test_a_ratio_is_the_mean_of_the_seeds_ratios() -> None:
    a, b = torch.tensor([[1.0, 3.0], [6.0, 2.0]]), torch.tensor([[4.0, 4.0], [10.0, 6.0]])
    found = paired_ratio(a, b)
    assert found.by_seed == [0.5, 0.5]
    assert found.value == 0.5


def test_noise_that_two_models_share_is_not_in_the_interval() -> None:
    b = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
    found = paired_ratio(0.8 * b, b)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.8, 0.8))


def test_an_interval_is_that_of_all_resamples() -> None:
    """Of two seeds and one set all resamples are known: a quarter is each seed twice, half is both."""
    found = paired_ratio(torch.tensor([[1.0], [3.0]]), torch.ones(2, 1), level=0.4)
    assert (found.low, found.value, found.high) == (2.0, 2.0, 2.0)
    wide = paired_ratio(torch.tensor([[1.0], [3.0]]), torch.ones(2, 1))
    assert (wide.low, wide.high) == (1.0, 3.0)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    draws = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        seeds, sets = torch.randn(12, 1, generator=draws), torch.randn(1, 12, generator=draws)
        found = paired_ratio(10 + seeds + sets, torch.full((12, 12), 10.0), num_resamples=300, level=0.9)
        covered += found.low <= 1 <= found.high
    assert 150 <= covered <= 195
