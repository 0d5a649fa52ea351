"""Many runs as one job: what arms are, what they share, what the tables say, and going on."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from decouple_merge.cli.main import app
from decouple_merge.config import Config, Study, arm_configs, dump_config, dump_study, load_study
from decouple_merge.errors import UserError
from decouple_merge.evaluation.intervals import paired_ratio
from decouple_merge.evaluation.judge import Judge, save_judge
from decouple_merge.experiment import plan as plan_module
from decouple_merge.experiment import sharing, workflow
from decouple_merge.experiment.plan import check, prepare
from decouple_merge.experiment.reported import report_references
from decouple_merge.experiment.study import open_plans, run_study
from decouple_merge.experiment.study_plan import count_work, describe_study
from decouple_merge.experiment.study_results import study_lines, write_results
from decouple_merge.experiment.watch import train_watched
from decouple_merge.models.base import load_base
from decouple_merge.reporting.status import read_status
from decouple_merge.searching.levels import levels
from decouple_merge.storage.files import read_records
from decouple_merge.storage.locks import holders
from decouple_merge.storage.study_folder import StudyFolder

MakeConfig = Callable[..., Config]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


# A judge has few features, of which a distance takes no time.
METRICS = ["fd_judge", "coverage_judge"]
SEARCH = {"num_trials": 3, "num_images": 4, "num_finalists": 0, "gradient_batches": 0, "metric": METRICS[0]}
EVALUATE = {"metrics": METRICS, "num_images": 6, "num_seed_sets": 2, "num_sample_images": 1}


@pytest.fixture
def judged(tmp_path: Path) -> dict[str, Any]:
    """The section ``evaluate`` with a random judge."""
    torch.manual_seed(0)
    save_judge(Judge(1, 8, 10).eval(), tmp_path / "judge")
    return {**EVALUATE, "judge": str(tmp_path / "judge")}


@pytest.fixture
def make_study(tiny_config: MakeConfig, judged: dict[str, Any], tmp_path: Path) -> Callable[..., Study]:
    """Make a study over a tiny config, through its file."""

    def make(arms: dict[str, Any], overrides: list[str] | None = None, **values: Any) -> Study:
        training = {"consistency_weight": 0.0, "num_updates": 3}
        config = tiny_config(finetune=training, search=SEARCH, evaluate=judged)
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


def test_runs_of_every_seed_have_the_layers_of_the_base(make_study: Callable[..., Study], tmp_path: Path) -> None:
    study = make_study({"a": {"search": {"blocks": ["layers"]}}})
    first, second = open_plans(study, StudyFolder(tmp_path / "out")).values()
    assert len(first.config.search.blocks) > 20
    # A run's folder says what its config became, and the study compares with that.
    assert second.config.search.blocks == prepare(arm_configs(study)["a", 5], tmp_path / "alone").config.search.blocks


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"a": {"finetune.global_probe": 1}}, r"arm a .*unknown key 'finetune.global_probe'.*finetune.global_prob"),
        ({"a": {"finetune..global_prob": 1}}, r"arm a: found the key 'finetune..global_prob', expected names"),
        ({"a/b": {}}, r"an arm is called 'a/b', expected letters"),
        ({"a": {"finetune.num_ranges": 99}}, r"^arm a: "),
        ({"a": {"seed": 77}}, r"^arm a or settings: found seed, which the study itself says for all"),
        (
            {"a": {"sample.num_steps.more": 1}},
            r"^arm a: found the key 'sample.num_steps.more', and num_steps is 3, not",
        ),
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


def test_arms_share_what_is_equal_and_end_as_the_same_runs_alone(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    out, one = tmp_path / "out", ["seeds=[4]"]
    list(run_study(make_study({"deme": {}}, one), out))
    merged = (out / "deme-4" / "merged" / WEIGHTS).read_bytes()
    # A study grows by arms. Two experts and a baseline are there; only the control has others. It is of two processes.
    arms = {"deme": {}, "ties": {"search.method": "ties"}, "control": {"finetune.global_prob": 1.0}}
    study = make_study(arms, one, num_processes=2)
    events = list(run_study(study, out))
    assert events[0] == "study: 2 trainings and 2 of 3 runs are left"
    assert events[-1] == f"tables: {out / 'results.md'}"
    assert (out / "deme-4" / "merged" / WEIGHTS).read_bytes() == merged
    deme, ties, control = (out / f"{arm}-4" for arm in arms)
    for path in ("experts/0", "experts/1", "baselines/baseline-finetuned"):
        assert (deme / path / "model.safetensors").samefile(ties / path / "model.safetensors")
    assert not (deme / "experts/0/model.safetensors").samefile(control / "experts/0/model.safetensors")
    assert (deme / "baselines/baseline-finetuned/log.jsonl").samefile(
        control / "baselines/baseline-finetuned/log.jsonl"
    )
    alone = tmp_path / "alone"
    list(workflow.run(arm_configs(study)["ties", 4], alone))
    for path in (f"merged/{WEIGHTS}", "experts/1/model.safetensors"):
        assert (alone / path).read_bytes() == (ties / path).read_bytes()
    values = [{(r["model"], r["metric"], *r["seeds"]): r["value"] for r in read_records(f / "metrics.jsonl")}
              for f in (alone, ties)]  # fmt: skip
    assert values[0] == values[1]
    before = (out / "results.json").read_bytes()
    again = run_study(study, out)
    assert next(again) == "study: 0 trainings and 0 of 3 runs are left"
    list(again)
    assert (out / "results.json").read_bytes() == before


def numbers(study: Study, value: Callable[[str, int, str, int], float]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Make records as runs do, of values by arm, seed, model and set."""
    return {
        (arm, seed): [
            {"model": model, "metric": metric, "seeds": [6 * i, 6 * i + 5], "value": value(arm, seed, model, i)}
            for model in ("pretrained", "baseline-finetuned", "ensemble", "merged")
            for metric in METRICS
            for i in range(2)
        ]
        for arm, seed in arm_configs(study)
    }


def test_tables_pair_each_model_with_its_seeds_pretrained_and_equal_compute(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    study = make_study({"deme": {}, "ties": {"search.method": "ties"}, "control": {"finetune.global_prob": 1.0}})
    folder = StudyFolder(tmp_path / "out")
    plans = open_plans(study, folder)
    of_model = {"pretrained": 100.0, "baseline-finetuned": 80.0, "ensemble": 60.0, "merged": 50.0}
    # A run of seed 5 is a tenth worse than one of seed 4, but for the base; the second set is twice as far.
    records = numbers(
        study,
        lambda arm, seed, model, i: of_model[model] * (1.1 if seed == 5 and model != "pretrained" else 1) * (1 + i),
    )
    lines = list(study_lines(study, plans, records))
    everyone, of_first = ("deme", "ties", "control"), [line for line in lines if line.metric == METRICS[0]]
    assert [(line.model, tuple(line.arms)) for line in of_first] == [
        ("pretrained", everyone),
        ("baseline-finetuned", everyone),
        ("ensemble", ("deme", "ties")),
        ("ensemble", ("control",)),
        *(("merged", (arm,)) for arm in everyone),
    ]
    base, merged = of_first[0], of_first[-1]
    assert (base.mean, base.low, base.high, base.to_pretrained) == (150, 150, 150, None)
    assert (merged.mean, merged.low, merged.high) == pytest.approx((78.75, 75, 82.5))
    assert merged.to_pretrained is not None
    assert merged.to_pretrained.by_seed == pytest.approx([0.5, 0.55])
    assert (merged.to_pretrained.low, merged.to_pretrained.high) == pytest.approx((0.5, 0.55))
    # What a seed does to both isn't in their ratio.
    assert merged.to_equal_compute is not None
    assert (merged.to_equal_compute.low, merged.to_equal_compute.high) == pytest.approx((0.625, 0.625))
    text = write_results(study, plans, records, folder)
    assert text == (tmp_path / "out/results.md").read_text()
    assert "| merged | control | 2 | 78.75 | 75 to 82.5 | 0.525 (0.500 to 0.550) | 0.625 (0.625 to 0.625) |" in text
    rows = list(csv.DictReader((tmp_path / "out/results.csv").read_text().splitlines()))
    assert len(rows) == len(lines) == len(json.loads((tmp_path / "out/results.json").read_text())["lines"])
    assert float(rows[6]["mean"]) == merged.mean
    assert (tmp_path / "out/figures/study.png").stat().st_size > 1000


def test_an_arm_without_a_baseline_is_compared_with_one_of_equal_compute(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    whole = {"num_ranges": 1, "num_updates": 6, "baseline": False}
    study = make_study({"deme": {}, "N=1": {"finetune": whole}, "short": {"finetune": {**whole, "num_updates": 2}}})
    plans = open_plans(study, StudyFolder(tmp_path / "out"))
    records = numbers(study, lambda arm, seed, model, i: 40.0 if model == "baseline-finetuned" else 30.0)
    lines = {line.arms[0]: line for line in study_lines(study, plans, records)
             if line.model == "merged" and line.metric == METRICS[0]}  # fmt: skip
    # Six updates in one range are as many as three in each of two.
    assert lines["N=1"].to_equal_compute is not None
    assert lines["N=1"].to_equal_compute.value == 0.75
    assert lines["short"].to_equal_compute is None
    assert lines["short"].to_pretrained is not None


def test_an_arm_that_is_drawn_otherwise_has_no_others_equal_compute(
    make_study: Callable[..., Study], tmp_path: Path
) -> None:
    arms = {"a": {}, "steps": {"evaluate.num_steps": 2}, "alone": {"finetune.baseline": False}}
    plans = open_plans(make_study(arms), StudyFolder(tmp_path / "out"))
    study = make_study(arms)
    records = numbers(study, lambda arm, seed, model, i: 20.0)
    lines = {(line.model, line.arms[0]): line for line in study_lines(study, plans, records)
             if line.metric == METRICS[0]}  # fmt: skip
    assert lines["baseline-finetuned", "steps"].to_equal_compute is None
    assert lines["merged", "steps"].to_equal_compute is not None
    assert lines["merged", "alone"].to_equal_compute is not None


def test_arms_that_begin_with_the_same_base_open_it_once(
    make_study: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def load(name: str, has_several: bool = False) -> Any:
        opened.append(name)
        return load_base(name, has_several)

    monkeypatch.setattr(plan_module, "load_base", load)
    plans = open_plans(make_study({"a": {}, "b": {"finetune.global_prob": 1.0}}), StudyFolder(tmp_path / "out"))
    assert (len(opened), len(plans)) == (1, 4)


def test_a_run_that_fails_leaves_the_others_to_be_done(make_study: Callable[..., Study], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arms = {"bad": {"finetune.learning_rate": 1e30, "finetune.max_grad_norm": 1e30}, "good": {}}
    events: list[Any] = []
    with pytest.raises(UserError, match=r"^1 of 2 runs failed, and all others are done\. bad-4: .*loss") as caught:
        events.extend(run_study(make_study(arms, ["seeds=[4]"]), out))
    with pytest.raises(UserError) as again:
        events.extend(run_study(make_study(arms, ["seeds=[4]"]), out))
    assert str(again.value) == str(caught.value)
    lines = json.loads((out / "results.json").read_text())["lines"]
    assert {arm for line in lines for arm in line["arms"] if line["model"] == "merged"} == {"good"}
    found = json.loads(CliRunner().invoke(app, ["status", str(out), "--json"]).output)
    assert (found["state"], {name: run["state"] for name, run in found["runs"].items()}) == (
        "stopped",
        {"bad-4": "stopped", "good-4": "finished"},
    )
    told = CliRunner().invoke(app, ["status", str(out)]).output
    assert re.search(r"good-4 +finished +12/12 +\d+/\d+ +\d+/\d+ +done", told)


def test_a_run_of_a_study_that_is_trained_is_told_to_be(
    make_study: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "out", list[str]()

    def train(plan: Any, task: Any, *others: Any) -> Iterator[Any]:
        seen.extend(read_status(plan.run.folder).holders)
        seen.extend(sorted(holder["verb"] for holder in holders(plan.run.folder.parent / "locks").values()))
        yield from train_watched(plan, task, *others)

    monkeypatch.setattr(sharing, "train_watched", train)
    study = make_study({"a": {}}, ["seeds=[4]"], settings={"search.over": "nothing", "finetune.baseline": True})
    list(run_study(study, out))
    assert seen == ["baseline-finetuned", "deme study", "deme study: a-4/baseline-finetuned"]


def test_a_study_copies_what_its_runs_are_to_leave_elsewhere(
    make_study: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = (tmp_path / "copies").as_uri()
    study = make_study({"a": {}}, ["seeds=[4]"], settings={"search.over": "nothing", "results": place})
    list(run_study(study, tmp_path / "out"))
    assert (tmp_path / "copies/metrics.jsonl").read_bytes() == (tmp_path / "out/a-4/metrics.jsonl").read_bytes()


def test_a_dry_run_counts_kept_weights_and_distilling(make_study: Callable[..., Study], tmp_path: Path) -> None:
    study = make_study({"a": {"distil": {"num_updates": 5}, "finetune.keep_every": 2}}, ["seeds=[4]"])
    folder = StudyFolder(tmp_path / "out")
    work, _ = count_work(open_plans(study, folder), folder)
    # Two experts of 3 updates keep one each and the baseline of 6 keeps 3; distilling ends in a file and a pipeline.
    assert work.num_files == 2 * 2 + 4 + 1 + 2
    assert (work.num_trainings, work.trained) == (4, {False: 12 * 4 + 5 * 64})


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
    tiny_config: MakeConfig, judged: dict[str, Any], tmp_path: Path
) -> None:
    other = tmp_path / "other.npz"
    np.savez(other, images=np.random.default_rng(1).integers(0, 256, (20, 8, 8), dtype=np.uint8))
    plain, apart = (
        tiny_config(search=SEARCH, finetune={"num_updates": 2}, evaluate={**judged, "reference": reference})
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
