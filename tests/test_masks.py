"""Experts as one bit an entry: bits come back, scales are those of least squares, and the files are small."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from decouple_merge import load_ensemble
from decouple_merge.config import Config, Merge
from decouple_merge.errors import UserError
from decouple_merge.experiment.finetuning import finetune_experts
from decouple_merge.experiment.plan import prepare
from decouple_merge.merging.masks import MaskedExpert, Pattern, open_masked, pack, unpack, write_masks
from decouple_merge.merging.recipes import merge_models
from decouple_merge.storage.tensors import TensorFiles

Tensors = dict[str, Tensor]


@pytest.fixture
def tiny_base(two_level_base: Path) -> Path:
    return two_level_base


def network(seed: int, size: float = 1.0) -> Tensors:
    draws = torch.Generator().manual_seed(seed)
    shapes = {"conv.weight": (16, 8, 3, 3), "conv.bias": (16,), "norm.weight": (7,)}
    return {key: size * torch.randn(shape, generator=draws) for key, shape in shapes.items()}


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, list[Path]]:
    """Save a base and two experts with the ranges of a run."""
    base = network(0)
    save_file(base, tmp_path / "base.safetensors")
    experts = []
    for index in (0, 1):
        folder = tmp_path / f"experts/{index}"
        folder.mkdir(parents=True)
        save_file({k: base[k] + v for k, v in network(index + 1, 0.01).items()}, folder / "model.safetensors")
        experts.append(folder)
    return tmp_path / "base.safetensors", experts


def merged(models: tuple[Path, list[Path]], out: Path, weights: list[float], ranged: bool = True) -> Path:
    base, experts = models
    if ranged:
        for index, folder in enumerate(experts):
            own = {"low": 500 * index, "high": 500 * (index + 1)}
            sha256 = TensorFiles([base]).sha256()
            (folder / "expert.json").write_text(json.dumps({"own": own, "base_sha256": sha256}))
    list(merge_models(str(base), experts, Merge(method="emr", weights=weights), out))
    return out


def opened(path: Path, base: Path) -> MaskedExpert:
    found = open_masked(path, TensorFiles([base]), {})
    assert found is not None
    return found


@given(st.lists(st.booleans(), max_size=200))
def test_bits_come_back(bits: list[bool]) -> None:
    packed = pack(torch.tensor(bits, dtype=torch.bool))
    assert packed.numel() in range(len(bits) // 8, len(bits) // 8 + 9, 1)
    assert packed.numel() % 8 == 0
    assert unpack(packed, len(bits)).tolist() == bits


def test_the_first_bit_is_the_lowest() -> None:
    assert pack(torch.tensor([True, False, False, True, False, False, False, False, True])).tolist()[:2] == [9, 1]


@pytest.mark.parametrize("pattern", ["mask", "sign"])
def test_an_expert_is_its_pattern_at_the_scale_of_least_squares(
    pattern: Pattern, models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    place = merged(models, tmp_path / "merged.safetensors", [1, 1])
    list(write_masks(place, tmp_path / "masks", pattern))
    base, together = load_file(models[0]), load_file(place)
    for index, folder in enumerate(models[1]):
        expert, found = (
            load_file(folder / "model.safetensors"),
            opened(tmp_path / f"masks/{index}.safetensors", models[0]),
        )
        for key in base:
            own, moved = (expert[key] - base[key]).double(), (together[key] - base[key]).double()
            masked = torch.where(own.sign() == moved.sign(), moved, 0.0)
            patterned = masked if pattern == "mask" else own.sign()
            scale = torch.linalg.lstsq(patterned.reshape(-1, 1), own.reshape(-1, 1)).solution.item()
            torch.testing.assert_close(found[key], (base[key] + scale * patterned).float(), rtol=1e-5, atol=1e-6)


def test_the_masks_of_one_experts_own_merge_give_that_expert(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    place = merged(models, tmp_path / "merged.safetensors", [1, 0])
    list(write_masks(place, tmp_path / "masks"))
    expert, found = load_file(models[1][0] / "model.safetensors"), opened(tmp_path / "masks/0.safetensors", models[0])
    for key in expert:
        torch.testing.assert_close(found[key], expert[key], rtol=0, atol=1e-6)


def test_a_mask_is_a_thirtysecond_of_a_copy(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    place = merged(models, tmp_path / "merged.safetensors", [1, 1])
    list(write_masks(place, tmp_path / "masks"))
    entries = TensorFiles([tmp_path / "masks/0.safetensors"]).entries
    assert entries["conv.weight.bits"].shape[0] * 32 == 16 * 8 * 3 * 3 * 4


def test_an_expert_that_changes_nothing_is_the_base(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base = load_file(models[0])
    save_file(base, models[1][1] / "model.safetensors")
    list(write_masks(merged(models, tmp_path / "merged.safetensors", [1, 1]), tmp_path / "masks"))
    found = opened(tmp_path / "masks/1.safetensors", models[0])
    assert all(torch.equal(found[key], base[key]) for key in base)


def test_what_masks_cannot_be_made_of_or_drawn_with_is_refused(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    plain = merged(models, tmp_path / "plain.safetensors", [1, 1], ranged=False)
    with pytest.raises(UserError, match="without ranges of timesteps, expected those of a run"):
        list(write_masks(plain, tmp_path / "masks"))
    place = merged(models, tmp_path / "merged.safetensors", [1, 1])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.txt"):
        list(write_masks(place, tmp_path / "other"))
    list(write_masks(place, tmp_path / "masks"))
    file = tmp_path / "masks/0.safetensors"

    def files(tensors: Tensors) -> TensorFiles:
        save_file(tensors, tmp_path / "changed.safetensors")
        return TensorFiles([tmp_path / "changed.safetensors"])

    base = load_file(models[0])
    with pytest.raises(UserError, match=r"was made with another base than the mixture's; give that one"):
        open_masked(file, files({key: value + 1 for key, value in base.items()}), {})
    with pytest.raises(UserError, match=r"conv.bias.bits fits no tensor of the base"):
        open_masked(file, files({k: v[:1, :1].contiguous() for k, v in base.items() if v.ndim > 1}), {})
    with pytest.raises(UserError, match=r"conv.weight.bits fits no tensor of the base"):
        open_masked(file, files({key: value[:1].contiguous() for key, value in base.items()}), {})
    save_file({}, tmp_path / "old.safetensors", {"mask": json.dumps({"pattern": "sign"})})
    with pytest.raises(UserError, match=r"old\.safetensors was made with another base"):
        open_masked(tmp_path / "old.safetensors", TensorFiles([models[0]]), {})
    assert open_masked(models[0], TensorFiles([models[0]]), {}) is None
    merged(models, place, [1, -1])
    with pytest.raises(UserError, match="masks of another merge"):
        open_masked(file, TensorFiles([models[0]]), {})
    place.unlink()
    with pytest.raises(UserError, match="which is gone: put it back"):
        open_masked(file, TensorFiles([models[0]]), {})


def test_experts_that_are_not_what_was_merged_are_refused(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    place = merged(models, tmp_path / "merged.safetensors", [1, 1])
    save_file(network(9), models[1][1] / "model.safetensors")
    with pytest.raises(UserError, match="experts/1 is not what the recipe was made with"):
        list(write_masks(place, tmp_path / "masks"))


def test_experts_with_a_gap_leave_it_to_the_base_and_those_that_overlap_are_refused(
    models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    place = merged(models, tmp_path / "merged.safetensors", [1, 1])
    list(write_masks(place, tmp_path / "masks"))
    assert "rest: base" in (tmp_path / "masks/mixture.yaml").read_text()
    record = models[1][1] / "expert.json"
    record.write_text(record.read_text().replace('"low": 500', '"low": 400'))
    list(merge_models(str(models[0]), models[1], Merge(weights=[1, 1]), tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="whose ranges overlap, up to 500, from 400 on; expected one expert for each"):
        list(write_masks(tmp_path / "other.safetensors", tmp_path / "others"))


def test_a_mixture_draws_with_bits_and_moves_with_its_folder(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = tiny_config(finetune={"baseline": False}, search={"num_finalists": 0})
    folder = tmp_path / "run"
    for _ in finetune_experts(prepare(config, folder)):
        pass
    experts = [folder / "experts/0", folder / "experts/1"]
    list(merge_models(config.base, experts, Merge(method="emr", weights=[1, 1]), tmp_path / "here/elected"))
    lines = [line for line in write_masks(tmp_path / "here/elected", tmp_path / "here/masks") if isinstance(line, str)]
    (tmp_path / "here").rename(tmp_path / "there")
    ensemble = load_ensemble(tmp_path / "there/masks/mixture.yaml", one_resident=True)
    base = load_file(Path(config.base) / "unet/diffusion_pytorch_model.safetensors")
    for index, own in enumerate(ensemble.router.ranges):
        ensemble(torch.zeros(1, 1, 8, 8), torch.tensor(own.low))
        held = dict(ensemble.networks[0].state_dict())
        expert = load_file(experts[index] / "model.safetensors")
        left = sum(float((held[k] - expert[k]).square().sum()) for k in base)
        whole = sum(float((base[k] - expert[k]).square().sum()) for k in base)
        assert f"expert {index}: |expert - its bits| / |expert - base| = {(left / whole) ** 0.5:.3f}" in lines
        assert 0.1 < left / whole < 0.8
