"""A base from nothing: of a text-to-image base first the parts around the denoiser."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..analysis.figures import training_curve
from ..config import Config, Pretrain
from ..data.captions import load_captions
from ..data.images import Images
from ..data.latents import Latents
from ..data.sources import load_images
from ..data.split import split
from ..diffusion.timesteps import TimestepRange
from ..errors import UserError
from ..evaluation.alignment import NUM_FEATURES, describe
from ..evaluation.extractors import load_extractor
from ..executors import distributed
from ..executors.devices import default_device
from ..models.base import Base, create_base, load_base
from ..models.export import export_pipeline, save_pipeline
from ..models.image_text import ImageTextModel
from ..models.parts import create_vae, vae_downscale
from ..models.ranges import with_density
from ..models.text_encoders import create_text_encoder, create_tokenizer
from ..seeds import stream_seed
from ..storage.files import read_records, read_tensors, write_json, write_records
from ..storage.locks import enter, hold
from ..storage.run_folder import Run
from ..training.checks import check_training
from ..training.parts import train_image_text, train_vae
from ..training.records import StepRecord
from ..training.trainer import Task
from .located import located
from .manifest import PRETRAINING, check_owner, check_same_config, check_same_origin, claim, manifest
from .plan import captioned_plan, check_distance, image_plan
from .planned import Plan
from .watch import global_batch, train_watched
from .work import pretraining_work


def convergence(log: list[dict[str, Any]]) -> str:
    """Say by how much the mean validation loss fell in the last fifth of a training's updates."""
    mean = {r["update"]: sum(r["validation"]) / len(r["validation"]) for r in log}
    last = max(mean)
    start = max(u for u in mean if u <= last * 0.8 or u == min(mean))
    change = 100 * (mean[last] / mean[start] - 1)
    return f"validation loss {mean[start]:.6f} at update {start}, {mean[last]:.6f} at {last}: {change:+.2f} %"


def _build(config: Config, settings: Pretrain, out: Path) -> Plan:
    """Make an untrained base, or open the one to go on from, and open its data; writes nothing."""
    if settings.start:
        base = load_base(settings.start)
        if base.encoders is not None:
            raise UserError(
                f"pretrain.start is {settings.start!r}, a {type(base.pipeline).__name__}; expected one that draws "
                "pixels from noise alone: deme finetune trains any other"
            )
    else:
        base = create_base(settings.model, settings.scheduler, config.seed)
    base = with_density(base, settings)
    _check(config, settings, base)
    return _with_data(config, settings, base, out)


def _with_data(config: Config, settings: Pretrain, base: Base, out: Path) -> Plan:
    images = load_images(config.data, base.channels, base.image_size)
    split(images, config.data)
    return image_plan(config, out, base, _ranges(settings, base), images)


@dataclass(frozen=True)
class _TextParts:
    """A text-to-image base of which nothing is trained yet, and what it will be trained on."""

    base: Base
    parts: dict[str, Any]
    images: Images
    captions: list[str]


def _build_text(config: Config, settings: Pretrain) -> _TextParts:
    """Make a text-to-image base from nothing and open its data; writes nothing."""
    assert settings.vae is not None
    assert settings.text_encoder is not None
    data, seed, size = config.data, config.seed, settings.model.get("sample_size")
    vae = create_vae(settings.vae.model, seed)
    if not isinstance(size, int):
        raise UserError(f"pretrain.model.sample_size is {size!r}, expected the side of the latents, one integer")
    images = load_images(data, vae.config["in_channels"], size * vae_downscale(vae.config))
    split(images, data)
    captions = load_captions(images, data)
    tokenizer = create_tokenizer(captions, settings.text_encoder.vocab_size)
    text_encoder = create_text_encoder(tokenizer, settings.text_encoder.model, seed)
    parts = {"vae": vae, "tokenizer": tokenizer, "text_encoder": text_encoder}
    base = with_density(create_base(settings.model, settings.scheduler, seed, parts), settings)
    _check(config, settings, base)
    return _TextParts(base, parts, images, captions)


def _train_parts(config: Config, settings: Pretrain, made: _TextParts, out: Path) -> Generator[str, None, Plan]:
    """Train the parts around a denoiser that is not trained yet."""
    assert settings.vae is not None
    base, parts, images, captions = made.base, made.parts, made.images, made.captions
    with distributed.first_goes_first():
        _claim(Run(out), config, manifest(config, base, images))
        yield from train_vae(
            parts["vae"], images, config.data, settings.vae, config.seed, out / "parts", default_device()
        )
        yield from _train_text_encoder(config, settings, parts, images, captions, out / "parts")
        if distributed.is_first():
            save_pipeline(base, out / "parts" / "pipeline")
        base = load_base(str(out / "parts" / "pipeline"))
        plan = captioned_plan(config, out, base, _ranges(settings, base), images, captions)
        assert isinstance(plan.images, Latents)
        yield from plan.images.fill()
    return plan


def _train_text_encoder(
    config: Config, settings: Pretrain, parts: dict[str, Any], images: Images, captions: list[str], folder: Path
) -> Iterator[str]:
    """Train a CLIPTextModel as one side of an image–text model, before and without the denoiser.

    So the embeddings are fixed when the denoiser's training starts, and are cached as for any base.
    """
    assert settings.text_encoder is not None
    device = default_device()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, "text_encoder"))
        model = ImageTextModel(parts["tokenizer"], parts["text_encoder"], NUM_FEATURES).to(device)
    # It is read, not trained again, where its file is there; then nothing is described.
    is_trained = (folder / "text_encoder.safetensors").exists()
    described = torch.empty(1, 0, NUM_FEATURES) if is_trained else _describe_all(images, device)[None]
    pairs = split(images, config.data)
    yield from train_image_text(model, described, captions, pairs, settings.text_encoder, config.seed, folder)
    parts["text_encoder"].eval()


def _describe_all(images: Images, device: torch.device) -> Tensor:
    extract = load_extractor("effnetlite0", device).extract
    batches = torch.arange(len(images)).split(256)
    return torch.cat([describe(images.stack(b.tolist()), extract) for b in batches]).to(device)


def _check(config: Config, settings: Pretrain, base: Base) -> None:
    check_training(settings, base, default_device())
    check_distance(config, settings, base)


def _ranges(settings: Pretrain, base: Base) -> tuple[TimestepRange, ...]:
    return tuple(base.process.split(settings.num_ranges))


def open_pretrained(config: Config, folder: Path) -> Plan:
    """Open what ``pretrain`` left, with the pipeline as the base.

    Raises:
        UserError: the pipeline or the data can't be read, or the config has no section ``pretrain``.
    """
    if config.pretrain is None:
        raise UserError(f"{folder} has a pipeline, and its config no section pretrain: it is no base's training")
    base = with_density(load_base(str(folder / "pipeline")), config.pretrain)
    return _with_data(config, config.pretrain, base, folder)


def pretrain(config: Config, out: Path, wait: bool = False) -> Iterator[str | StepRecord]:
    """Train a base from nothing; leaves a stock pipeline and its training curve in ``out/pipeline``.

    Of a text-to-image base the VAE is trained first, then the text encoder, and on their latents and embeddings, which
    are cached, the denoiser.

    Args:
        wait: until no other process works on the folder, instead of refusing.
    """
    settings = config.pretrain
    if settings is None:
        raise UserError("the config has no section pretrain, which holds the model's and the training's settings")
    distributed.join()
    config = located(config)
    check_owner(Run(out), config, [config.data.source])
    check_same_config(Run(out), config)
    yield from enter(Run(out).lock("run"), wait)
    # What can't be built leaves no folder behind.
    made = _build(config, settings, out) if settings.vae is None else _build_text(config, settings)
    with hold(Run(out).lock("run"), "deme pretrain", wait):
        yield from _pretrain(config, settings, made, out)


def _pretrain(config: Config, settings: Pretrain, made: Plan | _TextParts, out: Path) -> Iterator[str | StepRecord]:
    if isinstance(made, Plan):
        plan = made
        with distributed.first_goes_first():
            _claim(plan.run, config, manifest(config, plan.base, plan.images))
    else:
        plan = yield from _train_parts(config, settings, made, out)
    task = Task("pretrain", TimestepRange(0, plan.base.num_train_timesteps), plan.ranges)
    folder = out / PRETRAINING
    with distributed.first_goes_first():
        write_json(plan.run.work, pretraining_work(plan, (task, settings, folder)))
    yield global_batch(settings)
    yield from train_watched(plan, task, settings, folder)
    if distributed.is_first():
        yield from _export(plan, out)


def _claim(run: Run, config: Config, record: dict[str, Any]) -> None:
    check_same_origin(run, record)
    claim(run, config, record)


def _export(plan: Plan, out: Path) -> Iterator[str]:
    weights, _ = read_tensors(out / PRETRAINING / "model.safetensors")
    pipeline, log = out / "pipeline", read_records(out / PRETRAINING / "log.jsonl")
    export_pipeline(plan.base, weights, pipeline, None, None)
    write_records(pipeline / "training-curve.jsonl", log)
    training_curve(log, plan.ranges, pipeline / "training-curve.png")
    yield convergence(log)
    yield f"pipeline: {pipeline}"
