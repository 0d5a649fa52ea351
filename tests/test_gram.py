"""Inner products of layers' inputs, and the merge by them: closed forms, and every expert as it is where it is used."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from conftest import make_unet
from decouple_merge.cli import main as cli
from decouple_merge.config import Config, Search
from decouple_merge.diffusion.process import VP
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.errors import UserError
from decouple_merge.experiment.fisher import write_fishers
from decouple_merge.experiment.gram import write_grams
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.planned import Plan
from decouple_merge.experiment.provenance import made_from
from decouple_merge.experiment.selection import search_weights
from decouple_merge.merging.recipes import repeat_merge
from decouple_merge.merging.rules import RULES
from decouple_merge.merging.rules.rule import Context, Settings, merge_tensor
from decouple_merge.models.base import Base
from decouple_merge.models.families.unet import UNet
from decouple_merge.searching.checks import check_search
from decouple_merge.seeds import generator
from decouple_merge.training.gradient import noisy_batch
from decouple_merge.training.gram import gram_layout, gram_matrices

CPU, OWN = torch.device("cpu"), TimestepRange(10, 20)


def images(num: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 1, 8, 8), generator=draws, dtype=torch.uint8)


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(UNet(), None, make_unet().eval(), VP(torch.linspace(0.999, 0.01, 40), "epsilon"), "")


def regmean(tensors: list[Tensor], weights: list[float], grams: list[Tensor], **chosen: float) -> Tensor:
    start, *experts = tensors
    return merge_tensor(RULES["regmean"], start, experts, weights, Context("w", Settings(**chosen), grams=grams))


def test_the_first_layers_inner_products_are_those_of_its_patches(base: Base) -> None:
    batches = [images(3, seed) for seed in (0, 1)]
    expert = {k: v + 0.1 if v.is_floating_point() else v for k, v in base.network.state_dict().items()}
    found = dict(gram_matrices(base, expert, OWN, lambda: batches, 9, CPU))
    x = torch.cat([noisy_batch(base, b, OWN, generator(9, "gram", i)).x_t for i, b in enumerate(batches)])
    padded = nn.functional.pad(x, (1, 1, 1, 1)).double()
    patches = [padded[n, :, i : i + 3, j : j + 3].flatten() for n in range(6) for i in range(8) for j in range(8)]
    expected = sum(torch.outer(p, p) for p in patches) / len(patches)
    torch.testing.assert_close(found["conv_in.weight"], expected.float(), rtol=1e-4, atol=1e-6)
    # An embedding's second layer sees what the first one says.
    first = expert["time_embedding.linear_1.weight"]
    assert found["time_embedding.linear_2.weight"].shape == (len(first), len(first))
    assert {k: (v.dtype, tuple(v.shape)) for k, v in found.items()} == gram_layout(base.network)
    assert all(torch.linalg.eigvalsh(v.double()).min() > -1e-3 * v.diagonal().max() for v in found.values())


def test_layers_that_dont_fit_into_memory_are_taken_in_turn(base: Base) -> None:
    expert, calls = base.network.state_dict(), [0]

    def batches() -> list[Tensor]:
        calls[0] += 1
        return [images(2)]

    whole = list(gram_matrices(base, expert, OWN, batches, 0, CPU))
    parts = list(gram_matrices(base, expert, OWN, batches, 0, CPU, max_bytes=1))
    assert calls[0] == 1 + len(whole)
    assert [key for key, _ in parts] == [key for key, _ in whole]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole, parts, strict=True))
    with pytest.raises(ValueError, match="found no images, expected at least one batch"):
        list(gram_matrices(base, expert, OWN, list, 0, CPU))


@pytest.mark.parametrize("shape", [(5, 8), (5, 2, 2, 2)])
def test_regmean_reproduces_every_expert_on_the_inputs_that_it_sees(shape: tuple[int, ...]) -> None:
    draws = torch.Generator().manual_seed(0)
    start, *experts = [torch.randn(shape, generator=draws, dtype=torch.float64) for _ in range(3)]
    inputs = [torch.randn(100, 8, generator=draws, dtype=torch.float64) for _ in range(2)]
    inputs[0][:, 3:], inputs[1][:, :3] = 0, 0
    grams = [x.T @ x / len(x) for x in inputs]
    merged = regmean([start, *experts], [1.0, 1.0], grams, off_diagonal=1.0)
    for x, expert in zip(inputs, experts, strict=True):
        outputs = [x @ w.reshape(5, 8).T for w in (merged, expert, start)]
        assert (outputs[0] - outputs[1]).norm() < 1e-4 * (outputs[2] - outputs[1]).norm()


def test_regmean_is_the_papers_closed_form() -> None:
    draws = np.random.default_rng(0)
    start, *experts = [draws.normal(size=(5, 8)) for _ in range(4)]
    inputs = [draws.normal(size=(50, 8)) * draws.uniform(0.1, 3, size=8) for _ in range(3)]
    weights, alpha = [1.0, 0.5, 2.0], 0.9
    grams = [x.T @ x / len(x) for x in inputs]
    shrunk = [w * (alpha * g + (1 - alpha) * np.diag(np.diag(g))) for w, g in zip(weights, grams, strict=True)]
    expected = np.linalg.inv(sum(shrunk)) @ sum(g @ e.T for g, e in zip(shrunk, experts, strict=True))
    tensors = [torch.from_numpy(t) for t in (start, *experts)]
    found = regmean(tensors, weights, [torch.from_numpy(g) for g in grams], off_diagonal=alpha)
    np.testing.assert_allclose(found.numpy(), expected.T, atol=1e-5)
    assert torch.equal(regmean(tensors, [0.0] * 3, [torch.from_numpy(g) for g in grams]), tensors[0])
    # Without inner products, or where no expert sees an input, it is the mean.
    mean = sum(w * e for w, e in zip(weights, experts, strict=True)) / sum(weights)
    np.testing.assert_allclose(regmean(tensors, weights, []).numpy(), mean, atol=1e-12)
    unseen = regmean(tensors, weights, [torch.zeros(8, 8, dtype=torch.float64)] * 3)
    np.testing.assert_allclose(unseen.numpy(), mean, atol=1e-12)
    with pytest.raises(ValueError, match=r"w: inner products of shape \[3, 3\], .*, expected \[8, 8\] for each expert"):
        regmean(tensors, weights, [torch.eye(3)] * 3)


# -- the files of a run


@pytest.fixture
def plan(tiny_config: Callable[..., Config], tmp_path: Path) -> Plan:
    """A run with two experts that were moved by hand."""
    made = prepare(tiny_config(), tmp_path / "run")
    for index in range(2):
        draws, folder = torch.Generator().manual_seed(index), made.run.expert(index)
        moved = {k: v + 0.05 * torch.randn(v.shape, generator=draws) for k, v in made.base.network.state_dict().items()}
        folder.mkdir(parents=True)
        save_file(moved, folder / "model.safetensors")
        (folder / "expert.json").write_text(json.dumps(made_from(folder.relative_to(made.run.folder).as_posix(), made)))
    return made


def test_a_runs_files_merge_it_and_its_record_repeats_the_merge(plan: Plan, tmp_path: Path) -> None:
    invoke = partial(CliRunner().invoke, cli.app, catch_exceptions=False)
    told = invoke(["gram", str(plan.run.folder), "--num-batches", "2"])
    assert told.exit_code == 0
    assert "8 images at timesteps [20, 40)" in told.output
    files, experts = ([str(path(i)) for i in range(2)] for path in (plan.run.gram, plan.run.expert))
    arguments = ["merge", plan.config.base, *experts, "--weights", "1,2", "--method", "regmean"]
    out, again = tmp_path / "merged", tmp_path / "again"
    assert invoke([*arguments, "--out", str(out), "--set", f"grams=[{', '.join(files)}]"]).exit_code == 0
    merged = load_file(out / "unet/diffusion_pytorch_model.safetensors")
    key = "down_blocks.0.resnets.0.conv1.weight"
    start, grams = plan.base.network.state_dict()[key], [load_file(f)[key] for f in files]
    tensors = [start, *(load_file(Path(e) / "model.safetensors")[key] for e in experts)]
    torch.testing.assert_close(merged[key], regmean(tensors, [1.0, 2.0], grams))
    assert not torch.allclose(merged[key], (tensors[1] + 2 * tensors[2]) / 3, atol=1e-3)
    assert invoke(["merge", "--recipe", str(out), "--out", str(again)]).exit_code == 0
    assert (again / "merge.json").read_bytes() == (out / "merge.json").read_bytes()
    with pytest.raises(ValueError, match="grams names 1 files for 2 experts, expected one for each, as deme gram"):
        invoke([*arguments, "--out", str(out), "--set", f"grams=[{files[0]}]"])
    save_file({key: torch.eye(3)}, files[1])
    with pytest.raises(ValueError, match="expected the inner products of a layer's inputs"):
        invoke([*arguments, "--out", str(out), "--set", f"grams=[{', '.join(files)}]"])


def test_a_file_is_kept_until_its_expert_or_its_images_change(plan: Plan) -> None:
    def stamps(num_batches: int) -> list[int]:
        list(write_grams(plan, num_batches))
        return [plan.run.gram(i).stat().st_mtime_ns for i in range(2)]

    first = stamps(1)
    assert stamps(1) == first
    second = stamps(2)
    assert all(a != b for a, b in zip(first, second, strict=True))
    with safe_open(plan.run.gram(1), framework="pt") as file:
        assert json.loads(file.metadata()["gram"])["timesteps"] == [20, 40]
    with pytest.raises(ValueError, match="num_batches is 0, expected at least 1"):
        list(write_grams(plan, 0))


# -- searches by rules that need more than the experts


def test_a_finished_search_is_not_begun_again_because_its_statistics_are_others(plan: Plan) -> None:
    chosen = {"method": "fisher", "low": 0.0, "strategy": "uniform", "num_finalists": 0}
    search = Search.model_validate(plan.config.search.model_dump() | chosen)
    plan = prepare(plan.config.model_copy(update={"search": search}), plan.run.folder)
    list(search_weights(plan))
    list(search_weights(plan))
    list(write_fishers(plan, 2))
    with pytest.raises(UserError, match="search was made from something else: rule"):
        list(search_weights(plan))


@pytest.mark.parametrize("method", ["regmean", "fisher", "dare_ties", "iso_c"])
def test_a_search_by_any_rule_makes_what_it_needs_and_its_record_repeats_it(
    method: str, plan: Plan, tmp_path: Path
) -> None:
    chosen = {"method": method, "density": 0.6, "low": 0.0, "strategy": "random", "num_trials": 4, "num_finalists": 0}
    search = Search.model_validate(plan.config.search.model_dump() | chosen)
    plan = prepare(plan.config.model_copy(update={"search": search}), plan.run.folder)
    lines = [event for event in search_weights(plan) if isinstance(event, str)]
    assert plan.run.gram(1).exists() == (method == "regmean")
    assert plan.run.fisher(1).exists() == (method == "fisher")
    record = json.loads((plan.run.merged / "merge.json").read_text())
    assert record["method"] == method
    # What the method doesn't read is not in the record of how it merged.
    assert (record["settings"]["density"] == 0.6) == ("density" in RULES[method].params)
    # The best candidate may be the base, which all rules give alike.
    trial = next(t for t in reversed(trials_of(plan)) if sum(t["weights"]) > 0)
    recipe = {**record, "weights": trial["weights"], "experts_sha256": []}
    recipe["settings"] = recipe["settings"] | {"weights": trial["weights"]}
    (plan.run.merged / "recipe.json").write_text(json.dumps(recipe))
    found = list(repeat_merge(plan.run.merged / "recipe.json", tmp_path / "again"))
    assert found
    assert json.loads((tmp_path / "again/merge.json").read_text())["merged_sha256"] == trial["merged_sha256"]
    assert any("inner products" in line for line in lines) == (method == "regmean")


def trials_of(plan: Plan) -> list[dict[str, Any]]:
    return [json.loads(line) for line in plan.run.trials.read_text().splitlines()]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"method": "karcher"}, r"search\.low is -0\.2, and method karcher takes no weights below 0: set low to 0"),
        ({"method": "slerp", "low": 0.0}, "search.method is slerp: slerp has 3 experts .*, expected one, or two with"),
        ({"method": "slerp", "low": 0.0, "num": 2}, ""),
        ({"method": "slerp", "num": 2}, r"search\.low is -0\.2, and two weights of slerp may not cancel: set low to 0"),
        ({"method": "karcher", "low": 0.0, "frozen": {0: -0.3}}, r"karcher: weights are \[-0\.3, .*\], expected none"),
        ({"method": "della", "density": 0.95}, r"della: density is 0\.95 and epsilon 0\.1, expected both their sum"),
        ({"method": "della", "density": 0.5, "tune": {"density": [0.05, 0.6]}}, r"tune reaches density 0\.05: density"),
        ({"method": "consensus", "min_tasks": 4}, "consensus: min_tasks is 4 with 3 experts, so that nothing is kept"),
        ({"method": "tyes"}, "method: expected one of linear, ties, .*, found 'tyes'"),
        ({"method": "ties", "density": [0.5, 0.5]}, "density has 2 numbers for 3 experts, expected one, or one for"),
        ({"method": "regmean", "low": 0.0, "over": "baseline"}, "needs grams of the run's experts, and other models"),
    ],
)
def test_what_a_rule_doesnt_take_is_refused_before_a_search(base: Base, chosen: dict[str, Any], message: str) -> None:
    num = chosen.pop("num", 3)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_search(Search(**chosen), base, num)
