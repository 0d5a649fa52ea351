"""Where little is there: no shared memory, no training data, a home folder that no shell put in place of ~."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from decouple_merge.cli import main as cli
from decouple_merge.config import Config, Data, Merge, load_config, validate
from decouple_merge.config.paths import expand_home
from decouple_merge.data.batches import LabelledBatch, LatentBatch, training_batches
from decouple_merge.data.images import ArrayImages
from decouple_merge.data.sources import load_images
from decouple_merge.errors import UserError
from decouple_merge.executors import run_all
from decouple_merge.experiment.finetuning import finetune_experts
from decouple_merge.experiment.plan import prepare
from decouple_merge.merging.recipes import merge_models, repeat_merge
from decouple_merge.storage.files import cache_folder
from decouple_merge.storage.packed import pack, unpack

OWN_CACHE = True


# -- without shared memory


def refuse_shared_memory() -> None:
    """Have this process, and what it forks, die where torch would send a tensor its own way."""
    for kind in [k for k in ForkingPickler._extra_reducers if k.__module__.startswith("torch")]:
        ForkingPickler._extra_reducers[kind] = lambda _: os._exit(3)


def tensors_of(num: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    refuse_shared_memory()
    yield torch.full((1000,), float(num)), {"half": torch.full((2, 3), num, dtype=torch.bfloat16)}


def test_tensors_that_workers_yield_take_no_shared_memory() -> None:
    found = sorted(run_all(tensors_of, [(1,), (2,)], 2), key=lambda item: float(item[0][0]))
    assert [float(rows.sum()) for rows, _ in found] == [1000, 2000]
    assert [halves["half"].tolist() for _, halves in found] == [[[n] * 3] * 2 for n in (1, 2)]
    assert found[0][1]["half"].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_batches_of_data_loader_workers_take_no_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ForkingPickler, "_extra_reducers", dict(ForkingPickler._extra_reducers))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)

    def batches(num_workers: int) -> list[Any]:
        data = Data(num_held_out=4, num_workers=num_workers, flip=True)
        return list(training_batches(ArrayImages(pixels), data, 4, 0, 0, 6))

    expected = batches(0)
    refuse_shared_memory()
    assert all(torch.equal(a, b) for a, b in zip(batches(2), expected, strict=True))


def test_what_is_packed_comes_out_as_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    condition = {"a": torch.randn(2, 3, generator=generator).to(torch.bfloat16), "b": torch.arange(2)}
    for batch in (
        LatentBatch(torch.randn(2, 1, 2, 4, 2, 2, generator=generator), condition, {"a": torch.ones(3)}),
        LabelledBatch(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), condition),
    ):
        found = unpack(pack(batch))
        assert type(found) is type(batch)
        torch.testing.assert_close(vars(found), vars(batch), rtol=0, atol=0)
        # A copy that may be written.
        found.condition["b"].zero_()
    odd = [torch.tensor(3.5), torch.empty(0, 4), torch.tensor([True, False]), torch.ones(4, 4).T, torch.ones(6)[::2]]
    torch.testing.assert_close(unpack(pack(odd)), odd, rtol=0, atol=0)
    assert unpack(pack(("item", None))) == ("item", None)


# -- without the training data


def test_a_run_is_sampled_and_evaluated_without_its_data(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny_config(finetune={"num_updates": 1, "baseline": False})
    run = tmp_path / "run"
    list(finetune_experts(prepare(config, run)))
    np.savez(tmp_path / "other.npz", np.random.default_rng(1).integers(0, 256, (20, 8, 8), dtype=np.uint8))
    Path(config.data.source).unlink()
    few = ["--num-images", "12"]
    done = CliRunner().invoke(cli.app, ["sample", str(run), "--out", str(tmp_path / "s"), *few, "--num-steps", "2"])
    assert done.exit_code == 0, done.exception
    assert len(list((tmp_path / "s").glob("*.png"))) == 12
    against = ["--reference", str(tmp_path / "other.npz"), "--out", str(tmp_path / "m.jsonl")]
    done = CliRunner().invoke(cli.app, ["evaluate", str(run), *few, *against, "--set", "sample.num_steps=2"])
    assert done.exit_code == 0, done.exception
    (record,) = map(json.loads, (tmp_path / "m.jsonl").read_text().splitlines())
    assert record["num_images"] == 12
    # What trains says what is gone.
    load_images.cache_clear()
    with pytest.raises(UserError, match=r"data\.source is '.*images\.npz', expected"):
        prepare(load_config(run / "config.yaml"), run)


# -- the home folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_home_is_put_in_its_place_in_every_option(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(2)}, home / "b.safetensors")
    save_file({"a": torch.zeros(2)}, home / "e.safetensors")
    arguments = ["merge", "~/b.safetensors", "~/e.safetensors", "--weights=1", "--out=~/o.safetensors"]
    monkeypatch.setattr(sys, "argv", ["deme", *arguments])
    monkeypatch.chdir("/")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert (home / "o.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("~/x", "HOME/x"),
        ("~", "HOME"),
        ("webdataset:~/x/{0..3}.tar", "webdataset:HOME/x/{0..3}.tar"),
        ("datasets:~/x", "datasets:HOME/x"),
        ("a/~/x", "a/~/x"),
        ("~/a:b", "HOME/a:b"),
        ("a:~b", "a:~b"),
        ("org/name", "org/name"),
        ("postgresql://me@host/~", "postgresql://me@host/~"),
    ],
)
def test_home_is_known_at_the_start_of_a_path(name: str, expected: str, home: Path) -> None:
    assert expand_home(name) == expected.replace("HOME", str(home))


def test_settings_caches_and_recipes_know_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = validate(Config, {}, "here", ["search.checkpoints=[~/c]", "base=~/b"])
    assert (config.search.checkpoints, config.base) == ([f"{home}/c"], f"{home}/b")
    monkeypatch.setenv("DEME_CACHE", "~/cache")
    assert cache_folder() == home / "cache"
    save_file({"a": torch.ones(2)}, home / "b.safetensors")
    shutil.copy(home / "b.safetensors", home / "e.safetensors")
    (home / "sub").mkdir()
    recipe = home / "sub/recipe.yaml"
    recipe.write_text("base: ~/b.safetensors\nexperts: [~/e.safetensors]\nweights: [1]\n")
    list(repeat_merge(recipe, home / "o.safetensors"))
    assert (home / "o.safetensors").is_file()


# -- what an adapter is made of


@pytest.mark.parametrize("place", ["beside", "header"])
def test_the_config_of_an_adapter_is_part_of_its_hash(tmp_path: Path, place: str) -> None:
    save_file({"q.weight": torch.zeros(4, 4)}, tmp_path / "b.safetensors")
    factors = {f"q.lora_{side}.weight": torch.ones((1, 4) if side == "A" else (4, 1)) for side in "AB"}
    adapter = tmp_path / "adapter"
    adapter.mkdir()

    def write(alpha: int) -> None:
        text = json.dumps({"r": 1, "lora_alpha": alpha})
        header = {"lora_adapter_metadata": text} if place == "header" else None
        save_file(factors, adapter / "adapter_model.safetensors", header)
        if place == "beside":
            (adapter / "adapter_config.json").write_text(text)

    write(2)
    out = tmp_path / "o.safetensors"
    list(merge_models(str(tmp_path / "b.safetensors"), [adapter], Merge(weights=[1.0]), out))
    list(repeat_merge(out, tmp_path / "again.safetensors"))
    write(3)
    with pytest.raises(UserError, match=r"adapter is not what the recipe was made with"):
        list(repeat_merge(out, tmp_path / "again.safetensors"))
