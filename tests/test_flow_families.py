"""Flow-matching transformers against their stock pipelines in diffusers, and the whole job on each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FluxPipeline
from torch import Tensor

from conftest import stock_images
from decouple_merge.config import Config, Sample, Text
from decouple_merge.diffusion.process import Flow
from decouple_merge.experiment import workflow
from decouple_merge.models.base import load_base
from decouple_merge.models.families import FAMILIES
from decouple_merge.models.families.flux import pack, save_flux, tiny_flux, unpack
from decouple_merge.models.families.sd3 import save_sd3
from decouple_merge.models.families.z_image import save_z_image
from decouple_merge.models.mixture import load_ensemble
from decouple_merge.models.schedulers import make_scheduler
from decouple_merge.sampling.sampler import Prompts, denoiser, sample_images
from decouple_merge.storage.files import read_tensors

SAMPLER = "FlowMatchEulerDiscrete"
CPU = torch.device("cpu")
WORDS = ["red cat", "blue dog"]
KINDS: dict[str, Callable[[Path], Path]] = {
    "sd3": save_sd3,
    "sd3 without T5": lambda folder: save_sd3(folder, has_t5=False),
    "sd3 of dynamic shift": lambda folder: save_sd3(folder, use_dynamic_shifting=True),
    "flux dev": save_flux,
    "flux schnell": lambda folder: save_flux(folder, tiny_flux(guidance_embeds=False), use_dynamic_shifting=False),
    "z_image": FAMILIES["ZImagePipeline"].save_tiny,
    "z_image of dynamic shift": lambda folder: save_z_image(folder, use_dynamic_shifting=True),
}


def stock_arguments(kind: str, guidance: float) -> dict[str, Any]:
    """Name guidance as the stock pipeline does."""
    if kind.startswith("z_image"):
        return {"guidance_scale": guidance - 1}
    return {} if kind == "flux schnell" else {"guidance_scale": guidance}


def missing(kind: str) -> dict[str, None]:
    """List what stock diffusers wants to be told that there is none of."""
    return {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3 without T5" else {}


def drawn(folder: Path, seeds: list[int], guidance: float, num_steps: int = 4) -> Tensor:
    base = load_base(str(folder))
    assert base.encoders is not None
    prompts = Prompts(base.encoders, WORDS, Text(guidance_scale=guidance), CPU, first_seed=seeds[0])
    settings = Sample(sampler=SAMPLER, num_steps=num_steps)
    return next(sample_images(denoiser(base, base.network), base, seeds, settings, CPU, prompts=prompts))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_stock_pipeline_draws_the_same_images(kind: str, guidance: float, tmp_path: Path) -> None:
    if kind == "flux schnell" and guidance != 1:
        with pytest.raises(ValueError, match="guidance_scale is 3, which leads away"):
            drawn(KINDS[kind](tmp_path / "base"), [3, 4], guidance)
        return
    folder = KINDS[kind](tmp_path / "base")
    arguments = {"num_inference_steps": 4, "height": 16, "width": 16, **stock_arguments(kind, guidance)}
    expected = torch.as_tensor(stock_images(folder, WORDS, [3, 4], missing(kind), **arguments)).permute(0, 3, 1, 2)
    assert float(expected.std()) > 0.01
    found = drawn(folder, [3, 4], guidance).float()
    assert float((found - 255 * expected).abs().max()) <= 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_the_scheduler_visits_what_the_stock_pipeline_visits(kind: str, tmp_path: Path) -> None:
    folder = KINDS[kind](tmp_path / "base")
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, **missing(kind))
    pipeline.set_progress_bar_config(disable=True)
    given: list[Tensor] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(kwargs["timestep"] if "timestep" in kwargs else args[1])

    pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    pipeline(WORDS[0], height=16, width=16, num_inference_steps=5, output_type="latent")
    base = load_base(str(folder))
    t = make_scheduler(base, SAMPLER, 5, None).timesteps
    found = torch.stack([base.family.timestep_of(one).double()[0] for one in given])
    torch.testing.assert_close(found, t.double(), rtol=0, atol=1e-3)
    # What the ensemble dispatches by: the first step, σ = 1, is in the noisiest range.
    assert all(0 <= float(base.timestep_of(one)[0]) < 1000 for one in given)
    assert isinstance(base.process, Flow)


def test_packing_is_that_of_the_stock_pipeline() -> None:
    x = torch.randn(2, 3, 6, 4)
    torch.testing.assert_close(pack(x), FluxPipeline._pack_latents(x, 2, 3, 6, 4))
    assert torch.equal(unpack(pack(x), 6, 4), x)


def whole_config(base: Path, captioned: Path, text_config: Callable[..., Config], **sections: Any) -> Config:
    finetune = {"num_updates": 2, "validate_every": 1, **sections.pop("finetune", {})}
    guidance = 1.0 if "schnell" in str(base) else 2.0
    return text_config(
        base=str(base),
        finetune=finetune,
        sample={"sampler": SAMPLER, "num_steps": 2},
        text={"guidance_scale": guidance},
        search={"num_trials": 2, "num_images": 4, "gradient_batches": 1, "num_finalists": 0},
        evaluate={"num_images": 4, "num_seed_sets": 1, "num_sample_images": 1},
        **sections,
    )


@pytest.mark.parametrize("family", ["StableDiffusion3Pipeline", "FluxPipeline", "ZImagePipeline"])
@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_a_whole_run_ends_in_a_stock_pipeline(
    family: str, is_lora: bool, tiny_captioned: Path, text_config: Callable[..., Config], tmp_path: Path
) -> None:
    folder = FAMILIES[family].save_tiny(tmp_path / "base")
    changes: dict[str, Any] = {"lora": {"rank": 2}, "projection": {"placement": "none"}} if is_lora else {}
    if is_lora:
        pytest.importorskip("peft", reason="peft isn't installed")
    config = whole_config(folder, tiny_captioned, text_config, finetune=changes)
    list(workflow.run(config, tmp_path / "run"))
    base, merged = load_base(str(folder)), load_base(str(tmp_path / "run/merged"))
    stock = {key: (value.shape, value.dtype) for key, value in base.network.state_dict().items()}
    assert {key: (value.shape, value.dtype) for key, value in merged.network.state_dict().items()} == stock
    # Two candidates may both be worse than the base, and the merge then is the base.
    expert, _ = read_tensors(tmp_path / "run/experts/0/model.safetensors")
    assert {key: value.shape for key, value in expert.items()} == {key: shape for key, (shape, _) in stock.items()}
    assert any(not torch.equal(value, base.network.state_dict()[key]) for key, value in expert.items())
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "run/merged")
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}
    seed = torch.Generator().manual_seed(0)
    assert pipeline(WORDS[0], generator=seed, **arguments).images.shape == (1, 16, 16, 3)
    if is_lora:
        pipeline.load_lora_weights(tmp_path / "run/merged-lora")
    else:
        # Stock pipelines draw with the ensemble, by what they give the network as its timestep.
        pipeline.transformer = load_ensemble(tmp_path / "run")
        assert pipeline(WORDS[0], **arguments).images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_missing_text_encoders_are_refused_by_name(part: str, tmp_path: Path) -> None:
    folder = save_sd3(tmp_path / "base")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {part: [None, None]}))
    with pytest.raises(ValueError, match=rf"its {part} is null in model_index.json, expected StableDiffusion3Pipeline"):
        load_base(str(folder))


def test_a_network_trained_by_flow_matching_refuses_a_table_of_timesteps(tmp_path: Path) -> None:
    folder = save_sd3(tmp_path / "base")
    DDIMScheduler().save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"][1] = "DDIMScheduler"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="whose schedule is a table of ᾱ_t, and a SD3Transformer2DModel is trained by"):
        load_base(str(folder))
