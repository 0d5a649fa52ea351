"""Weights that a run's search starts with, learned by the gradient of the denoising loss."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.batches import held_out_images, training_batches
from ..diffusion.timesteps import range_index
from ..executors.devices import default_device
from ..merging.merger import Merger
from ..searching.learned import DenoisingLoss, learn_weights
from ..searching.strategies import Weights
from ..seeds import stream_seed
from ..storage.files import write_json
from ..storage.reading import AGAIN, read_record
from ..training.validation import MAX_VALIDATED, validation_losses
from .planned import Plan


def learn_start(plan: Plan, merger: Merger, experts_sha256: list[str]) -> Weights:
    """Learn weights to start with on ``gradient_batches`` batches, once in a run.

    The loss is divided by the square root of the base's own on each range. By the plain loss the cleanest timesteps
    decide alone, and the merges it likes best draw worse images than the base (docs/lab-notes.md).
    """
    path, config, experts = plan.run.learned, plan.config, merger.experts
    num, blocks = config.search.gradient_batches, config.search.blocks
    record = {"num_batches": num, "experts_sha256": experts_sha256, "blocks": blocks}
    if path.exists() and (found := read_record(path, AGAIN, weights=list)) | record == found:
        return tuple(found["weights"])
    seed = stream_seed(config.seed, "merging weights")
    batches = training_batches(plan.images, config.data, config.finetune.batch_size, seed, 0, num)
    low, high = config.search.low, config.search.high
    start = torch.full((len(blocks), len(experts)), min(max(1 / len(experts), low), high))
    loss_of = DenoisingLoss(plan.base, experts, merger.device, blocks, _loss_scale(plan))
    *_, last = learn_weights(loss_of, batches, start, num, seed, (low, high))
    weights = [w for row in last.weights for w in row]
    write_json(path, record | {"weights": weights})
    return tuple(weights)


def _loss_scale(plan: Plan) -> Float[Tensor, " T"]:
    """Compute one over the square root of the base's loss on the range of each timestep."""
    base, device = plan.base, default_device()
    network = copy.deepcopy(base.network).to(device).eval()
    held_out, size = held_out_images(plan.images, plan.config.data), min(MAX_VALIDATED, plan.config.finetune.batch_size)
    losses = validation_losses(network, held_out, base, plan.ranges, device, size)
    # Of a flow's timesteps, which are real numbers, an entry is for those from one integer to the next.
    middles = (torch.arange(base.num_train_timesteps) + 0.5).tolist()
    return torch.tensor([losses[range_index(list(plan.ranges), t)] ** -0.5 for t in middles])
