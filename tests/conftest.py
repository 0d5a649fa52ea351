"""Tiny models, data and configs: everything is built here, nothing is fetched."""

import functools
import gc
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

import instrument

# Where there is no network, a name that is no folder would be asked for again and again.
huggingface_hub.constants.HF_HUB_OFFLINE = True
# Before anything of ours is imported.
instrument.install()

from decouple_merge.config import Config  # noqa: E402
from decouple_merge.experiment import pictures, trials, workflow  # noqa: E402
from decouple_merge.models.families import dit, flux, sd3, sdxl, stable_diffusion, unet, wan, z_image  # noqa: E402
from decouple_merge.training import loop  # noqa: E402

SAVED = tempfile.TemporaryDirectory(prefix="deme-tests-")


def once(save: Callable[..., Path]) -> Callable[..., Path]:
    """Save a tiny pipeline once, and copy it from then on; one that is given parts of its own is always saved."""
    made: dict[str, Path] = {}

    @functools.wraps(save)
    def copied(folder: Path, *args: Any, **options: Any) -> Path:
        if not all(isinstance(value, str | float | int | None) for value in (*args, *options.values())):
            return save(folder, *args, **options)
        key = repr((args, sorted(options.items())))
        if key not in made:
            made[key] = save(Path(tempfile.mkdtemp(dir=SAVED.name)) / "pipeline", *args, **options)
        return Path(shutil.copytree(made[key], folder, dirs_exist_ok=True))

    return copied


# Before tests import them by name.
for module, name in (
    (dit, "save_dit"),
    (flux, "save_flux"),
    (sd3, "save_sd3"),
    (sdxl, "save_sdxl"),
    (stable_diffusion, "save_stable_diffusion"),
    (wan, "save_wan"),
    (z_image, "save_z_image"),
):
    setattr(module, name, once(getattr(module, name)))
save_unet = once(unet.UNet().save_tiny)

make_unet, make_text_unet = unet.tiny_unet, stable_diffusion.tiny_text_unet
make_sdxl_unet, make_dit = sdxl.tiny_sdxl_unet, dit.tiny_dit
save_stable_diffusion, save_sdxl, save_dit = stable_diffusion.save_stable_diffusion, sdxl.save_sdxl, dit.save_dit


@once
def save_small_unet(folder: Path) -> Path:
    blocks: dict[str, Any] = {"down_block_types": ["AttnDownBlock2D"], "up_block_types": ["UpBlock2D"]}
    network = make_unet(block_out_channels=[8], **blocks)
    DDPMPipeline(network, DDPMScheduler(num_train_timesteps=40)).save_pretrained(folder)
    return folder


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what imports made, half a million objects, from now on."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _isolated(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what tests cache apart from the user's, and two busy cores from fighting; every test draws the same.

    Tests have one cache together, but for those of a module with ``OWN_CACHE``.
    """
    has_own = getattr(request.module, "OWN_CACHE", False)
    monkeypatch.setenv("DEME_CACHE", str(tmp_path / "cache" if has_own else Path(SAVED.name) / "cache"))
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures and the page of a run, which take seconds, but in a module with ``LOOKS_AT_PICTURES``."""
    if getattr(request.module, "LOOKS_AT_PICTURES", False):
        return

    def draw(place: int) -> Callable[..., None]:
        def write(*args: Any) -> None:
            args[place].parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (1, 1)).save(args[place], "PNG")

        return write

    for module, name, place in (
        (pictures, "sample_grid", 1),
        (trials, "search_cost", 2),
        (trials, "search_surfaces", 2),
    ):
        monkeypatch.setattr(module, name, draw(place))
    monkeypatch.setattr(workflow, "write_report", lambda folders: folders[0] / "report.html")


@pytest.fixture
def every_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have trainings yield every record, not one in a while."""
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_RECORDS", 0.0)


@pytest.fixture
def tiny_base(tmp_path: Path) -> Path:
    """The folder of a tiny DDPM pipeline, T = 40, of one level: half the layers of ``make_unet`` take half the time."""
    return save_small_unet(tmp_path / "base")


@pytest.fixture
def two_level_base(tmp_path: Path) -> Path:
    """The folder of a pipeline of ``make_unet``, T = 40."""
    return save_unet(tmp_path / "base")


@pytest.fixture
def tiny_dit_base(tmp_path: Path) -> Path:
    """The folder of a tiny DiT pipeline."""
    return save_dit(tmp_path / "dit-base")


@pytest.fixture
def tiny_sdxl_base(tmp_path: Path) -> Path:
    """The folder of a tiny Stable Diffusion XL pipeline."""
    return save_sdxl(tmp_path / "sdxl-base")


@pytest.fixture
def tiny_text_base(tmp_path: Path) -> Path:
    """The folder of a tiny Stable Diffusion pipeline."""
    return save_stable_diffusion(tmp_path / "text-base")


def stock_images(
    folder: Path, prompts: list[str], seeds: list[int], parts: dict[str, Any] | None = None, **arguments: Any
) -> Any:
    """Draw images by the pipeline of stock diffusers, with other parts where given: float [n, h, w, c] in [0, 1]."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, **(parts or {})).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # A copy: some pipelines write into the list.
    return pipeline(list(prompts), generator=generators, output_type="np", **arguments).images


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
            "evaluate": {"num_images": 10, "num_seed_sets": 1, "num_sample_images": 2},
        }
        for section, changes in sections.items():
            values[section] = {**values.get(section, {}), **changes} if isinstance(changes, dict) else changes
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
            values[section] = {**values.get(section, {}), **changes} if isinstance(changes, dict) else changes
        return Config.model_validate(values)

    return make
