"""A run goes on only with what it was made from; its numbers belong to the models and references as they are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conftest import make_unet
from decouple_merge.cli.main import app
from decouple_merge.config import Config, Protocol, Sample, Text, load_config
from decouple_merge.errors import UserError
from decouple_merge.evaluation.compare import compare
from decouple_merge.evaluation.evaluate import evaluate_model
from decouple_merge.experiment import workflow
from decouple_merge.experiment.dry_run import describe
from decouple_merge.experiment.finetuning import finetune_experts
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.provenance import made_from
from decouple_merge.experiment.results import Row, evaluate_run
from decouple_merge.experiment.selection import search_weights
from decouple_merge.sampling.folder import drawn_from
from decouple_merge.sampling.model import open_model
from decouple_merge.searching.trial import Trial
from decouple_merge.storage.files import read_records, write_json
from decouple_merge.storage.made_from import differences, digest_of
from decouple_merge.training.records import StepRecord

LOOKS_AT_PICTURES = True

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


class Place(NamedTuple):
    """A run with its base and its data, which a test may change."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def config(self, **sections: Any) -> Config:
        """Say what the run was made from, by where it lies now; sections are updated by keyword."""
        values = load_config(self.run / "config.yaml").model_dump(mode="json")
        values["base"], values["data"]["source"] = str(self.folder / "base"), str(self.folder / "images")
        for section, changes in sections.items():
            values[section] = {**values[section], **changes} if isinstance(changes, dict) else changes
        return Config.model_validate(values)

    def again(self, **sections: Any) -> list[Any]:
        return list(workflow.run(self.config(**sections), self.run))

    def records(self) -> list[dict[str, Any]]:
        return read_records(self.run / "metrics.jsonl")


def make_place(folder: Path) -> Place:
    """Make a base of T = 40, 24 grey images, and the config of a small job on them."""
    DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=40)).save_pretrained(folder / "base")
    (folder / "images").mkdir()
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{i:02}.png")
    values = {
        "base": str(folder / "base"),
        "data": {"source": str(folder / "images"), "num_held_out": 4},
        "finetune": {"num_ranges": 2, "num_updates": 2, "batch_size": 4, "tracker": "none", "baseline": False},
        "sample": {"num_steps": 2, "batch_size": 8},
        "search": {"num_trials": 3, "num_images": 6, "gradient_batches": 1, "num_final_images": 6},
        "evaluate": {"num_images": 6, "num_seed_sets": 1, "num_sample_images": 2, "metrics": ["fd_effnetlite0"]},
    }
    prepare(Config.model_validate(values), folder / "run")
    return Place(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _shared_cache(_isolated: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEME_CACHE", str(cache))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Place:
    torch.set_num_threads(1)
    made = make_place(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEME_CACHE", str(cache))
        made.again()
    return made


@pytest.fixture
def done(whole: Place, tmp_path: Path) -> Place:
    """A finished run, with its base and its data, that was moved: which changes nothing."""
    shutil.copytree(whole.folder, tmp_path / "place", symlinks=True)
    return Place(tmp_path / "place")


@pytest.fixture
def begun(whole: Place, tmp_path: Path) -> Place:
    """A run of which only the experts are finished."""
    shutil.copytree(whole.folder, tmp_path / "place", ignore=shutil.ignore_patterns("search", "merged", "metrics.*"))
    return Place(tmp_path / "place")


def work_of(events: list[Any]) -> set[str]:
    kinds = {StepRecord: "training", Trial: "search", dict: "evaluation"}
    return {name for kind, name in kinds.items() if any(isinstance(e, kind) for e in events)}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def add(path: Path, amount: float) -> None:
    tensors = {key: value + amount for key, value in load_file(path).items()}
    save_file(tensors, path)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and "lock" not in p.parts
    }


def replace_weights(place: Place) -> None:
    add(place.folder / "base" / WEIGHTS, 0.01)


def change_schedule(place: Place) -> None:
    edit(place.folder / "base/scheduler/scheduler_config.json", beta_schedule="squaredcos_cap_v2")


def change_network_config(place: Place) -> None:
    edit(place.folder / "base/unet/config.json", norm_eps=1e-3)


def replace_an_image(place: Place) -> None:
    Image.new("L", (8, 8), 7).save(place.folder / "images/03.png")


def sort_images_into_classes(place: Place) -> None:
    for i in range(24):
        folder = place.folder / "images" / ("a" if i < 4 else "b")
        folder.mkdir(exist_ok=True)
        (place.folder / f"images/{i:02}.png").rename(folder / f"{i:02}.png")


CHANGES: dict[str, tuple[Callable[[Place], None], str]] = {
    "weights": (replace_weights, r"base_sha256 was [0-9a-f]{12} and is [0-9a-f]{12}; base\.weights was"),
    "schedule": (change_schedule, r'base\.scheduler\.beta_schedule was "linear" and is "squaredcos_cap_v2"; put that'),
    "config": (change_network_config, r"base\.config was"),
    "an image": (replace_an_image, r"data\.sha256 was"),
    "classes": (sort_images_into_classes, r"data\.held_out_sha256 was"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_base_or_data_that_changed_is_named_before_any_compute(name: str, done: Place) -> None:
    change, message = CHANGES[name]
    change(done)
    before = contents(done.run)
    expected = rf"experts/0 was made from something else: {message}.* remove experts/0, experts/1, search, merged of "
    with pytest.raises(UserError, match=expected):
        done.again()
    with pytest.raises(UserError, match=expected):
        list(describe(done.config(), done.run))
    assert contents(done.run) == before


@pytest.mark.parametrize("verb", ["search", "fisher", "analyze", "sample", "evaluate"])
def test_every_verb_of_a_run_names_a_base_that_was_replaced(verb: str, begun: Place, tmp_path: Path) -> None:
    (begun.run / "config.yaml").write_text((begun.run / "config.yaml").read_text().replace(*_moved(begun)))
    change_schedule(begun)
    more = {"sample": ["--out", tmp_path / "out", "--num-images", 1], "evaluate": ["--out", tmp_path / "m.jsonl"]}
    found = CliRunner().invoke(app, [verb, str(begun.run), *map(str, more.get(verb, []))])
    assert isinstance(found.exception, UserError)
    assert "experts/0 was" in str(found.exception)
    assert 'base.scheduler.beta_schedule was "linear" and is "squaredcos_cap_v2"' in str(found.exception)


def _moved(place: Place) -> tuple[str, str]:
    old = Path(load_config(place.run / "config.yaml").base).parent
    return str(old), str(place.folder)


def test_replaced_parts_of_a_text_base_are_named(
    text_config: Callable[..., Config], tiny_text_base: Path, tmp_path: Path
) -> None:
    plan = prepare(text_config(), tmp_path / "run")
    write_json(plan.run.expert(0) / "expert.json", made_from("experts/0", plan))
    prepare(text_config(), tmp_path / "run")
    for part in ("vae", "text_encoder"):
        file = next((tiny_text_base / part).glob("*.safetensors"))
        kept = file.read_bytes()
        add(file, 0.5)
        with pytest.raises(UserError, match=r"base\.encoders was [0-9a-f]{12} and is .*; data\.sha256 was"):
            prepare(text_config(), tmp_path / "run")
        file.write_bytes(kept)
    prepare(text_config(), tmp_path / "run")


def test_a_moved_run_with_moved_base_and_data_is_finished(done: Place) -> None:
    # These say where base and data lie, and what was done when.
    located = ("config.yaml", "manifest.json", "merged/merge.json", "merged/README.md", "costs.jsonl", "report.html")
    kept = {name: data for name, data in contents(done.run).items() if name not in located}
    assert work_of(done.again()) == set()
    assert kept.items() <= contents(done.run).items()


EVALUATIONS: list[dict[str, Any]] = [
    {"evaluate": {"num_seed_sets": 2}},
    {"evaluate": {"first_seed": 100}},
    {"evaluate": {"metrics": ["kd_effnetlite0"]}},
    {"evaluate": {"num_images": 8}},
    {"evaluate": {"sampler": "DDPM"}},
    {"evaluate": {"num_steps": 3}},
    {"evaluate": {"num_sample_images": 3}},
    {"num_processes": 2},
    {"finetune": {"checkpoint_every": 7}},
    {"sample": {"batch_size": 3}},
    {"data": {"num_workers": 1}},
]


def test_a_finished_run_may_be_evaluated_otherwise(done: Place) -> None:
    for changes in EVALUATIONS:
        config = done.config(**changes)
        prepare(config, done.run)
        assert load_config(done.run / "config.yaml") == config


def test_a_finished_run_with_another_evaluation_only_evaluates(done: Place) -> None:
    kept = {n: data for n, data in contents(done.run).items() if n.startswith(("experts/", "search/", "merged/unet/"))}
    old, metrics = done.records(), ["kd_effnetlite0", "fd_effnetlite0"]
    changes = {"evaluate": {"num_seed_sets": 2, "metrics": metrics}, "num_processes": 1, "sample": {"batch_size": 3}}
    events = done.again(**changes)
    assert work_of(events) == {"evaluation"}
    assert done.records()[: len(old)] == old
    # The old ones are not drawn again, and are shown with the new ones.
    assert len(done.records()) == len(old) * 4
    values = {(e.model, e.metric): e.values for e in events if isinstance(e, Row)}
    assert {(r["model"], r["metric"]): values[r["model"], r["metric"]][0] for r in old} == {
        (r["model"], r["metric"]): r["value"] for r in old
    }
    assert all(len(v) == 2 for v in values.values())
    assert {name: contents(done.run)[name] for name in kept} == kept


def test_pictures_follow_the_sampler(done: Place) -> None:
    events = list(workflow.report(prepare(done.config(evaluate={"sampler": "DDPM", "num_steps": 3}), done.run)))
    assert {(e["sampler"], e["num_steps"]) for e in events if isinstance(e, dict)} == {("DDPM", 3)}
    drawn = drawn_from(done.run / "samples/ensemble/1.png")
    assert drawn is not None
    assert (drawn["sampler"], drawn["num_steps"]) == ("DDPM", 3)


def test_a_baseline_may_come_later(done: Place) -> None:
    plan = prepare(done.config(finetune={"baseline": True}), done.run)
    assert {e.name for e in finetune_experts(plan) if isinstance(e, StepRecord)} == {"baseline-finetuned"}
    assert {e["model"] for e in evaluate_run(plan) if isinstance(e, dict)} == {"baseline-finetuned"}


@pytest.mark.parametrize(
    ("changes", "message", "removed"),
    [
        ({"seed": 1}, r"experts/0 .*: seed was 0 and is 1; put", "experts/0, experts/1, search, merged"),
        (
            {"finetune": {"learning_rate": 0.5}},
            r"experts/0 .*: training\.learning_rate was 0\.0002 and is 0\.5; put",
            "experts/0, experts/1, search, merged",
        ),
        ({"data": {"flip": True}}, r"data\.flip was false and is true; put", "experts/0, experts/1, search, merged"),
        ({"finetune": {"num_ranges": 1}}, "own.high was 20 and is 40", "experts/0, experts/1, search, merged"),
        ({"search": {"num_trials": 4}}, r"search .*: search\.num_trials was 3 and is 4; put", "search, merged"),
        ({"search": {"first_seed": 7000}}, r"search\.first_seed was 1000000 and is 7000", "search, merged"),
        ({"sample": {"sampler": "DDPM"}}, r'sample\.sampler was "DDIM" and is "DDPM"', "search, merged"),
        ({"evaluate": {"num_reference_images": 9}}, "num_reference_images was none and is 9", "search, merged"),
    ],
    ids=str,
)
def test_a_changed_setting_of_a_stage_is_refused_with_what_to_remove(
    changes: dict[str, Any], message: str, removed: str, done: Place
) -> None:
    before = contents(done.run)
    with pytest.raises(UserError, match=rf"{message}.* or remove {removed} of "):
        done.again(**changes)
    assert contents(done.run) == before


def test_after_removing_what_was_told_only_that_is_made_anew(done: Place) -> None:
    old, changes = done.records(), {"search": {"num_trials": 4, "high": 1.0}}
    for name in ("search", "merged"):
        shutil.rmtree(done.run / name)
    events = done.again(**changes)
    assert work_of(events) >= {"search"}
    assert not any(isinstance(e, StepRecord) for e in events)
    assert {e["model"] for e in events if isinstance(e, dict)} <= {"merged"}
    assert done.records()[: len(old)] == old


def test_a_merged_model_put_there_by_hand_is_refused_and_never_written_over(done: Place) -> None:
    add(done.run / "merged" / WEIGHTS, 0.5)
    before = contents(done.run / "merged")
    with pytest.raises(UserError, match=r"merged was made from .*: the hash of its weights was .* remove merged of "):
        done.again()
    record = json.loads((done.run / "merged/merge.json").read_text())
    (done.run / "merged/merge.json").unlink()
    with pytest.raises(UserError, match="merged was made from something else: search was none and is "):
        done.again()
    (done.run / "merged/merge.json").write_text(json.dumps(record, indent=2) + "\n")
    assert contents(done.run / "merged") == before


def test_numbers_of_an_older_merged_model_stay_but_are_not_shown(done: Place) -> None:
    old, plan = done.records(), prepare(done.config(), done.run)
    pictures = contents(done.run / "samples/merged")
    add(done.run / "merged" / WEIGHTS, 0.5)
    events = list(workflow.report(plan))
    (new,) = [e for e in events if isinstance(e, dict)]
    assert new["model"] == "merged"
    assert new["model_sha256"] not in {r["model_sha256"] for r in old}
    assert done.records() == [*old, new]
    values = {e.model: e.values for e in events if isinstance(e, Row)}
    assert values == {r["model"]: [r["value"]] for r in [*old, new]}
    assert contents(done.run / "samples/merged") != pictures
    drawn = drawn_from(done.run / "samples/merged/0.png")
    assert drawn is not None
    assert drawn["model_sha256"] == new["model_sha256"]
    # Under one name the model that was scored last counts.
    (against,) = compare(f"{done.run}:pretrained", f"{done.run}:merged")
    assert against.b == new["value"]


def test_a_model_has_one_hash_wherever_it_is_opened(done: Place) -> None:
    hashes = {r["model"]: r["model_sha256"] for r in done.records()}
    (done.run / "config.yaml").write_text((done.run / "config.yaml").read_text().replace(*_moved(done)))
    places = {"pretrained": done.folder / "base", "ensemble": done.run, "merged": done.run / "merged"}
    assert {m: open_model(str(p), Sample(), Text()).sha256 for m, p in places.items()} == hashes
    settings = Protocol(num_images=6, metrics=["fd_effnetlite0"], sample=Sample(num_steps=2))
    *_, record = evaluate_model(str(places["merged"]), str(done.folder / "images"), settings)
    assert record["model_sha256"] == hashes["merged"]
    assert len(set(hashes.values())) == 3


def test_another_reference_or_expert_has_numbers_of_its_own(done: Place) -> None:
    plan = prepare(done.config(), done.run)
    add(done.run / "experts/1/model.safetensors", 0.25)
    assert {e["model"] for e in evaluate_run(plan) if isinstance(e, dict)} == {"ensemble"}
    with pytest.raises(UserError, match=r"search was made from something else: experts_sha256 was .* remove search, m"):
        done.again()


def test_a_training_killed_before_its_first_state_goes_on_with_its_settings_only(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    events = finetune_experts(prepare(place.config(), place.run))
    for event in events:
        if isinstance(event, StepRecord):
            events.close()  # type: ignore[attr-defined]
    (place.run / "experts/0/model.safetensors").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"experts/0 .*: training\.batch_size was 4 and is 5; put that"):
        prepare(place.config(finetune={"batch_size": 5}), place.run)
    shutil.rmtree(place.run / "experts")
    list(finetune_experts(prepare(place.config(finetune={"batch_size": 5}), place.run)))
    record = json.loads((place.run / "experts/1/expert.json").read_text())
    assert record["training"]["batch_size"] == 5


def test_a_search_killed_in_the_middle_goes_on_with_its_settings_only(begun: Place) -> None:
    events = workflow.run(begun.config(), begun.run)
    next(e for e in events if isinstance(e, Trial))
    events.close()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"search was made from .*: search\.halving was 3 and is 4; put that back"):
        begun.again(search={"halving": 4})
    assert any(isinstance(e, Trial) for e in search_weights(prepare(begun.config(), begun.run)))


def test_differences_are_told_by_key_and_short() -> None:
    assert differences({"a": {"b": 1, "c": [1]}, "d": None}, {"a": {"b": 1, "c": [1, 2]}}) == [
        "a.c was [1] and is [1, 2]"
    ]
    assert differences({"a": "0" * 64}, {"a": "x" * 64}) == [f'a was 000000000000 and is "{"x" * 38}…']


def test_a_record_from_before_a_setting_says_that_it_was_not_used() -> None:
    before = {"training": {"batch_size": 4}}
    unused = {"training": {"batch_size": 4, "tune": {}, "ema": {"kind": None}, "spectrum_power": None}}
    assert differences(before, unused) == []
    assert digest_of(before) == digest_of(unused) != digest_of({"training": {"batch_size": 4, "floor": 0}})
    assert differences(before, {"training": {"batch_size": 4, "tune": {"density": [0, 1]}}}) == [
        'training.tune was none and is {"density": [0, 1]}'
    ]
    assert differences(before, {"training": {"batch_size": 4, "floor": 0}}) == ["training.floor was none and is 0"]
