"""Tiny models, data and configs: everything is built here, nothing is fetched."""

import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from decouple_merge.config import Config
from decouple_merge.training import loop


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep reference statistics of tests apart from the user's, and two busy cores from fighting."""
    monkeypatch.setenv("DEME_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Reset Accelerate, which keeps the precision for the whole process: one test's must not decide another's."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def every_record(fresh_accelerator: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have trainings yield every record, not one in a while."""
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_RECORDS", 0.0)


def make_unet(**changes: Any) -> UNet2DModel:
    """Build a UNet2DModel of a few thousand parameters, 8×8 grey unless told otherwise."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
    }
    return UNet2DModel(**(arguments | changes))


@pytest.fixture
def tiny_base(tmp_path: Path) -> Path:
    """The folder of a tiny DDPM pipeline, T = 40."""
    folder = tmp_path / "base"
    DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=40)).save_pretrained(folder)
    return folder


def make_text_unet(**changes: Any) -> UNet2DConditionModel:
    """Build a UNet2DConditionModel of some ten thousand parameters, for latents of 4 channels and 8×8."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(arguments | changes))


def save_stable_diffusion(
    folder: Path,
    unet: UNet2DConditionModel | None = None,
    width: int = 16,
    latent_channels: int = 4,
    parts_dtype: torch.dtype = torch.float32,
    vocabulary_size: int | None = None,
    **scheduler: Any,
) -> Path:
    """Save a StableDiffusionPipeline of random parts: 16×16 images, letters as vocabulary, T = 40."""
    # Imported here, since this takes seconds that most tests needn't pay.
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(1)
    tokenizer, text_config = make_text_parts(folder, width, vocabulary_size)
    vae = make_vae(latent_channels)
    arguments = {"num_train_timesteps": 40, "beta_schedule": "scaled_linear", "steps_offset": 1, "skip_prk_steps": True}
    StableDiffusionPipeline(
        vae.eval().to(parts_dtype),
        CLIPTextModel(text_config).eval().to(parts_dtype),
        tokenizer,
        unet or make_text_unet(),
        PNDMScheduler(**(arguments | scheduler)),
        None,
        None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_text_parts(folder: Path, width: int, vocabulary_size: int | None = None, **changes: Any) -> tuple[Any, Any]:
    """Build CLIP's tokenizer with letters as vocabulary, and the config of a text encoder."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [*string.ascii_lowercase, *(c + "</w>" for c in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    arguments: dict[str, Any] = {
        "vocab_size": vocabulary_size or len(vocabulary),
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
        "pad_token_id": vocabulary["<|endoftext|>"],
    }
    return tokenizer, CLIPTextConfig(**(arguments | changes))


def make_vae(latent_channels: int = 4, **changes: Any) -> AutoencoderKL:
    """Build an AutoencoderKL for colour images of 16×16."""
    arguments: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "latent_channels": latent_channels,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**(arguments | changes))


def make_dit(**changes: Any) -> DiTTransformer2DModel:
    """Build a DiTTransformer2DModel with a learned variance, for latents of 4 channels and 8×8 and 1,000 classes."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": 1000,
    }
    return DiTTransformer2DModel(**(arguments | changes))


def save_dit(folder: Path, transformer: DiTTransformer2DModel | None = None, names: Any = None) -> Path:
    """Save a DiTPipeline of random parts: 16×16 images, T = 40."""
    torch.manual_seed(1)
    scheduler = DDIMScheduler(num_train_timesteps=40, clip_sample=False)
    vae = make_vae().eval()
    names = names or {0: "tench, Tinca tinca", 1: "goldfish", 2: "shark"}
    DiTPipeline(transformer or make_dit(), vae, scheduler, names).save_pretrained(folder)  # type: ignore[arg-type]
    # The constructor keeps the names for itself; in released pipelines they are in the index.
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
    return folder


@pytest.fixture
def tiny_dit_base(tmp_path: Path) -> Path:
    """The folder of a tiny DiT pipeline."""
    return save_dit(tmp_path / "dit-base")


def make_sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    """Build a UNet2DConditionModel with SDXL's inputs: two text encoders' states, pooled embeddings, sizes."""
    arguments: dict[str, Any] = {
        "cross_attention_dim": 16 + 24,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 20 + 6 * 8,
    }
    return make_text_unet(**(arguments | changes))


def save_sdxl(
    folder: Path,
    unet: UNet2DConditionModel | None = None,
    pooled_width: int = 20,
    zeros: bool = True,
    vae: dict[str, Any] | None = None,
    **scheduler: Any,
) -> Path:
    """Save a StableDiffusionXLPipeline of random parts: 16×16 images, letters as vocabulary, T = 40."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    tokenizer, first = make_text_parts(folder, 16, num_hidden_layers=2)
    # As OpenCLIP's, it is padded with another token than CLIP's.
    tokenizer_2, second = make_text_parts(folder, 24, num_hidden_layers=2, projection_dim=pooled_width)
    tokenizer_2.pad_token = "a"
    arguments = {"num_train_timesteps": 40, "beta_schedule": "scaled_linear", "steps_offset": 1}
    StableDiffusionXLPipeline(
        make_vae(**(vae or {})).eval(),
        CLIPTextModel(first).eval(),
        CLIPTextModelWithProjection(second).eval(),
        tokenizer,
        tokenizer_2,
        unet or make_sdxl_unet(),
        EulerDiscreteScheduler(**(arguments | scheduler)),
        force_zeros_for_empty_prompt=zeros,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_sdxl_base(tmp_path: Path) -> Path:
    """The folder of a tiny Stable Diffusion XL pipeline."""
    return save_sdxl(tmp_path / "sdxl-base")


@pytest.fixture
def tiny_text_base(tmp_path: Path) -> Path:
    """The folder of a tiny Stable Diffusion pipeline."""
    return save_stable_diffusion(tmp_path / "text-base")


def stock_images(folder: Path, prompts: list[str], seeds: list[int], **arguments: Any) -> Any:
    """Draw images by the pipeline of stock diffusers: float [n, h, w, c] in [0, 1]."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(prompts, generator=generators, output_type="np", **arguments).images


WORDS = ["red cat", "blue dog", "a green bird", "one cat", "two dogs", "sun"]


@pytest.fixture
def tiny_captioned(tmp_path: Path) -> Path:
    """A folder of 24 colour 16×16 images with metadata.jsonl."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    lines = []
    for i in range(24):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
        lines.append(json.dumps({"file_name": f"{i:02}.png", "text": WORDS[i % len(WORDS)]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def tiny_images(tmp_path: Path) -> Path:
    """An npz file of 48 grey 8×8 images."""
    path = tmp_path / "images.npz"
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (48, 8, 8), dtype=np.uint8))
    return path


@pytest.fixture
def tiny_config(tiny_base: Path, tiny_images: Path) -> Callable[..., Config]:
    """Make a config of the whole job that takes seconds; sections are updated by keyword."""

    def make(**sections: Any) -> Config:
        values: dict[str, Any] = {
            "base": str(tiny_base),
            "data": {"source": str(tiny_images), "num_held_out": 8},
            "finetune": {
                "num_ranges": 2,
                "num_updates": 6,
                "batch_size": 4,
                "validate_every": 3,
                "checkpoint_every": 2,
                "tracker": "none",
            },
            "sample": {"num_steps": 3, "batch_size": 8},
            "search": {"num_trials": 5, "num_images": 10, "gradient_batches": 2},
            "evaluate": {"num_images": 10, "num_sample_images": 2},
        }
        for section, changes in sections.items():
            values[section] = {**values[section], **changes} if isinstance(changes, dict) else changes
        return Config.model_validate(values)

    return make


def save_clip(folder: Path, image_size: int = 16, seed: int = 0, **preprocessor: Any) -> Path:
    """Save a CLIP of random parts, with the tokenizer of the tiny Stable Diffusion pipeline."""
    tokenizer = AutoTokenizer.from_pretrained(save_stable_diffusion(folder / "pipeline") / "tokenizer")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 12}
    vision = {**sizes, "image_size": image_size, "patch_size": 8}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    # As they are drawn, the weights hardly tell one image or text from another.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture
def text_config(tiny_text_base: Path, tiny_captioned: Path) -> Callable[..., Config]:
    """Make a config of the whole job on the tiny Stable Diffusion pipeline; sections are updated by keyword."""

    def make(**sections: Any) -> Config:
        values: dict[str, Any] = {
            "base": str(tiny_text_base),
            "data": {"source": str(tiny_captioned), "num_held_out": 4, "flip": True},
            "finetune": {
                "num_ranges": 2,
                "num_updates": 4,
                "batch_size": 4,
                "learning_rate": 1e-2,
                "validate_every": 2,
                "checkpoint_every": 2,
                "tracker": "none",
            },
            "sample": {"sampler": "PNDM", "num_steps": 3, "batch_size": 4},
            "text": {"guidance_scale": 3.0},
            "search": {"num_trials": 4, "num_images": 6, "gradient_batches": 2, "num_finalists": 0},
            "evaluate": {"num_images": 6, "num_seed_sets": 1, "num_sample_images": 2},
        }
        for section, changes in sections.items():
            values[section] = {**values[section], **changes} if isinstance(changes, dict) else changes
        return Config.model_validate(values)

    return make
