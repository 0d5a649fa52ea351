"""Train from nothing what stands around the denoiser of a text-to-image base: a VAE and a text encoder."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import Data, PartTraining, Vae
from ..data.batches import training_batches
from ..data.images import Images, to_model
from ..data.split import Split, split
from ..errors import UserError
from ..models.image_text import ImageTextModel
from ..models.text_encoders import tokenize
from ..seeds import generator, stream_seed
from ..storage.files import read_tensors, write_tensors
from .schedule import learning_rate_factor
from .state import load_state, save_state


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
        UserError: the loss is no longer finite, or a checkpoint is damaged.
    """
    path, state = folder / f"{name}.safetensors", folder / f"{name}-state.safetensors"
    if path.exists():
        module.load_state_dict(read_tensors(path)[0])
        return
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=settings.weight_decay, fused=True
    )
    tensors, num_updates = {f"network.{k}": v for k, v in module.state_dict().items()}, settings.num_updates
    first = load_state(state, tensors, optimizer)["num_done"] if state.exists() else 0
    module.train()
    for num_done in range(first + 1, num_updates + 1):
        loss = _update(name, module, optimizer, loss_at, num_done - 1, settings, seed)
        if num_done % settings.checkpoint_every and num_done < num_updates:
            continue
        if not loss.isfinite():
            raise UserError(
                f"{name}: the loss is {loss.item()} at update {num_done}; lower pretrain.{name}.learning_rate "
                f"({settings.learning_rate:g})"
            )
        held_out = _held_out(module, validate)
        if num_done < num_updates:
            save_state(state, tensors, optimizer, {"num_done": num_done})
        yield f"{name} {num_done}/{num_updates}: loss {loss.item():.4f}  validation {held_out:.4f}"
    write_tensors(path, module.state_dict())
    state.unlink(missing_ok=True)


def _update(
    name: str,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int], Tensor],
    update: int,
    settings: PartTraining,
    seed: int,
) -> Tensor:
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * learning_rate_factor(update, settings.num_updates)
    torch.manual_seed(stream_seed(seed, name, "dropout", update))
    loss = loss_at(update)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@torch.no_grad()
def _held_out(module: nn.Module, validate: Callable[[], float]) -> float:
    module.eval()
    found = validate()
    module.train()
    return found


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

    batches: Iterator[Any] | None = None

    def loss_at(update: int) -> Tensor:
        nonlocal batches
        if batches is None:
            last, drawn = settings.num_updates, stream_seed(seed, "vae")
            batches = iter(training_batches(images, data, settings.batch_size, drawn, update, last))
        pixels = next(batches)
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
        described: what the model reads of images, in several views, of which each update draws one.
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
