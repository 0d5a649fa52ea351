"""The typed config: unknown keys, overrides, bounds, seeds, and that a dump reads back."""

from pathlib import Path

import pytest

from decouple_merge.config import Config, Data, Evaluate, Finetune, Search, Training, dump_config, load_config
from decouple_merge.errors import UserError
from decouple_merge.seeds import check_disjoint, generator, stream_seed

# Studies are of another shape.
CONFIGS = sorted(p for p in (Path(__file__).parents[1] / "configs").glob("*.yaml") if not p.stem.startswith("study-"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("finetun: {}", "finetun", "finetune"),
        ("sed: 1", "sed", "seed"),
        ("finetune: {num_range: 4}", "finetune.num_range", "finetune.num_ranges"),
        ("search: {trials: 4}", "search.trials", "search.num_trials"),
        ("finetune: {ema: {decay: 0.9}}", "finetune.ema.decay", "finetune.ema.max_decay"),
        (
            "finetune: {projection: {learning_rate: 1}}",
            "finetune.projection.learning_rate",
            "finetune.projection.learning_rate_scale",
        ),
        ("pretrain: {num_update: 10}", "pretrain.num_update", "pretrain.num_updates"),
        ("finetune: {timestep_spacing: trailing}", "finetune.timestep_spacing", "sample.timestep_spacing"),
        ("search: {gamma: 5, source: a}", "search.source", "data.source"),
        ("guidance_scale: 5", "guidance_scale", "text.guidance_scale"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(tmp_path: Path, text: str, unknown: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"unknown key '{unknown}'; the nearest valid key is '{nearest}'"):
        load_config(write(tmp_path, text))


def test_a_key_of_several_sections_names_them_all(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"'learning_rate'; .* is 'finetune.learning_rate' or 'distil.learning_rate' or 'pretrain.learning_rate'",
    ):
        load_config(write(tmp_path, "learning_rate: 1.0e-4"))
    with pytest.raises(UserError, match=r"'data.num_steps'; the nearest valid key is 'sample.num_steps' or 'search"):
        load_config(write(tmp_path, "data: {num_steps: 4}"))


def test_a_value_of_several_forms_is_named_by_its_key_alone(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"unknown key 'finetune\.ranges\.unt'; the nearest .* 'finetune\.ranges\.unit'"
    ):
        load_config(write(tmp_path, "finetune: {ranges: {unt: 1}}"))
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, "finetune: {ranges: [[0, x]]}"))
    assert "finetune.ranges.0.1: expected a number" in str(caught.value)
    assert "function" not in str(caught.value)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.yaml: ") as caught:
        load_config(write(tmp_path, "sed: 1\nfinetune: {num_updates: -3}"))
    assert "unknown key 'sed'; the nearest valid key is 'seed'" in str(caught.value)
    assert "finetune.num_updates: Input should be greater than 0, found -3" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("finetune: {global_prob: 1.2}", "finetune.global_prob: .*less than or equal to 1, found 1.2"),
        ("finetune: {num_updates: 0}", "finetune.num_updates: .*greater than 0, found 0"),
        ("finetune: {projection: {placement: both}}", "finetune.projection.placement: .*'folded', 'trunk' or 'none'"),
        ("search: {strategy: anneal}", "search.strategy: .*found 'anneal'"),
        ("data: {num_held_out: many}", "data.num_held_out: .*found 'many'"),
        ("evaluate: {metrics: []}", "evaluate.metrics: .*at least 1 item"),
        ("[1, 2]", "found list, expected keys and values"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_value_says_where_and_what_was_found(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, text))


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.yaml: No such file or directory; give the path of a YAML file"):
        load_config(tmp_path / "nowhere.yaml")


def test_overrides_change_values_at_any_depth(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\nfinetune: {num_updates: 5, num_ranges: 2}")
    overrides = [
        "seed=7",
        "finetune.num_updates=100",
        "finetune.ema.max_decay=0.5",
        "finetune.learning_rate=1e-3",
        "finetune.ranges=[[0, 10], [10, 40]]",
        "data.flip=true",
        "evaluate.metrics=[fd_effnetlite0]",
        "sample.timestep_spacing=null",
        "data.source=a=b",
    ]
    config = load_config(path, overrides)
    assert (config.seed, config.finetune.num_updates, config.finetune.num_ranges) == (7, 100, 2)
    assert (config.finetune.ema.max_decay, config.finetune.learning_rate) == (0.5, 1e-3)
    assert config.finetune.ranges == [(0, 10), (10, 40)]
    assert (config.data.flip, config.data.source) == (True, "a=b")
    assert config.evaluate.metrics == ["fd_effnetlite0"]
    assert config.sample.timestep_spacing is None


def test_the_last_of_two_overrides_wins(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "{}"), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("seed", "--set 'seed': expected key=value"),
        ("=3", "--set '=3': expected key=value"),
        ("seed.x=3", "--set 'seed.x=3': 'seed' holds a value, not a section"),
        ("finetune.num_range=3", r"unknown key 'finetune\.num_range'; the nearest valid key is 'finetune\.num_ranges'"),
        ("finetune=3", "finetune: "),
        ("data.source=[", r"--set 'data\.source=\['"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path, "seed: 1"), [assignment])


def test_a_dump_reads_back_equal(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "data": {"source": "datasets:a/b", "path": "/some/where", "flip": True},
            "finetune": {"ranges": [(0, 3), (3, 1000)], "betas": (0.9, 0.98), "eps": 1e-10, "learning_rate": 1.5e-5},
            "search": {"low": -0.1, "high": 1 / 3 + 1, "num_steps": 7},
            "evaluate": {"inception_weights": "w.pth", "num_reference_images": 12},
            "pretrain": {"model": {"block_out_channels": [32, 64]}, "scheduler": {"beta_schedule": "linear"}},
        }
    )
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize("text", ["", "\n\n", "# base: models/fashion-ddpm\n", "---\n...\n", "~", "\ufeff"])
def test_an_empty_config_is_refused_and_an_empty_section_is_the_default(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"config\.yaml is empty; write \{\} in it if every value shall be the default"):
        load_config(write(tmp_path, text))
    assert load_config(write(tmp_path, "{}")) == Config()
    assert load_config(write(tmp_path, dump_config(Config()))) == Config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize(("search_first", "report_first"), [(0, 0), (29, 0), (0, 9), (45, 39)])
def test_search_seeds_that_overlap_report_seeds_are_refused(search_first: int, report_first: int) -> None:
    with pytest.raises(ValueError, match=r"search seeds \[.* overlap report seeds \[.*move search.first_seed"):
        Config(
            search=Search(num_images=10, first_seed=search_first),
            evaluate=Evaluate(num_images=10, num_seed_sets=3, first_seed=report_first, num_sample_images=1),
        )


def test_search_seeds_next_to_report_seeds_are_accepted() -> None:
    config = Config(
        search=Search(num_images=10, first_seed=30),
        evaluate=Evaluate(num_images=10, num_seed_sets=3, num_sample_images=1),
    )
    assert (config.report_seeds, config.search_seeds) == (range(30), range(30, 40))
    check_disjoint(range(0, 10), range(10, 20))


def test_sample_images_written_out_count_as_report_seeds() -> None:
    with pytest.raises(ValueError, match="overlap"):
        Config(
            search=Search(num_images=10, first_seed=40),
            evaluate=Evaluate(num_images=10, num_seed_sets=3, num_sample_images=64),
        )


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0)])
def test_search_bounds_without_room_are_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=f"low is {low} and high is {high}, expected low below high"):
        Search(low=low, high=high)


def test_a_loaded_config_can_not_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().finetune.num_updates = 3  # type: ignore[misc]


def test_defaults_of_finetuning_are_the_papers() -> None:
    settings = Finetune()
    assert (settings.num_ranges, settings.global_prob, settings.consistency_weight) == (4, 0.4, 1.0)
    assert (settings.betas, settings.weight_decay, settings.eps) == ((0.95, 0.999), 1e-6, 1e-8)
    assert (settings.num_updates, settings.batch_size, settings.learning_rate) == (20_000, 64, 2e-4)
    assert (settings.schedule, settings.num_warmup_updates, settings.max_grad_norm) == ("constant", 0, 1.0)
    assert (settings.ema.max_decay, settings.ema.power, settings.antithetic) == (0.9999, 0.75, True)


def test_sections_are_hashable_where_caches_need_them() -> None:
    assert hash(Data()) == hash(Data())
    assert Data() == Data() != Data(flip=True)
    assert Training() == Training()


def test_random_streams_of_different_keys_differ_and_of_equal_keys_agree() -> None:
    keys = [(1, 2), (2, 1), (12,), ("1", 2), (1, "noise", 0), (1, "noise", 1)]
    assert len({stream_seed(*k) for k in keys}) == len(keys)
    assert generator(1, "a").initial_seed() == generator(1, "a").initial_seed() == stream_seed(1, "a") < 2**63
