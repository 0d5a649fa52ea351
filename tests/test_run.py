"""The whole job on tiny models: the run folder, its records, running it again, and the verbs that need no run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import make_unet
from decouple_merge.config import Config, Merge, Protocol, Sample, Stats, dump_config, load_config
from decouple_merge.data.sources import load_images
from decouple_merge.evaluation.evaluate import evaluate_model
from decouple_merge.evaluation.extractors import load_extractor
from decouple_merge.evaluation.references import write_reference
from decouple_merge.experiment import finetuning, selection, workflow
from decouple_merge.experiment.export import export_record
from decouple_merge.experiment.plan import check, prepare
from decouple_merge.experiment.results import Row
from decouple_merge.experiment.selection import hashes_of, open_merger, open_scorer
from decouple_merge.experiment.work import work_of
from decouple_merge.merging import recipes
from decouple_merge.merging.arithmetic import merge
from decouple_merge.merging.card import model_card
from decouple_merge.merging.rules.rule import Settings
from decouple_merge.models.base import load_base, tensors_sha256
from decouple_merge.reporting.job import Job
from decouple_merge.reporting.status import read_status
from decouple_merge.sampling import folder as drawn
from decouple_merge.searching.levels import levels
from decouple_merge.searching.trial import Trial
from decouple_merge.storage.files import read_records
from decouple_merge.training import loop
from decouple_merge.training.records import StepRecord

LOOKS_AT_PICTURES = True

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
MODELS = ["pretrained", "baseline-finetuned", "ensemble", "merged"]
METRICS = ["fd_effnetlite0", "kd_effnetlite0"]
FIELDS = {"model", "metric", "value", "num_images", "seeds", "extractor", "reference", "sampler", "num_steps", "git",
          "time"}  # fmt: skip


@dataclass
class Finished:
    """A run that went through, with what it yielded."""

    config: Config
    folder: Path
    base: Path
    images: Path
    events: list[Any]

    def experts(self) -> list[dict[str, torch.Tensor]]:
        return [load_file(self.folder / f"experts/{i}/model.safetensors") for i in range(3)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _shared_cache(_isolated: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEME_CACHE", str(cache))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Finished:
    """Do the whole job once; T = 60, three unequal ranges."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("job")
    DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=60)).save_pretrained(place / "base")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 8, 8), dtype=np.uint8)
    np.savez(place / "images.npz", images=pixels)
    config = Config.model_validate(
        {
            "base": str(place / "base"),
            "data": {"source": str(place / "images.npz"), "num_held_out": 8},
            "finetune": {
                "ranges": [(0, 10), (10, 25), (25, 60)],
                "num_updates": 6,
                "batch_size": 4,
                "validate_every": 3,
                "checkpoint_every": 2,
                "tracker": "none",
            },
            "sample": {"num_steps": 3, "batch_size": 8},
            "search": {"num_trials": 9, "num_images": 10, "gradient_batches": 3},
            "evaluate": {"num_images": 10, "num_seed_sets": 2, "num_sample_images": 2},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEME_CACHE", str(cache))
        events = list(workflow.run(config, place / "run"))
    return Finished(config, place / "run", place / "base", place / "images.npz", events)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_run_folder_is_laid_out_as_promised(done: Finished) -> None:
    found = set(contents(done.folder))
    expected = {"config.yaml", "manifest.json", "metrics.jsonl", "search/study.jsonl", "search/trials.jsonl"}
    trainings = ["experts/0", "experts/1", "experts/2", "baselines/baseline-finetuned"]
    expected |= {f"{t}/{f}" for t in trainings for f in ("model.safetensors", "expert.json", "log.jsonl")}
    expected |= {f"merged/{f}" for f in (WEIGHTS, "unet/config.json", "model_index.json", "merge.json", "README.md")}
    expected |= {f"samples/{model}/{seed}.png" for model in MODELS for seed in (0, 1)}
    expected |= {f"figures/{name}.png" for name in ("samples", "search-cost", "search-surfaces")}
    assert expected <= found
    assert not any("/state/" in f or "tmp" in f for f in found)
    assert len([f for f in found if f.endswith(".png") and f.startswith("samples/")]) == 8


def test_its_folder_tells_what_its_events_told(done: Finished) -> None:
    found, job = read_status(done.folder), Job(work_of(check(done.config, done.folder)))
    for event in done.events:
        if isinstance(event, StepRecord):
            job.add_step(asdict(event))
        elif isinstance(event, Trial):
            job.add_trial(asdict(event))
        elif isinstance(event, dict):
            job.is_search_done = True
            job.add_number(event)
    assert (found.state, found.job.seconds_left(), job.is_done()) == ("finished", 0, True)
    assert {"merged model", "report", "samples"} <= set(found.made)
    assert (list(job.means()), found.job.means()) == (MODELS, job.means())
    for name, training in job.trainings.items():
        assert found.job.trainings[name] == training
    assert {k: v.values for k, v in found.job.levels.items()} == {k: v.values for k, v in job.levels.items()}
    assert job.trainings["expert-0"].last["memory_bytes"] > 10**8


def test_the_config_in_the_run_folder_repeats_the_run(done: Finished) -> None:
    assert load_config(done.folder / "config.yaml") == done.config


def test_the_manifest_names_what_the_run_was_made_from(done: Finished) -> None:
    manifest = json.loads((done.folder / "manifest.json").read_text())
    assert manifest["base"]["sha256"] == load_base(str(done.base)).sha256
    assert manifest["data"]["sha256"] == load_images(done.config.data, 1, 8).sha256
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["seeds"] == {"training": 0, "search": [1_000_000, 1_000_019], "report": [0, 19]}
    assert {"git", "device"} <= manifest.keys()


def test_events_show_each_part_of_the_job_in_order(done: Finished) -> None:
    kinds = [next(k for k in (StepRecord, Trial, Row, dict, str) if isinstance(e, k)) for e in done.events]
    assert {e.name for e in done.events if isinstance(e, StepRecord)} == {
        "expert-0",
        "expert-1",
        "expert-2",
        "baseline-finetuned",
    }
    assert kinds.count(Trial) == 9 + 3
    last_of = {kind: len(kinds) - 1 - kinds[::-1].index(kind) for kind in kinds}
    assert last_of[StepRecord] < kinds.index(Trial) < kinds.index(dict) < kinds.index(Row)
    assert last_of[Trial] < kinds.index(dict)


def test_the_baseline_gets_the_updates_of_all_experts_together(done: Finished) -> None:
    record = json.loads((done.folder / "baselines/baseline-finetuned/expert.json").read_text())
    assert record["training"]["num_updates"] == 18
    assert record["own"] == {"low": 0, "high": 60}
    assert record["training"]["consistency_weight"] == 0
    expert = json.loads((done.folder / "experts/1/expert.json").read_text())
    assert expert["own"] == {"low": 10, "high": 25}
    same = ["batch_size", "learning_rate", "schedule", "betas", "weight_decay", "ema", "max_grad_norm"]
    assert [record["training"][k] for k in same] == [expert["training"][k] for k in same]


def test_experts_have_the_bases_keys_and_differ(done: Finished) -> None:
    base, experts = load_file(done.base / WEIGHTS), done.experts()
    assert all({k: v.shape for k, v in e.items()} == {k: v.shape for k, v in base.items()} for e in experts)
    assert len({tensors_sha256(e) for e in [base, *experts]}) == 4


def test_every_trials_hash_is_that_of_its_merged_tensors(done: Finished) -> None:
    base, experts = load_file(done.base / WEIGHTS), done.experts()
    found = read_records(done.folder / "search/trials.jsonl")
    trials = [t for t in found if t["level"] == "screen"]
    finalists = [t for t in found if t["level"] == "final"]
    assert [t["number"] for t in trials] == list(range(9))
    assert [t["weights"] for t in finalists] == [t["weights"] for t in sorted(trials, key=lambda t: t["value"])[:3]]
    assert all(t["seeds"] == [1_000_010, 1_000_019] for t in finalists)
    for trial in found:
        assert trial["merged_sha256"] == tensors_sha256(merge(base, experts, trial["weights"]))
        assert trial["num_images"] == 10
        assert trial["seconds"] > 0
        assert trial["worker"] == "main"
    starts = [datetime.fromisoformat(t["started"]) for t in trials]
    assert starts == sorted(starts)
    assert all(t["seeds"] == [1_000_000, 1_000_009] for t in trials)
    weights = [tuple(t["weights"]) for t in trials]
    assert {(0.0,) * 3, (1 / 3,) * 3, (1.0,) * 3} <= set(weights)
    assert trials[weights.index((0.0,) * 3)]["merged_sha256"] == load_base(str(done.base)).sha256


def test_weights_learned_by_the_gradient_are_screened(done: Finished) -> None:
    learned = json.loads((done.folder / "search/learned.json").read_text())
    assert learned["num_batches"] == 3
    assert learned["experts_sha256"] == [tensors_sha256(e) for e in done.experts()]
    trials = [t for t in read_records(done.folder / "search/trials.jsonl") if t["level"] == "screen"]
    assert trials[5]["weights"] == pytest.approx(learned["weights"], abs=1e-6)
    assert learned["weights"] != pytest.approx([1 / 3] * 3, abs=1e-3)


def best_finalist(folder: Path) -> dict[str, Any]:
    found = read_records(folder / "search/trials.jsonl")
    return min((t for t in found if t["level"] == "final"), key=lambda t: t["value"])


def test_merged_is_the_best_on_fresh_seeds(done: Finished) -> None:
    best = best_finalist(done.folder)
    merged = load_file(done.folder / "merged" / WEIGHTS)
    assert tensors_sha256(merged) == best["merged_sha256"]
    record = json.loads((done.folder / "merged/merge.json").read_text())
    assert record["weights"] == best["weights"]
    assert record["merged_sha256"] == best["merged_sha256"]
    assert record["base"]["sha256"] == load_base(str(done.base)).sha256
    assert record["experts_sha256"] == [tensors_sha256(e) for e in done.experts()]
    base = load_file(done.base / WEIGHTS)
    assert {k: (v.shape, v.dtype) for k, v in merged.items()} == {k: (v.shape, v.dtype) for k, v in base.items()}


def test_every_model_has_a_record_for_every_metric_and_seed_set(done: Finished) -> None:
    records = read_records(done.folder / "metrics.jsonl")
    assert all(r.keys() >= FIELDS for r in records)
    found = [(r["model"], r["metric"], tuple(r["seeds"])) for r in records]
    sets = [(0, 9), (10, 19)]
    assert sorted(found) == sorted((m, k, s) for m in MODELS for k in METRICS for s in sets)
    # All of them can be compared.
    assert len({(r["extractor"], r["reference"], r["sampler"], r["num_steps"], r["num_images"]) for r in records}) == 1
    assert records[0]["sampler"] == "DDIM"
    assert records[0]["extractor"].startswith("effnetlite0:")
    assert len({r["value"] for r in records}) == len(records)


def test_the_table_has_a_row_for_each_model_and_metric(done: Finished) -> None:
    rows = [e for e in done.events if isinstance(e, Row)]
    assert sorted((r.model, r.metric) for r in rows) == sorted((m, k) for m in MODELS for k in METRICS)
    size = sum(v.numel() for v in load_file(done.base / WEIGHTS).values())
    assert {r.model: r.num_parameters for r in rows} == {m: 3 * size if m == "ensemble" else size for m in MODELS}
    records = read_records(done.folder / "metrics.jsonl")
    for row in rows:
        values = [r["value"] for r in records if (r["model"], r["metric"]) == (row.model, row.metric)]
        assert row.values == values
        assert row.mean == pytest.approx(sum(values) / 2)
        assert row.spread == max(values) - min(values)


def test_a_second_run_changes_no_file_and_yields_the_same_table(done: Finished) -> None:
    # Time that passed is added to what the run cost, which its page tells.
    before = {name: data for name, data in contents(done.folder).items() if name not in ("costs.jsonl", "report.html")}
    weights = [p for p in done.folder.rglob("*") if p.suffix in (".safetensors", ".db") or "samples" in p.parts]
    times = {p: p.stat().st_mtime_ns for p in weights}
    events = list(workflow.run(done.config, done.folder))
    assert before.items() <= contents(done.folder).items()
    assert {p: p.stat().st_mtime_ns for p in weights} == times
    assert [e for e in events if isinstance(e, Row)] == [e for e in done.events if isinstance(e, Row)]
    assert not any(isinstance(e, StepRecord | Trial | dict) for e in events)


def test_a_lost_record_is_scored_again_to_the_same_value(done: Finished, tmp_path: Path) -> None:
    shutil.copytree(done.folder, tmp_path / "run")
    metrics = tmp_path / "run/metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(lines[:5] + lines[6:]) + "\n")
    (tmp_path / "run/samples/merged/1.png").unlink()
    again = [e for e in workflow.run(done.config, tmp_path / "run") if isinstance(e, dict)]
    assert len(again) == 1
    assert again[0]["value"] == json.loads(lines[5])["value"]
    png = "samples/merged/1.png"
    assert (tmp_path / "run" / png).read_bytes() == (done.folder / png).read_bytes()


def test_a_picture_cut_short_does_not_stay(done: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is written to a temporary name and renamed: what has its name is whole."""
    save = Image.Image.save

    def cut_short(self: Image.Image, path: Any, *arguments: Any, **options: Any) -> None:
        save(self, path, *arguments, **options)
        Path(path).write_bytes(Path(path).read_bytes()[:40])
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", cut_short)
    with pytest.raises(KeyboardInterrupt):
        drawn.sample_model(str(done.base), tmp_path / "out", 1, 0, Sample(sampler="DDIM", num_steps=2))
    assert not (tmp_path / "out/0.png").exists()


def test_state_left_by_a_kill_after_the_last_write_is_removed(
    tmp_path: Path, tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = prepare(tiny_config(finetune={"baseline": False}), tmp_path / "run")
    remove = shutil.rmtree

    def die(path: Path, **options: Any) -> None:
        if Path(path).name == "state":
            raise KeyboardInterrupt
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "shutil", SimpleNamespace(rmtree=die))  # Not that of atomic writes.
        with pytest.raises(KeyboardInterrupt):
            list(finetuning.finetune_experts(plan, 0))
    assert (tmp_path / "run/experts/0/model.safetensors").exists()
    assert (tmp_path / "run/experts/0/state").exists()
    list(finetuning.finetune_experts(plan))
    assert [p.name for p in (tmp_path / "run").rglob("state")] == []


def test_one_range_alone_is_finetuned_as_in_the_whole_run(done: Finished, tmp_path: Path) -> None:
    records = list(finetuning.finetune_experts(prepare(done.config, tmp_path / "run"), 1))
    assert {r.name for r in records if not isinstance(r, str)} == {"expert-1"}
    assert [p.name for p in (tmp_path / "run/experts").iterdir()] == ["1"]
    name = "experts/1/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (done.folder / name).read_bytes()


def test_a_range_that_does_not_exist_is_refused(done: Finished) -> None:
    with pytest.raises(ValueError, match="--range is 3, and the range doesn't exist: expected 0 to 2"):
        list(finetuning.finetune_experts(check(done.config, done.folder), 3))


def test_another_seed_makes_another_run(done: Finished, tmp_path: Path) -> None:
    plan = prepare(done.config.model_copy(update={"seed": 1}), tmp_path / "run")
    list(finetuning.finetune_experts(plan, 0))
    name = "experts/0/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() != (done.folder / name).read_bytes()


def test_a_run_with_trunk_projections_keeps_them_and_is_scored_with_them(
    tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    config = tiny_config(
        finetune={"projection": {"placement": "trunk", "learning_rate_scale": 100.0}, "baseline": False},
        # Whatever the search finds, the merge is not the base.
        search={"num_trials": 3, "gradient_batches": 2, "frozen": {0: 1.0}},
        evaluate={"num_seed_sets": 1, "metrics": ["fd_effnetlite0"]},
    )
    events = list(workflow.run(config, tmp_path / "run"))
    projections = load_file(tmp_path / "run/merged/projections.safetensors")
    stock = load_file(Path(config.base) / WEIGHTS)
    assert len(projections) == 3
    assert load_file(tmp_path / "run/merged" / WEIGHTS).keys() == stock.keys()
    best = best_finalist(tmp_path / "run")
    experts = [load_file(tmp_path / f"run/experts/{i}/model.safetensors") for i in range(2)]
    recomputed = merge(stock, experts, best["weights"])
    assert best["merged_sha256"] == tensors_sha256(recomputed)
    assert all(torch.equal(projections[k], recomputed[k]) for k in projections)
    sizes = {e.model: e.num_parameters for e in events if isinstance(e, Row)}
    assert sizes["merged"] == sizes["pretrained"] + sum(v.numel() for v in projections.values())
    # Its pictures need the projections: without them the same seeds look different.
    merged = tmp_path / "run/merged"
    drawn.sample_model(str(merged), tmp_path / "with", 2, 0, Sample(sampler="DDIM", num_steps=3))
    (merged / "projections.safetensors").unlink()
    drawn.sample_model(str(merged), tmp_path / "without", 2, 0, Sample(sampler="DDIM", num_steps=3))
    assert pixels(tmp_path / "with/0.png") == pytest.approx(
        pixels(tmp_path / "run/samples/merged/0.png").astype(float), abs=1
    )
    assert (pixels(tmp_path / "with/0.png") != pixels(tmp_path / "without/0.png")).any()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.mark.parametrize("model", ["pretrained", "ensemble", "merged"])
def test_sampling_a_model_draws_the_pictures_the_run_drew(done: Finished, tmp_path: Path, model: str) -> None:
    source = {"pretrained": done.base, "ensemble": done.folder, "merged": done.folder / "merged"}[model]
    drawn.sample_model(str(source), tmp_path / "out", 2, 0, Sample(sampler="DDIM", num_steps=3))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.png", "1.png"]
    for name in ("0.png", "1.png"):
        assert abs(pixels(tmp_path / "out" / name) - pixels(done.folder / "samples" / model / name)).max() <= 1


def test_pictures_are_named_by_their_seeds(done: Finished, tmp_path: Path) -> None:
    drawn.sample_model(str(done.base), tmp_path / "a", 3, 7, Sample(sampler="DDPM", num_steps=2))
    drawn.sample_model(str(done.base), tmp_path / "b", 1, 8, Sample(sampler="DDPM", num_steps=2))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["7.png", "8.png", "9.png"]
    assert abs(pixels(tmp_path / "a/8.png") - pixels(tmp_path / "b/8.png")).max() <= 1


def test_merging_a_runs_experts_by_hand_gives_its_merged_model(done: Finished, tmp_path: Path) -> None:
    weights = json.loads((done.folder / "merged/merge.json").read_text())["weights"]
    experts = [done.folder / f"experts/{i}" for i in range(3)]
    list(recipes.merge_models(str(done.base), experts, Merge(weights=weights), tmp_path / "merged"))
    assert (tmp_path / "merged" / WEIGHTS).read_bytes() == (done.folder / "merged" / WEIGHTS).read_bytes()
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert record["weights"] == weights
    single = [e / "model.safetensors" for e in experts]
    out = tmp_path / "merged.safetensors"
    list(recipes.merge_models(str(done.base / WEIGHTS), single, Merge(weights=weights), out))
    merged = load_file(tmp_path / "merged.safetensors")
    expected = load_file(done.folder / "merged" / WEIGHTS)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[k], v) for k, v in expected.items())


def test_merging_refuses_an_output_of_the_wrong_kind_and_too_few_weights(done: Finished, tmp_path: Path) -> None:
    expert = done.folder / "experts/0"
    with pytest.raises(ValueError, match="expected a folder, as the base is one"):
        list(recipes.merge_models(str(done.base), [expert], Merge(weights=[1.0]), tmp_path / "out.safetensors"))
    with pytest.raises(ValueError, match="1 weights for 2 experts"):
        list(recipes.merge_models(str(done.base), [expert, expert], Merge(weights=[1.0]), tmp_path / "out"))


def test_statistics_are_the_mean_and_covariance_of_the_features(done: Finished, tmp_path: Path) -> None:
    write_reference(str(done.images), tmp_path / "reference.npz", "fd_effnetlite0", Stats())
    images = torch.from_numpy(np.load(done.images)["images"])[:, None]
    features = load_extractor("effnetlite0", torch.device("cpu")).extract(images)["features"].double().numpy()
    written = np.load(tmp_path / "reference.npz")
    assert sorted(written.files) == ["mu", "sigma"]
    np.testing.assert_allclose(written["mu"], features.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(written["sigma"], np.cov(features, rowvar=False), rtol=1e-6, atol=1e-9)


def test_images_have_no_distance_to_their_own_statistics_and_one_to_others(done: Finished, tmp_path: Path) -> None:
    reference = tmp_path / "reference.npz"
    write_reference(str(done.images), reference, "fd_effnetlite0", Stats())

    def distance(model: str, to: str, metric: str = "fd_effnetlite0") -> dict[str, Any]:
        num_images = 8 if model == str(done.base) else None
        *_, record = evaluate_model(
            model, to, Protocol(metrics=[metric], num_images=num_images), tmp_path / "metrics.jsonl"
        )
        return record

    own = distance(str(done.images), str(reference))
    assert own["value"] == pytest.approx(0, abs=1e-3)
    assert own["num_images"] == 48
    assert own["seeds"] is None
    drawn = distance(str(done.base), str(reference))
    assert drawn["value"] > 0.1
    assert drawn["seeds"] == [0, 7]
    assert drawn.keys() >= FIELDS
    # Statistics and the images they were made from are the same reference.
    assert distance(str(done.base), str(done.images))["value"] == pytest.approx(drawn["value"], rel=1e-6)
    assert len(read_records(tmp_path / "metrics.jsonl")) == 3
    with pytest.raises(ValueError, match="kd_effnetlite0 needs the reference's images"):
        distance(str(done.base), str(reference), "kd_effnetlite0")


def test_drawn_pictures_score_as_the_model_that_drew_them(done: Finished, tmp_path: Path) -> None:
    drawn.sample_model(str(done.base), tmp_path / "out", 8, 0, Sample(sampler="DDIM", num_steps=50))
    values = []
    for model in (str(done.base), str(tmp_path / "out")):
        *_, record = evaluate_model(model, str(done.images), Protocol(metrics=METRICS[:1], num_images=8))
        values.append(record["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_an_expert_of_another_base_is_refused_in_a_run(done: Finished, tmp_path: Path) -> None:
    shutil.copytree(done.folder, tmp_path / "run")
    path = tmp_path / "run/experts/1/expert.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "base_sha256": "0" * 64}))
    with pytest.raises(ValueError, match=r"experts/1 was made from .*: base_sha256 was 000000000000 and is "):
        list(workflow.run(done.config, tmp_path / "run"))


def test_a_search_of_ties_merges_exports_what_it_scored(done: Finished, tmp_path: Path) -> None:
    values = load_config(done.folder / "config.yaml").model_dump(mode="json")
    values["search"] |= {"method": "ties", "density": 0.5}
    config = Config.model_validate(values)
    shutil.copytree(done.folder / "experts", tmp_path / "run/experts")
    (tmp_path / "run/config.yaml").write_text(dump_config(config))
    list(selection.search_weights(prepare(config, tmp_path / "run")))
    record = json.loads((tmp_path / "run/merged/merge.json").read_text())
    assert (record["method"], record["settings"]["density"]) == ("ties", 0.5)
    merged = load_file(tmp_path / "run/merged" / WEIGHTS)
    assert tensors_sha256(merged) == record["merged_sha256"]
    base, experts = load_file(done.base / WEIGHTS), done.experts()
    assert (
        tensors_sha256(merge(base, experts, record["weights"], "ties", Settings(density=0.5)))
        == record["merged_sha256"]
    )
    assert tensors_sha256(merge(base, experts, record["weights"])) != record["merged_sha256"]


@pytest.mark.parametrize("moved", [False, True])
def test_the_recipe_of_a_run_repeats_its_merge(moved: bool, done: Finished, tmp_path: Path) -> None:
    folder = shutil.copytree(done.folder, tmp_path / "elsewhere") if moved else done.folder
    list(recipes.repeat_merge(folder / "merged/merge.json", tmp_path / "again"))
    assert tensors_sha256(load_file(tmp_path / "again" / WEIGHTS)) == tensors_sha256(
        load_file(done.folder / "merged" / WEIGHTS)
    )
    shutil.copytree(folder, tmp_path / "other")
    other = load_file(folder / "experts/0/model.safetensors")
    save_file({k: v + 1 for k, v in other.items()}, tmp_path / "other/experts/0/model.safetensors")
    with pytest.raises(ValueError, match="experts/0 is not what the recipe was made with"):
        list(recipes.repeat_merge(tmp_path / "other/merged/merge.json", tmp_path / "again"))


def test_a_search_combines_listed_checkpoints_in_place_of_the_experts(done: Finished, tmp_path: Path) -> None:
    checkpoints = [done.folder / "merged", done.folder / "experts/2/model.safetensors"]
    values = load_config(done.folder / "config.yaml").model_dump(mode="json")
    values["search"] |= {"checkpoints": [str(c) for c in checkpoints], "strategy": "evolution", "num_trials": 6}
    config = Config.model_validate(values)
    list(selection.search_weights(prepare(config, tmp_path / "run")))
    record = json.loads((tmp_path / "run/merged/merge.json").read_text())
    sources = [load_file(checkpoints[0] / WEIGHTS), load_file(checkpoints[1])]
    assert record["experts_sha256"] == [tensors_sha256(s) for s in sources]
    assert record["ranges"] is None
    merged = merge(load_file(done.base / WEIGHTS), sources, record["weights"])
    assert tensors_sha256(load_file(tmp_path / "run/merged" / WEIGHTS)) == tensors_sha256(merged)
    assert "ensemble" not in json.loads((tmp_path / "run/search/candidates.json").read_text())


def test_a_checkpoint_of_another_architecture_is_refused(done: Finished, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    values = load_config(done.folder / "config.yaml").model_dump(mode="json")
    values["search"] |= {"checkpoints": [str(tmp_path / "other.safetensors")]}
    with pytest.raises(ValueError, match=r"other.safetensors doesn't fit the base: missing: .*; unknown: weight"):
        prepare(Config.model_validate(values), tmp_path / "run")


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_blocks_are_merged_by_weights_of_their_own(method: str, done: Finished, tmp_path: Path) -> None:
    values = load_config(done.folder / "config.yaml").model_dump(mode="json")
    values["search"] |= {"blocks": ["up_blocks.*", "*"], "method": method}
    plan = prepare(Config.model_validate(values), tmp_path / "run")
    base, experts = load_file(done.base / WEIGHTS), done.experts()
    rows = [(0.2, 0.9, 0.4), (1.1, 0.3, -0.6)]
    expected = {}
    for is_up, weights in zip((True, False), rows, strict=True):
        keys = [k for k in base if k.startswith("up_blocks.") == is_up]
        parts = [{k: t[k] for k in keys} for t in (base, *experts)]
        expected |= merge(parts[0], parts[1:], list(weights), method)
    score = open_scorer(plan, open_merger(plan, experts, hashes_of(experts)))(sum(rows, ()), levels(plan.config, 3)[0])
    assert score.merged_sha256 == tensors_sha256(expected)
    winner = Trial("final", 0, sum(rows, ()), score.value, score.merged_sha256, 1.0, "main")
    record = export_record(plan, [], levels(plan.config, 3)[-1], winner)
    assert (record["settings"]["blocks"], record["weights"]) == ({"up_blocks.*": list(rows[0])}, list(rows[1]))
    assert "Tensors that match `up_blocks.*` have the weights 0.2000, 0.9000, 0.4000." in model_card(record)


def test_a_picture_shows_the_pretrained_model_before_anything_is_trained(done: Finished) -> None:
    lines = [e for e in done.events if isinstance(e, str) and e.startswith("picture: ")]
    made = [line.rpartition("samples.png, ")[2] for line in lines]
    assert made == [
        "pretrained",
        "pretrained, baseline-finetuned, ensemble",
        "pretrained, baseline-finetuned, ensemble, merged",
    ]
    first = next(i for i, e in enumerate(done.events) if isinstance(e, StepRecord))
    assert done.events.index(lines[0]) < first
