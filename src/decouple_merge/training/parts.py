"""Train from nothing what stands around the denoiser of a text-to-image base: a VAE, then a text encoder."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import Data, PartTraining, TextEncoder, Vae
from ..data.batches import training_batches
from ..data.images import Images, to_model
from ..data.split import Split, split
from ..evaluation.alignment import NUM_FEATURES, ImageTextModel, describe
from ..evaluation.features import load_extractor
from ..models.text_encoders import tokenize
from ..seeds import generator, stream_seed
from ..storage.files import read_tensors, write_tensors


def learning_rate_factor(update: int, num_updates: int) -> float:
    """Compute the rate of an update (0-based) over its highest: a linear rise over a twentieth, then half a cosine."""
    rise = min(1.0, (update + 1) / max(1, num_updates // 20))
    return rise * (1 + math.cos(math.pi * update / num_updates)) / 2


def fit(
    name: str,
    module: nn.Module,
    loss_at: Callable[[int], Tensor],
    validate: Callable[[], float],
    settings: PartTraining,
    seed: int,
    folder: Path,
) -> Iterator[str]:
    """Train a module with AdamW, or read it where it is trained already; yields lines for the user.

    A training that was killed goes on bitwise from its last checkpoint. The weights are left in
    ``folder/<name>.safetensors``.

    Args:
        loss_at: the loss of an update (0-based), of which it must be a function.
        validate: called with the module in evaluation mode.

    Raises:
        ValueError: the loss is no longer finite, or a checkpoint is damaged.
    """
    path, state = folder / f"{name}.safetensors", folder / f"{name}-state.safetensors"
    if path.exists():
        module.load_state_dict(read_tensors(path)[0])
        return
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=settings.weight_decay, fused=True
    )
    first = _load_state(state, module, optimizer) if state.exists() else 0
    module.train()
    for update in range(first, settings.num_updates):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * learning_rate_factor(update, settings.num_updates)
        torch.manual_seed(stream_seed(seed, name, "dropout", update))
        loss = loss_at(update)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        is_last = update + 1 == settings.num_updates
        if (update + 1) % settings.checkpoint_every == 0 or is_last:
            if not loss.isfinite():
                raise ValueError(
                    f"{name}: the loss is {loss.item()} at update {update + 1}; lower pretrain.{name}.learning_rate "
                    f"({settings.learning_rate:g})"
                )
            module.eval()
            with torch.no_grad():
                held_out = validate()
            module.train()
            if not is_last:
                _save_state(state, module, optimizer, update + 1)
            yield f"{name} {update + 1}/{settings.num_updates}: loss {loss.item():.4f}  validation {held_out:.4f}"
    write_tensors(path, module.state_dict())
    state.unlink(missing_ok=True)


def _save_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, num_done: int) -> None:
    tensors = {f"module.{key}": value for key, value in module.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
    write_tensors(path, tensors, {"num_done": json.dumps(num_done)})


def _load_state(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    tensors, metadata = read_tensors(path)
    module.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items() if k.startswith("module.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return json.loads(metadata["num_done"])


def train_vae(
    vae: Any, images: Images, data: Data, settings: Vae, seed: int, folder: Path, device: torch.device
) -> Iterator[str]:
    """Train an AutoencoderKL on images, L = mean |x - x̂| + w·KL(q(z|x), N(0, 1)) / values of an image.

    Then sets its scaling factor to 1 / standard deviation of the latents, as Rombach et al. 2022, section D.1, do.
    """
    vae.to(device)

    def losses(pixels: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        x = to_model(pixels).to(device)
        found = vae.encode(x).latent_dist
        latents = found.mean + found.std * torch.randn(found.mean.shape, generator=draws).to(device)
        return (vae.decode(latents).sample - x).abs().mean(), found.kl().mean() / x[0].numel()

    def loss_at(update: int) -> Tensor:
        (pixels,) = training_batches(images, data, settings.batch_size, stream_seed(seed, "vae"), update, update + 1)
        assert isinstance(pixels, Tensor)
        error, divergence = losses(pixels, generator(seed, "vae", update))
        return error + settings.kl_weight * divergence

    def validate() -> float:
        batches = images.stack(split(images, data).held_out).split(64)
        errors = [losses(pixels, generator("vae validation"))[0] * len(pixels) for pixels in batches]
        return float(sum(errors)) / sum(map(len, batches))

    yield from fit("vae", vae, loss_at, validate, settings, seed, folder)
    vae.eval()
    pixels = images.stack(split(images, data).trained[:: max(1, len(images) // 1024)])
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_model(p).to(device)).latent_dist.mean for p in pixels.split(64)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())


def train_image_text(
    model: ImageTextModel,
    described: Float[Tensor, "views n f"],
    captions: Sequence[str],
    pairs: Split,
    settings: PartTraining,
    seed: int,
    folder: Path,
) -> Iterator[str]:
    """Train an image–text model to tell captions apart by their images and images by their captions (CLIP's loss).

    Args:
        described: images as ``alignment.describe`` sees them, in several views, of which each update draws one.
        pairs: which of them are trained on, and which are for validation.
    """
    tokens, is_text = (t.to(described.device) for t in tokenize(model.tokenizer, captions))

    trained, others = torch.tensor(pairs.trained), torch.tensor(pairs.held_out)

    def loss_at(update: int) -> Tensor:
        draws = generator(seed, "text_encoder", update)
        drawn = trained[torch.randperm(len(trained), generator=draws)[: settings.batch_size]]
        view = torch.randint(len(described), drawn.shape, generator=draws)
        return model.loss(described[view, drawn], tokens[drawn], is_text[drawn])

    def validate() -> float:
        return float(model.loss(described[0, others], tokens[others], is_text[others]))

    yield from fit("text_encoder", model, loss_at, validate, settings, seed, folder)


def train_text_encoder(
    tokenizer: Any,
    text_encoder: Any,
    images: Images,
    captions: Sequence[str],
    data: Data,
    settings: TextEncoder,
    seed: int,
    folder: Path,
    device: torch.device,
) -> Iterator[str]:
    """Train a CLIPTextModel as one side of an image–text model, before and without the denoiser.

    So the embeddings are fixed when the denoiser's training starts, and are cached as for any base.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "text_encoder"))
        model = ImageTextModel(tokenizer, text_encoder).to(device)
    described = torch.empty(1, 0, NUM_FEATURES)
    if not (folder / "text_encoder.safetensors").exists():
        extract = load_extractor("effnetlite0", device).extract
        batches = torch.arange(len(images)).split(256)
        described = torch.cat([describe(images.stack(b.tolist()), extract) for b in batches])[None].to(device)
    yield from train_image_text(model, described, captions, split(images, data), settings, seed, folder)
    text_encoder.eval()
