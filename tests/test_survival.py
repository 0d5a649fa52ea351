"""What rounding leaves of a merge's change: counted, told, and refused where it is too little."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from decouple_merge.cli import main as cli
from decouple_merge.config import Merge
from decouple_merge.merging.merger import Merger
from decouple_merge.merging.recipes import merge_models, repeat_merge
from decouple_merge.merging.rules.rule import Context, Settings
from decouple_merge.merging.survival import change_of, survival_record, whole

Tensors = dict[str, Tensor]


def network(dtype: torch.dtype = torch.float32) -> Tensors:
    draws = torch.Generator().manual_seed(0)
    return {f"layer.{i}.weight": torch.randn(40, 50, generator=draws).to(dtype) for i in range(4)}


def moved(base: Tensors, size: float, keys: tuple[str, ...] = ("layer",)) -> Tensors:
    """Move each weight by about so large a share of itself, in float32."""
    draws = torch.Generator().manual_seed(1)
    steps = {k: 1 + size * torch.randn(v.shape, generator=draws) for k, v in base.items()}
    return {k: v.float() * steps[k] if k.startswith(keys) else v for k, v in base.items()}


def saved(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path)
    return path


def merged(folder: Path, base: Tensors, expert: Tensors, **settings: Any) -> list[str]:
    """Merge two files; returns the lines that the user is told."""
    paths = saved(folder / "b.safetensors", base), saved(folder / "e.safetensors", expert)
    events = merge_models(str(paths[0]), [paths[1]], Merge(**{"weights": [1.0]} | settings), folder / "m.safetensors")
    return [e for e in events if isinstance(e, str)]


def record_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["merge"])


def test_the_cosine_is_that_between_wanted_and_written_change() -> None:
    base = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    expert = moved({"layer": base}, 0.01)["layer"]
    found = change_of(base, [expert], expert, expert.bfloat16())
    wanted, written = (expert - base).double(), (expert.bfloat16().double() - base.bfloat16().double())
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(wanted, written, dim=0)), abs=1e-9)
    assert found.unchanged == pytest.approx(float((written == 0)[wanted != 0].double().mean()), abs=1e-9)
    halves = [change_of(base[i], [expert[i]], expert[i], expert[i].bfloat16()) for i in (slice(9), slice(9, None))]
    total = whole(dict(zip("ab", halves, strict=True)))
    assert total.cosine == pytest.approx(found.cosine, abs=1e-12)
    assert (total.num_wanted, total.num_lost) == (found.num_wanted, found.num_lost)


def test_entries_that_no_expert_changes_and_infinities_dont_count() -> None:
    base = torch.tensor([1.0, 2.0, math.inf, 4.0])
    # A sum such as 0.3·1 + 0.7·1 needs not be 1.
    found = change_of(base, [base], base * (1 + 2**-23), base.half())
    assert (found.num_wanted, found.cosine) == (0, 1.0)
    assert survival_record({"w": found}) == {"cosine": 1.0, "unchanged": 0.0, "worst": {}}


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_change_too_fine_for_the_dtype_is_refused_and_leaves_nothing(tmp_path: Path, dtype: str) -> None:
    base = network()
    with pytest.raises(ValueError, match=rf"in {dtype} rounding .* is 0\.\d+, .* worst: layer.*min_delta_cosine=-1"):
        merged(tmp_path, base, moved(base, 1e-5), dtype=dtype)
    assert not (tmp_path / "m.safetensors").exists()
    (_, line) = merged(tmp_path, base, moved(base, 1e-5), dtype=dtype, min_delta_cosine=-1)
    found = record_of(tmp_path / "m.safetensors")["delta"]
    assert found["cosine"] < 0.9
    assert found["unchanged"] > 0.9
    assert f"{found['cosine']:.4f}" in line
    assert f"{100 * found['unchanged']:.2f} %" in line


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_halves_keep_a_change_of_percents_and_say_so(tmp_path: Path, stored: torch.dtype) -> None:
    base = network(stored)
    (_, line) = merged(tmp_path, base, moved(base, 0.02))
    assert "cosine with the wanted one is 0.99" in line or "cosine with the wanted one is 1.00" in line
    with pytest.raises(ValueError, match="rounding leaves a change whose cosine"):
        merged(tmp_path, base, moved(base, 1e-5))


def test_the_worst_layers_are_named(tmp_path: Path) -> None:
    base = network()
    fine, coarse = moved(base, 1e-5), moved(base, 0.05)
    expert = {k: (fine if k == "layer.2.weight" else coarse)[k] for k in base}
    merged(tmp_path, base, expert, dtype="BF16")
    found = record_of(tmp_path / "m.safetensors")["delta"]
    assert found["cosine"] > 0.99
    assert next(iter(found["worst"])) == "layer.2.weight"
    assert found["worst"]["layer.2.weight"]["cosine"] < 0.5


@pytest.mark.parametrize("settings", [{"weights": [0.0]}, {"weights": [0.3]}, {"weights": [0.7], "method": "ties"}])
def test_no_wanted_change_is_none_lost(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = network()
    expert = moved(base, 0.1) if settings["weights"] == [0.0] else base
    merged(tmp_path, base, expert, dtype="BF16", **settings)
    assert record_of(tmp_path / "m.safetensors")["delta"] == {"cosine": 1.0, "unchanged": 0.0, "worst": {}}


def test_what_is_written_as_it_was_computed_reports_nothing(tmp_path: Path) -> None:
    base = network()
    assert len(merged(tmp_path, base, moved(base, 1e-6))) == 1
    assert "delta" not in record_of(tmp_path / "m.safetensors")


def test_a_folder_says_it_in_its_merge_json_and_repeats_to_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file(network(), tmp_path / "base/diffusion_pytorch_model.safetensors")
    expert = saved(tmp_path / "e.safetensors", moved(network(), 0.02))
    settings = Merge(weights=[0.5], dtype="BF16")
    list(merge_models(str(tmp_path / "base"), [expert], settings, tmp_path / "first"))
    assert json.loads((tmp_path / "first/merge.json").read_text())["delta"]["cosine"] > 0.95
    list(repeat_merge(tmp_path / "first/merge.json", tmp_path / "again"))
    contents = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("first", "again")]
    assert contents[0] == contents[1]


def test_the_command_prints_it_and_exits_with_2_where_too_little_is_left(tmp_path: Path) -> None:
    base = saved(tmp_path / "b.safetensors", network())
    expert = saved(tmp_path / "e.safetensors", moved(network(), 0.02))
    arguments = ["merge", str(base), str(expert), "--weights", "1", "--out", str(tmp_path / "m.safetensors")]
    arguments += ["--set", "dtype=BF16"]
    assert "rounding leaves a change" in CliRunner().invoke(cli.app, arguments).output
    refused = CliRunner().invoke(cli.app, [*arguments, "--set", "min_delta_cosine=1"])
    assert isinstance(refused.exception, ValueError)


@pytest.mark.parametrize(("method", "density"), [("linear", 1.0), ("ties", 0.7)])
def test_a_runs_merge_in_half_precision_reports_what_files_would(tmp_path: Path, method: str, density: float) -> None:
    base = {k: v.float() for k, v in network(torch.bfloat16).items()}
    experts = [moved(base, 0.02), moved(base, 1e-4, ("layer.1",))]

    def merger_of(dtype: torch.dtype) -> Merger:
        context_of = partial(Context, settings=Settings(density))
        return Merger(base, experts, method=method, context_of=context_of, dtype=dtype, device=torch.device("cpu"))

    paths = [saved(tmp_path / f"{i}.safetensors", e) for i, e in enumerate(experts)]
    given = Merge(weights=[0.5, 0.3], dtype="BF16", min_delta_cosine=-1, method=method, density=density)
    origin = saved(tmp_path / "base.safetensors", base)
    list(merge_models(str(origin), paths, given, tmp_path / "out.safetensors"))
    assert merger_of(torch.bfloat16).survival([0.5, 0.3]) == record_of(tmp_path / "out.safetensors")["delta"]
    assert merger_of(torch.float32).survival([0.5, 0.3]) is None


# -- overflow


@pytest.mark.parametrize(("weights", "dtype"), [([1.0], "F16"), ([2.0], None)])
def test_a_sum_beyond_the_dtype_is_an_error_that_names_the_key(
    tmp_path: Path, weights: list[float], dtype: str | None
) -> None:
    stored = torch.float32 if dtype else torch.float16
    base, expert = ({"a": torch.ones(4), "big": torch.full((4,), v, dtype=stored)} for v in (40_000.0, 60_000.0))
    expert["big"] = expert["big"].float() + (20_000.0 if dtype else 0.0)
    with pytest.raises(
        ValueError, match=r"big: the merge has values up to 8e\+04, and F16 holds none beyond 6.55e\+04"
    ):
        merged(tmp_path, base, expert, weights=weights, dtype=dtype)
    assert not (tmp_path / "m.safetensors").exists()
    merged(tmp_path, base, expert, weights=weights, dtype=dtype, allow_non_finite=True)
    assert load_file(tmp_path / "m.safetensors")["big"].isinf().all()


def test_float32_itself_may_overflow(tmp_path: Path) -> None:
    base, expert = {"w": torch.full((2,), -3e38)}, {"w": torch.full((2,), 3e38)}
    with pytest.raises(ValueError, match="w: the merge has values up to inf, and F32 holds none beyond"):
        merged(tmp_path, base, expert, weights=[2.0])


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(number: float) -> None:
    for given in ({"weights": [1.0, number]}, {"weights": [1.0], "blocks": {"a*": [number]}}):
        with pytest.raises(ValueError, match="Input should be a finite number"):
            Merge(**given)


@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0])
def test_fisher_information_that_is_none_is_refused_by_file_and_key(tmp_path: Path, number: float) -> None:
    base, fisher = network(), {k: torch.ones_like(v) for k, v in network().items()}
    fisher["layer.1.weight"][3, 3] = number
    path = saved(tmp_path / "fisher.safetensors", fisher)
    with pytest.raises(ValueError, match=r"fisher\.safetensors: layer\.1\.weight has NaN, infinity or numbers below 0"):
        merged(tmp_path, base, moved(base, 0.1), method="fisher", fishers=[path])
    saved(path, {k: v[:3] for k, v in fisher.items()})
    with pytest.raises(ValueError, match=r"layer\.0\.weight has shape \(3, 50\), expected \(40, 50\)"):
        merged(tmp_path, base, moved(base, 0.1), method="fisher", fishers=[path])
