"""One training in memory: what an update is, how it is validated, saved and gone on with."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import Finetune, Training
from ..data.batches import Batch, draw_share, model_input
from ..diffusion.losses import finetune_losses, spectral_weights
from ..diffusion.process import Timesteps
from ..diffusion.timesteps import TimestepRange
from ..diffusion.weightings import weight_of
from ..errors import UserError
from ..executors import distributed
from ..executors.devices import default_device
from ..executors.sharding import gathered, share_out
from ..models.base import Base
from ..models.network import predict
from ..seeds import generator, stream_seed
from .balancing import Setup, balancer_of
from .compilation import check_compiled
from .distillation import Distillation
from .ema import AveragedParameters
from .optimizers import make_optimizer
from .parametrisation import parametrisation_of
from .precision import autocast, grad_scaler
from .schedule import learning_rate_at
from .state import Part, load_state, save_state
from .validation import MAX_VALIDATED, validation_losses


@dataclass(frozen=True)
class Losses:
    """Of the samples of a batch: the whole loss, its two parts, of denoising and consistency, and the timesteps."""

    total: Float[Tensor, " batch"]
    denoising: Float[Tensor, " batch"]
    consistency: Float[Tensor, " batch"]
    t: Timesteps


@dataclass(frozen=True)
class Task:
    """What differs between the trainings of a run that have the same settings.

    Attributes:
        name: keys the random streams, so that experts see different noise.
        own: the range that is trained.
        ranges: each has a validation loss.
    """

    name: str
    own: TimestepRange
    ranges: tuple[TimestepRange, ...]


class Trainer:
    """A training run in memory: network, teacher, EMA, optimiser, and the number of updates done.

    Args:
        settings: of a base from nothing, or a ``Finetune``, which has a teacher, a mixture with all timesteps, and a
            parametrisation of its own.
        distillation: weights to begin with, and networks whose outputs are the targets.
    """

    def __init__(
        self, base: Base, task: Task, settings: Training, seed: int, distillation: Distillation | None = None
    ) -> None:
        self.base, self.task, self.settings, self.seed = base, task, settings, seed
        self.global_prob = settings.global_prob if isinstance(settings, Finetune) else 0.0
        self.consistency_weight = settings.consistency_weight if isinstance(settings, Finetune) else 0.0
        self.device = default_device()
        self.rank, self.world, self.distillation = distributed.rank(), distributed.world_size(), distillation
        self.process = base.process.to(self.device)
        self.weight = weight_of(settings.weighting, **settings.weighting_options)
        self.spectrum: Tensor | None = None
        if settings.spectrum_power:
            height, width = base.shape[-2:]
            self.spectrum = spectral_weights(height, width, settings.spectrum_power).to(self.device)
        self.parametrisation = parametrisation_of(settings, task.name, seed)
        network: Any = self.parametrisation.network(base).train()
        if distillation is not None:
            network.load_state_dict(distillation.start)
        if settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.network: nn.Module = network
        self.teacher = None
        self.is_shared_out = settings.sharding == "full" and self.world > 1
        if self.consistency_weight:
            self.teacher = self.parametrisation.teacher(base, network)
        if settings.compile:
            for each in (self.network, self.teacher):
                if isinstance(each, nn.Module):
                    # Dropout masks as the eager network draws them, which its gradients are compared with.
                    each.compile(options={"fallback_random": True})
        if isinstance(self.teacher, nn.Module):
            if self.is_shared_out:
                share_out(self.teacher, self.device, self.world)
            self.teacher.to(self.device)
        self.wrapped = distributed.averaging(network, self.device, self.is_shared_out)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.balancer = balancer_of(
            Setup(self.process, task.own, self.global_prob, settings, self.parameters, (seed, task.name), self.device)
        )
        self.optimizer = make_optimizer(self.parametrisation.groups(network) + self.balancer.groups(), settings)
        self.scaler = grad_scaler(settings.mixed_precision, self.device)
        self.ema = AveragedParameters(self.parameters, settings.ema)
        self.num_done = 0
        self.compile_checked = False
        # Loss and consistency loss, summed over the micro-batches since the last validation.
        self.sums = torch.zeros(2, device=self.device)
        self.num_summed = 0

    def update(self, batches: Iterator[Batch]) -> None:
        """Do one optimiser update, on as many batches as are accumulated, and follow it with the EMA.

        Where fp16 gradients overflow, the same batches come again at half the scale: a skipped step counts nowhere.

        Raises:
            UserError: they overflow without a scale.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.num_done, self.settings) * group["scale"]
        micro_batches = list(islice(batches, self.settings.accumulation))
        if self.settings.compile and not self.compile_checked:
            check_compiled(partial(self._gradients, micro_batches[0]), self.device)
            self.compile_checked = True
        while True:
            losses = self._accumulate(micro_batches)
            if self._step():
                break
        for each in distributed.mean(losses):
            self.sums += each
        self.num_summed += len(losses)
        self.ema.follow(self.num_done)
        self.num_done += 1

    def _accumulate(self, micro_batches: list[Batch]) -> Float[Tensor, "micro two"]:
        """Sum gradients over micro-batches and average them over processes; returns this one's losses, by part."""
        key, losses = (self.seed, self.task.name), []
        for micro, batch in enumerate(micro_batches):
            step = self.num_done * len(micro_batches) + micro
            # Dropout draws from the global stream, which only a seed of its own makes a function of the step.
            torch.manual_seed(stream_seed(*key, "dropout", self.rank, step))
            is_averaged = micro == len(micro_batches) - 1 and not self.balancer.takes_gradients(self.num_done)
            with nullcontext() if is_averaged else distributed.accumulating(self.wrapped):
                # The 0 was the rank: the processes share the draws of one batch.
                found = self.losses(batch, generator(*key, "noise", 0, step))
                self.balancer.backward(
                    found.total, found.t, lambda loss: self.scaler.scale(loss / len(micro_batches)), self.num_done
                )
            losses.append(torch.stack([found.denoising.detach().mean(), found.consistency.detach().mean()]))
        self.balancer.finish(self.num_done)
        return torch.stack(losses)

    def _step(self) -> bool:
        """Update the weights by the gradients, unless these overflowed; says if it did."""
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.scaler.get_scale() >= scale:
            return True
        if scale <= 1:
            raise UserError(
                f"{self.task.name}: fp16 gradients overflow at update {self.num_done + 1}; set mixed_precision to bf16 "
                f"or fp32, or lower the learning rate ({self.settings.learning_rate:g})"
            )
        return False

    def losses(self, batch: Batch, draws: torch.Generator) -> Losses:
        """Compute the losses of a batch on timesteps and noise that are drawn for it."""
        base, process = self.base, self.process
        share = partial(draw_share, num=len(batch), rank=self.rank, world=self.world)
        x0, condition = model_input(batch.to(self.device), draws, self.rank, self.world)
        t = share(lambda num: self.balancer.draw(num, draws)).to(self.device)
        noise = share(lambda num: torch.randn(num, *x0.shape[1:], generator=draws)).to(self.device)
        x_t, target = process.mix(x0, noise, t), process.target(x0, noise, t)
        with autocast(self.settings.mixed_precision, self.device):
            if self.distillation is not None:
                target = self.distillation.target(base, x_t, t, condition)
            teacher_output = None
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_output = predict(base, self.teacher, x_t, t, **condition)
            # Once, or the gradients of the two terms would be summed in 16 bits.
            output = predict(base, self.wrapped, x_t, t, **condition).float()
        found = finetune_losses(
            output, target, teacher_output, self.consistency_weight, self.weight(process, t), self.spectrum
        )
        return Losses(*found, t)

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        self.losses(batch, generator(self.seed, "compiled")).total.mean().backward()
        found = {n: p.grad.clone() for n, p in self.network.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        return found

    def mean_losses(self) -> tuple[float, float]:
        """Compute the means of the denoising and consistency losses since the last call of ``forget_losses``."""
        loss, consistency_loss = (self.sums / self.num_summed).tolist()
        return loss, consistency_loss

    def forget_losses(self) -> None:
        """Start new means."""
        self.sums.zero_()
        self.num_summed = 0

    def validate(self, held_out: Batch) -> list[float]:
        """Compute the validation losses of the averaged weights; the network's own are untouched."""
        self.network.eval()
        with self.ema.swapped_in(), autocast(self.settings.mixed_precision, self.device):
            # No more at once than an update sees, which is what memory was found to be enough for.
            size = min(MAX_VALIDATED, self.settings.batch_size)
            losses = validation_losses(self.network, held_out, self.base, self.task.ranges, self.device, size)
        self.network.train()
        return losses

    def _named(self, values: list[Any]) -> dict[str, Tensor]:
        names = [name for name, p in self.network.named_parameters() if p.requires_grad]
        return dict(zip(names, values, strict=True))

    @property
    def part(self) -> Part | None:
        """Which process this is, of how many, where the network is shared out."""
        return (self.rank, self.world) if self.is_shared_out else None

    def _averages(self) -> dict[str, Tensor] | None:
        """Name the averaged parameters; of what is shared out the first process gets all tensors, the others None."""
        averages = self._named(self.ema.values)
        if not self.is_shared_out:
            return averages
        whole = gathered((self.network.state_dict() | averages).items(), self.rank == 0)
        return whole or None

    def weights(self) -> dict[str, Tensor]:
        """Compute the averaged weights under the base's keys: what the training has made so far.

        Of a network that is shared out all processes must ask for them, and the first gets them.
        """
        averages = self._averages()
        return {} if averages is None else self.parametrisation.stock_weights(self.network, averages)

    def adapter(self) -> dict[str, Tensor]:
        """Name the averaged factors as diffusers loads them; empty where no adapter is trained. Else as ``weights``."""
        averages = self._averages()
        return {} if averages is None else self.parametrisation.adapter(self.base, self.network, averages)

    def _tensors(self) -> dict[str, Tensor]:
        network = {f"network.{name}": p for name, p in self._named(self.parameters).items()}
        averages = {f"ema.{name}": v for name, v in self._named(self.ema.values).items()}
        return network | averages | self.balancer.tensors() | {"sums": self.sums}

    def save(self, path: Path) -> None:
        """Write weights, EMA and optimiser."""
        counts = {"num_done": self.num_done, "num_summed": self.num_summed}
        save_state(path, self._tensors(), self.optimizer, counts | {"scaler": self.scaler.state_dict()})

    def load(self, path: Path) -> None:
        """Go on from a saved state.

        Raises:
            UserError: the state is damaged or of another network.
        """
        counts = load_state(path, self._tensors(), self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(counts["scaler"])
        self.num_done, self.num_summed = counts["num_done"], counts["num_summed"]
