"""Mixtures of networks: who runs for which t, from files of any kind, refused before compute where they don't fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from conftest import make_unet
from decouple_merge import load_ensemble
from decouple_merge.config import Config, Mixture, Sample, Text, load_mixture
from decouple_merge.config.document import dump
from decouple_merge.diffusion.process import Flow
from decouple_merge.diffusion.ranges import filled_ranges
from decouple_merge.diffusion.routing import RangeRouter
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.errors import UserError
from decouple_merge.models import ensemble as ensembles
from decouple_merge.models.base import load_base
from decouple_merge.models.families import FAMILIES
from decouple_merge.models.families.wan import save_wan
from decouple_merge.models.identity import base_parts
from decouple_merge.models.mixture import describe_mixture, open_mixture
from decouple_merge.models.network import num_parameters
from decouple_merge.sampling.model import open_model
from decouple_merge.sampling.sampler import Prompts, denoiser
from decouple_merge.storage.files import read_tensors, write_json, write_tensors

CPU = torch.device("cpu")
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
HALVES = [TimestepRange(0, 20), TimestepRange(20, 40)]


@pytest.fixture
def tiny_base(two_level_base: Path) -> Path:
    return two_level_base


def perturb(network: Any, seed: int) -> Any:
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p += 0.1 * torch.randn(p.shape, generator=draws)
    return network.eval()


def save(folder: Path, seed: int, scheduler: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Save a pipeline of random weights."""
    network = perturb(make_unet(**changes), seed)
    DDPMPipeline(network, DDPMScheduler(**{"num_train_timesteps": 40, **(scheduler or {})})).save_pretrained(folder)
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    key = "unet.mid_block.attentions.0.to_q"
    factors = {f"{key}.lora_A.weight": torch.randn(2, 16), f"{key}.lora_B.weight": torch.randn(16, 2)}
    write_tensors(tmp_path / "lora/pytorch_lora_weights.safetensors", factors)
    return tmp_path / "lora"


@pytest.fixture
def mixture(tiny_base: Path, tmp_path: Path, lora: Path) -> Path:
    """Four kinds of networks: a narrower one, a file, a LoRA, and the base on the rest."""
    narrow = save(tmp_path / "narrow", 1, block_out_channels=(4, 12))
    file = save(tmp_path / "same", 2) / "unet/diffusion_pytorch_model.safetensors"
    rows = [(30, 40, narrow), (0, 5, file), (5, 12, lora)]
    ranges = [{"low": low, "high": high, "model": str(model)} for low, high, model in rows]
    path = tmp_path / "mixture.yaml"
    path.write_text(dump({"base": str(tiny_base), "band": 4, "ranges": ranges, "rest": "base"}))
    return path


def test_shares_are_linear_in_t_within_the_band() -> None:
    router = RangeRouter(HALVES, 40, band=4)
    assert [dict(router.route(t)) for t in (18, 19, 20, 21, 22)] == [
        {0: 1.0},
        {0: 0.75, 1: 0.25},
        {0: 0.5, 1: 0.5},
        {0: 0.25, 1: 0.75},
        {1: 1.0},
    ]
    assert [dict(RangeRouter(HALVES, 40).route(t)) for t in (19, 20)] == [{0: 1.0}, {1: 1.0}]
    # Where both sides are one network there is nothing to hand over.
    assert router.route(20) != RangeRouter(HALVES, 40, [0, 0], 4).route(20) == [(0, 1.0)]


def test_what_is_left_is_the_rests_and_units_are_timesteps_in_the_end() -> None:
    parts = [(0.5, 0.75, "b"), (0, 0.25, "a")]
    found = filled_ranges(Flow(), "sigma", parts, "rest")
    assert [(r.low, r.high, name) for r, name in found] == [
        (0, 250, "a"),
        (250, 500, "rest"),
        (500, 750, "b"),
        (750, 1000, "rest"),
    ]


@torch.no_grad()
def test_predictions_are_interpolated_in_the_band(tiny_base: Path, tmp_path: Path) -> None:
    models = [save(tmp_path / "clean", 1), save(tmp_path / "noisy", 2)]
    clean, noisy = load_ensemble(tiny_base, models).networks
    for one_resident in (False, True):
        ensemble = load_ensemble(tiny_base, models, one_resident=one_resident, band=8)
        expected = 0.75 * clean(X, 18).sample + 0.25 * noisy(X, 18).sample
        torch.testing.assert_close(ensemble(X, 18).sample, expected)
        assert torch.equal(ensemble(X, torch.tensor([18, 30])).sample[1], noisy(X, 30).sample[1])


@torch.no_grad()
def test_networks_of_any_size_file_or_adapter_take_turns(mixture: Path, tiny_base: Path, lora: Path) -> None:
    every, one = load_ensemble(mixture), load_ensemble(mixture, one_resident=True)
    assert [type(n).__name__ for n in every.networks] == ["UNet2DModel"] * 4
    file, adapted, base, narrow = every.networks
    stock: Any = DDPMPipeline.from_pretrained(tiny_base).unet
    assert torch.equal(every(X, 25).sample, stock(X, 25).sample)
    factors, _ = read_tensors(lora / "pytorch_lora_weights.safetensors")
    down, up = (factors[f"unet.mid_block.attentions.0.to_q.lora_{part}.weight"] for part in "AB")
    stock.mid_block.attentions[0].to_q.weight += up @ down
    torch.testing.assert_close(every(X, 8).sample, stock(X, 8).sample)
    assert narrow.config.block_out_channels != base.config.block_out_channels
    for t, network in ((1, file), (8, adapted), (20, base), (35, narrow), (0, file)):
        assert torch.equal(every(X, t).sample, network(X, t).sample)
        assert torch.equal(one(X, t).sample, network(X, t).sample)
        assert num_parameters(one) == num_parameters(network)  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "depth"),
    [
        ("StableDiffusionPipeline", "layers_per_block"),
        ("DiTPipeline", "num_layers"),
        ("StableDiffusion3Pipeline", "num_layers"),
        ("FluxPipeline", "num_layers"),
        ("ZImagePipeline", "n_layers"),
        ("WanPipeline", "num_layers"),
    ],
)
def test_a_deeper_network_hands_over_to_the_base_in_every_family(kind: str, depth: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    if kind == "WanPipeline":
        save_wan(folder, boundary_ratio=None)
    else:
        FAMILIES[kind].save_tiny(folder)
    base = load_base(str(folder))
    config = dict(base.network.config)
    perturbed = perturb(type(base.network).from_config(config | {depth: config[depth] + 1}), 1)
    perturbed.save_pretrained(tmp_path / "deeper")
    middle, width = base.num_train_timesteps / 2, base.num_train_timesteps / 5
    ranges = [(0, middle), (middle, base.num_train_timesteps)]
    ensemble = load_ensemble(folder, [tmp_path / "deeper", "base"], ranges, band=width)
    texts = ["0", "1"] if kind == "DiTPipeline" else ["one cat", "sun"]
    prompts = Prompts(base.encoders, texts, Text(guidance_scale=1), CPU)  # type: ignore[arg-type]
    x = torch.randn(2, *base.shape, generator=torch.Generator().manual_seed(0))

    def says(network: Any, t: float) -> Tensor:
        return prompts.guide(denoiser(base, network), [0, 1])(x, t)

    deeper, own = ensemble.networks
    for share in (0.0, 0.25, 0.5):
        t = middle - width / 2 + share * width
        expected = (1 - share) * says(deeper, t) + share * says(own, t)
        torch.testing.assert_close(says(ensemble, t), expected, atol=1e-4, rtol=1e-4)
    assert (says(deeper, middle) - says(own, middle)).abs().max() > 0.01
    both = says(ensemble, torch.tensor([middle / 4, middle * 1.75]))  # type: ignore[arg-type]
    assert torch.equal(both[0], says(deeper, torch.tensor([middle / 4, middle * 1.75]))[0])  # type: ignore[arg-type]


def drawn(name: str, **settings: Any) -> Tensor:
    opened = open_model(name, Sample(num_steps=8, batch_size=2, **settings), Text())
    return next(opened.draw([3, 4], CPU))


def test_a_mixtures_file_is_opened_as_a_model_and_draws_what_a_stock_pipeline_draws_with_it(
    mixture: Path, tiny_base: Path
) -> None:
    found = drawn(str(mixture))
    assert torch.equal(found, drawn(str(mixture), one_resident=True))
    pipeline: Any = DDIMPipeline.from_pretrained(tiny_base)
    pipeline.unet = load_ensemble(mixture, one_resident=True)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    images = pipeline(2, generator=generators, num_inference_steps=8, output_type="np").images
    assert (torch.from_numpy(images).permute(0, 3, 1, 2) * 255 - found).abs().max() <= 1
    lines = list(describe_mixture(mixture))
    assert lines[0].endswith("4 networks of " + str(tiny_base) + ", a DDPMPipeline, on [0, 40) in timesteps, band 4")
    assert [line.split(",")[0:2] for line in lines[1:5]] == [
        ["timesteps [0", f" {end})"] if low == 0 else [f"timesteps [{low}", f" {end})"]
        for low, end in ((0, 5), (5, 12), (12, 30), (30, 40))
    ]


def test_the_hash_of_a_mixture_is_of_all_that_it_draws_with(mixture: Path, tmp_path: Path) -> None:
    settings = load_mixture(mixture)
    hashes = {
        open_mixture(settings.model_copy(update=changes)).sha256
        for changes in ({}, {"band": 2}, {"rest": settings.ranges[1].model}, {"ranges": settings.ranges[:2]})
    }
    assert len(hashes) == 4
    assert open_mixture(load_mixture(mixture)).sha256 in hashes


def test_the_next_networks_files_are_read_ahead(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead: list[str] = []
    monkeypatch.setattr(ensembles, "read_ahead", lambda paths: ahead.append(paths[-1].parent.name))
    ensemble = load_ensemble(mixture, one_resident=True)
    with torch.no_grad():
        for t in (35, 34, 20, 8, 1, 0):
            ensemble(X, t)
    # Of the base, the LoRA and the file; while the last one runs there is none.
    assert ahead == ["unet", "lora", "unet"]


def test_an_experts_record_says_its_schedule(tiny_base: Path, tmp_path: Path) -> None:
    same = save(tmp_path / "same", 1) / "unet/diffusion_pytorch_model.safetensors"
    folder = tmp_path / "expert"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(same.read_bytes())
    record = {"class": "DDPMScheduler", **DDPMScheduler(num_train_timesteps=40).config}
    write_json(folder / "expert.json", {"base": {"scheduler": record}})
    load_ensemble(tiny_base, [folder, "base"])
    write_json(folder / "expert.json", {"base": {"scheduler": record | {"beta_schedule": "scaled_linear"}}})
    with pytest.raises(ValueError, match="expert has another ᾱ_t than the base; expected networks for one schedule"):
        load_ensemble(tiny_base, [folder, "base"])


@pytest.mark.parametrize(("ranges", "band"), [([(5, 2), (20, 40)], 0), ([(0, 20), (20, 40)], -1)])
def test_ranges_and_bands_that_are_none_are_a_users_error(
    tiny_base: Path, ranges: list[tuple[int, int]], band: int
) -> None:
    with pytest.raises(UserError, match=r"^load_ensemble"):
        load_ensemble(tiny_base, ["base", "base"], ranges, band=band)


ROWS = [(0, 20, "base"), (20, 40, "base")]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([(0, 25, "base"), (20, 40, "base")], {}, r"ranges \[0, 25\) and \[20, 40\) overlap, expected a network for"),
        (
            [(0, 20, "base")],
            {},
            r"no range holds \[20, 40\), expected a partition of \[0, 40\); add one, or rest: base",
        ),
        ([(5, 40, "base")], {}, r"no range holds \[0, 5\)"),
        ([(0, 41, "base")], {}, r"a range ends at 41, expected at most 40, the end of the base's schedule"),
        ([(0, 2.5, "base")], {"rest": "base"}, "expected whole timesteps"),
        (ROWS, {"band": 21}, r"band is 21 timesteps and the range \[0, 20\) has 20, expected a band no wider"),
        (ROWS, {"unit": "sigma"}, "the mixture has the unit sigma, which is a flow's"),
        ([(0, 20, "rgb")], {"rest": "base"}, "rgb: its in_channels is 3, of the base 1; expected networks that read"),
        ([(0, 20, "large")], {"rest": "base"}, "large: its sample_size is 16, of the base 8"),
        ([(0, 20, "v")], {"rest": "base"}, "v predicts v_prediction, and the base epsilon; expected networks for one"),
        ([(0, 20, "long")], {"rest": "base"}, "long has 50 timesteps, and the base 40"),
        ([(0, 20, "flow")], {"rest": "base"}, "flow is trained by a Flow process, and the base by VP"),
        (
            [(0, 20, "damaged")],
            {"rest": "base"},
            r"damaged/unet/diffusion_pytorch_model\.safetensors.*(trunc|damaged|incomplete)",
        ),
        ([(0, 20, "nothing")], {"rest": "base"}, "'nothing' is no path here .* and no base that we ship"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Any],
    settings: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make = {
        "rgb": lambda: save(Path("rgb"), 0, in_channels=3, out_channels=3),
        "large": lambda: save(Path("large"), 0, sample_size=16),
        "v": lambda: save(Path("v"), 0, {"prediction_type": "v_prediction"}),
        "long": lambda: save(Path("long"), 0, {"num_train_timesteps": 50}),
        "flow": lambda: DDPMPipeline(make_unet(), FlowMatchEulerDiscreteScheduler(40)).save_pretrained("flow"),  # type: ignore[arg-type]
        "damaged": lambda: save(Path("damaged"), 0),
    }
    make.get(rows[0][2], lambda: None)()
    if rows[0][2] == "damaged":
        file = Path("damaged/unet/diffusion_pytorch_model.safetensors")
        file.write_bytes(file.read_bytes()[:-100])
    ranges = [{"low": low, "high": high, "model": model} for low, high, model in rows]
    with pytest.raises(ValueError, match=message) as refused:
        open_mixture(Mixture.model_validate({"base": str(tiny_base), "ranges": ranges, **settings}))
    assert "\n" not in str(refused.value)


def test_a_folder_called_base_is_no_other_name_for_the_mixtures_base(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    save(folder / "base", 3)
    (folder / "mixture.yaml").write_text(
        dump({"base": str(tiny_base), "ranges": [{"low": 0, "high": 40, "model": "./base"}]})
    )
    monkeypatch.chdir(folder)
    found = load_ensemble(Path("mixture.yaml")).networks[0].state_dict()
    own = DDPMPipeline.from_pretrained(folder / "base").unet.state_dict()
    assert all(torch.equal(found[key], own[key]) for key in own)


@pytest.mark.parametrize(
    ("changes", "message"), [({"sample_size": 16}, "its sample_size is 16"), ({"norm_num_groups": 2}, "")]
)
def test_an_expert_with_the_bases_keys_has_its_own_runs_architecture(
    tiny_base: Path,
    tmp_path: Path,
    tiny_config: Callable[..., Config],
    changes: dict[str, Any],
    message: str,
) -> None:
    other, config = save(tmp_path / "other", 1, **changes), tiny_config()
    run = tmp_path / "run"
    base = load_base(str(other))
    write_tensors(run / "experts/0/model.safetensors", {k: v.clone() for k, v in base.network.state_dict().items()})
    write_json(run / "experts/0/expert.json", {"own": {"low": 0, "high": 20}, "base": base_parts(base)})
    (run / "config.yaml").write_text(dump(config.model_dump(mode="json") | {"base": str(other)}))
    ranges = [{"low": 0, "high": 20, "model": str(run / "experts/0")}]
    settings = Mixture.model_validate({"base": str(tiny_base), "ranges": ranges, "rest": "base"})
    if message:
        with pytest.raises(ValueError, match=message):
            open_mixture(settings)
        return
    member = open_mixture(settings).members[0]
    assert member.base.network.config.norm_num_groups == changes["norm_num_groups"]


def test_an_unknown_key_is_named(mixture: Path) -> None:
    zoo = mixture.with_name("zoo.yaml")
    zoo.write_text("base: b\nmodels: {a: base}\n")
    with pytest.raises(ValueError, match=r"zoo\.yaml has models and no ranges, as a zoo: give it to deme schedule"):
        open_model(str(zoo), Sample(), Text())
    mixture.write_text(mixture.read_text() + "boundary: 3\n")
    with pytest.raises(ValueError, match=r"mixture .*yaml: unknown key 'boundary'; the nearest valid key is"):
        load_mixture(mixture)
