"""Flow-matching transformers against their stock pipelines in diffusers, and the whole job on each."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FluxPipeline
from PIL import Image
from torch import Tensor

from conftest import stock_images
from decouple_merge.config import Config, Sample, Text
from decouple_merge.data.latents import open_texts
from decouple_merge.diffusion.process import Flow
from decouple_merge.experiment import workflow
from decouple_merge.models.base import load_base
from decouple_merge.models.families import FAMILIES
from decouple_merge.models.families.flux import pack, save_flux, tiny_flux, unpack
from decouple_merge.models.families.sd3 import save_sd3
from decouple_merge.models.families.z_image import save_z_image
from decouple_merge.models.mixture import load_ensemble
from decouple_merge.models.schedulers import make_scheduler
from decouple_merge.sampling.folder import drawn_from
from decouple_merge.sampling.sampler import Prompts, denoiser, sample_images
from decouple_merge.storage.files import read_tensors

SAMPLER = "FlowMatchEulerDiscrete"
CPU = torch.device("cpu")
WORDS = ["red cat", "blue dog"]
KIND_OF = {"StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux dev", "ZImagePipeline": "z_image"}
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_on_an_edge_stays_above_it_where_the_pipeline_rounds_it(dtype: torch.dtype, tmp_path: Path) -> None:
    base = load_base(str(KINDS["flux dev"](tmp_path / "base")))
    for shift in (1.0, 3.0, math.exp(1.15)):
        edges = [1000 * shift * u / (1 + (shift - 1) * u) for u in (0.25, 0.5, 0.75)]
        seen = base.timestep_of((torch.tensor(edges) / 1000).to(dtype)).tolist()
        assert all(edge <= t < edge * 1.01 for edge, t in zip(edges, seen, strict=True))


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
        # Whatever the search finds, the merge is not the base.
        search={"num_trials": 5, "num_images": 4, "num_finalists": 0, "gradient_batches": 0, "frozen": {0: 1.0}},
        evaluate={"num_images": 4, "num_seed_sets": 1, "num_sample_images": 1},
        **sections,
    )


@pytest.mark.parametrize("family", ["StableDiffusion3Pipeline", "FluxPipeline", "ZImagePipeline"])
@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_a_whole_run_ends_in_a_stock_pipeline(
    family: str, is_lora: bool, tiny_captioned: Path, text_config: Callable[..., Config], tmp_path: Path
) -> None:
    folder = FAMILIES[family].save_tiny(tmp_path / "base")
    changes: dict[str, Any] = {}
    if is_lora:
        changes = {"lora": {"rank": 2}, "projection": {"placement": "none"}, "learning_rate": 0.1}
        pytest.importorskip("peft", reason="peft isn't installed")
    config = whole_config(folder, tiny_captioned, text_config, finetune=changes)
    list(workflow.run(config, tmp_path / "run"))
    base, merged = load_base(str(folder)), load_base(str(tmp_path / "run/merged"))
    stock = {key: (value.shape, value.dtype) for key, value in base.network.state_dict().items()}
    assert {key: (value.shape, value.dtype) for key, value in merged.network.state_dict().items()} == stock
    expert, _ = read_tensors(tmp_path / "run/experts/0/model.safetensors")
    assert {key: value.shape for key, value in expert.items()} == {key: shape for key, (shape, _) in stock.items()}
    assert any(not torch.equal(value, base.network.state_dict()[key]) for key, value in expert.items())
    shown = tmp_path / "run/samples/ensemble/0.png"
    prompts = [(drawn_from(shown) or {})["prompt"]]
    arguments = {"height": 16, "width": 16, "num_inference_steps": 2, **stock_arguments(KIND_OF[family], 2.0)}
    pipeline: Any = DiffusionPipeline.from_pretrained(folder).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if is_lora:
        pipeline.load_lora_weights(tmp_path / "run/merged-lora")
    else:
        # Stock pipelines draw with the ensemble, by what they give the network as its timestep.
        pipeline.transformer = load_ensemble(tmp_path / "run")
    seed = [torch.Generator().manual_seed(0)]
    # A copy: some pipelines write into the list.
    found = pipeline([*prompts], generator=seed, output_type="np", **arguments).images
    plain, together = (stock_images(at, prompts, [0], **arguments) for at in (folder, tmp_path / "run/merged"))
    assert abs(together - plain).max() > 0.01
    expected = together if is_lora else np.asarray(Image.open(shown)) / 255
    assert abs(found - expected).max() <= 1 / 255
    assert abs(found - plain).max() > 0.01


def test_pipelines_that_share_text_encoders_share_no_guidance(tmp_path: Path) -> None:
    dev, schnell = KINDS["flux dev"](tmp_path / "dev"), KINDS["flux schnell"](tmp_path / "schnell")
    for part in ("text_encoder", "text_encoder_2"):
        shutil.rmtree(schnell / part)
        shutil.copytree(dev / part, schnell / part)
    found = {}
    for folder in (dev, schnell):
        encoders = load_base(str(folder)).encoders
        assert encoders is not None
        found[folder] = open_texts(encoders, WORDS, "fp32", CPU).embed(WORDS)
    assert found[dev].keys() - found[schnell].keys() == {"guidance"}
    assert torch.equal(found[dev]["encoder_hidden_states"], found[schnell]["encoder_hidden_states"])


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
