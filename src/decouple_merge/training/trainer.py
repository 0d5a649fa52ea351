"""One training in memory: what an update is, how it is validated, saved and gone on with."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Finetune, Training
from ..data.batches import Batch, model_input
from ..diffusion.losses import finetune_loss
from ..diffusion.timesteps import TimestepRange
from ..diffusion.weightings import weight_of
from ..models.base import Base
from ..models.network import predict
from ..seeds import generator, stream_seed
from .acceleration import start_accelerator
from .compilation import check_compiled
from .ema import AveragedParameters
from .optimizers import make_optimizer
from .parametrisation import parametrisation_of
from .schedule import learning_rate_at
from .state import load_state, save_state
from .validation import validation_losses


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
        folder: for the tracker.
    """

    def __init__(self, base: Base, task: Task, settings: Training, seed: int, folder: Path) -> None:
        self.base, self.task, self.settings, self.seed = base, task, settings, seed
        self.global_prob = settings.global_prob if isinstance(settings, Finetune) else 0.0
        self.consistency_weight = settings.consistency_weight if isinstance(settings, Finetune) else 0.0
        self.accelerator = start_accelerator(task.name, settings, folder / "tracker")
        self.device = self.accelerator.device
        self.process = base.process.to(self.device)
        self.weight = weight_of(settings.weighting, **settings.weighting_options)
        self.parametrisation = parametrisation_of(settings, task.name, seed)
        network: Any = self.parametrisation.network(base).train()
        if settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.network: nn.Module = network
        self.teacher = None
        if self.consistency_weight:
            self.teacher = self.parametrisation.teacher(base, network, self.device)
        if settings.compile:
            for each in (self.network, self.teacher):
                if isinstance(each, nn.Module):
                    each.compile()
        optimizer = make_optimizer(self.parametrisation.groups(network), settings)
        self.wrapped, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.ema = AveragedParameters(self.parameters, settings.ema)
        self.num_done = 0
        self.compile_checked = False
        # Loss and consistency loss, summed over the micro-batches since the last validation.
        self.sums = torch.zeros(2, device=self.device)
        self.num_summed = 0

    def update(self, batches: Iterator[Batch]) -> None:
        """Do one optimiser update, on as many batches as are accumulated, and follow it with the EMA."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.num_done, settings) * group["scale"]
        for micro in range(settings.accumulation):
            batch = next(batches)
            if settings.compile and not self.compile_checked:
                check_compiled(partial(self._gradients, batch), self.device)
                self.compile_checked = True
            is_last = micro == settings.accumulation - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.wrapped):
                self._accumulate(batch, self.num_done * settings.accumulation + micro)
        self.accelerator.clip_grad_norm_(self.parameters, settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.follow(self.num_done)
        self.num_done += 1

    def _accumulate(self, batch: Batch, step: int) -> None:
        """Add the gradients of a micro-batch, whose draws depend only on the step and the process."""
        key = self.seed, self.task.name
        rank = self.accelerator.process_index
        # Dropout draws from the global stream, which only a seed of its own makes a function of the step.
        torch.manual_seed(stream_seed(*key, "dropout", rank, step))
        loss, denoising, consistency = self.losses(batch, generator(*key, "noise", rank, step))
        self.accelerator.backward(loss / self.settings.accumulation)
        self.sums += torch.stack([denoising.detach(), consistency.detach()])
        self.num_summed += 1

    def losses(self, batch: Batch, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss of a batch, and its two parts: of denoising, and of consistency with the teacher."""
        base, process = self.base, self.process
        x0, condition = model_input(batch.to(self.device), draws)
        t = process.draw(len(x0), self.task.own, self.global_prob, draws, self.settings.antithetic).to(self.device)
        noise = torch.randn(x0.shape, generator=draws).to(self.device)
        x_t, target = process.mix(x0, noise, t), process.target(x0, noise, t)
        with self.accelerator.autocast():
            teacher_output = None
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_output = predict(base, self.teacher, x_t, t, **condition)
            output = predict(base, self.wrapped, x_t, t, **condition)
        return finetune_loss(output, target, teacher_output, self.consistency_weight, self.weight(process, t))

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        loss, _, _ = self.losses(batch, generator(self.seed, "compiled"))
        self.accelerator.backward(loss)
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
        with self.ema.swapped_in(), self.accelerator.autocast():
            losses = validation_losses(self.network, held_out, self.base, self.task.ranges, self.device)
        self.network.train()
        return losses

    def _named(self, values: list[Any]) -> dict[str, Tensor]:
        names = [name for name, p in self.network.named_parameters() if p.requires_grad]
        return dict(zip(names, values, strict=True))

    def weights(self) -> dict[str, Tensor]:
        """Compute the averaged weights under the base's keys: what the training has made so far."""
        return self.parametrisation.stock_weights(self.network, self._named(self.ema.values))

    def adapter(self) -> dict[str, Tensor]:
        """Name the averaged factors as diffusers loads them; empty where no adapter is trained."""
        return self.parametrisation.adapter(self.base, self.network, self._named(self.ema.values))

    def _tensors(self) -> dict[str, Tensor]:
        network = {f"network.{name}": p for name, p in self._named(self.parameters).items()}
        return network | {f"ema.{name}": v for name, v in self._named(self.ema.values).items()} | {"sums": self.sums}

    def save(self, path: Path) -> None:
        """Write weights, EMA and optimiser."""
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
        counts = {"num_done": self.num_done, "num_summed": self.num_summed, "scaler": scaler}
        save_state(path, self._tensors(), self.optimizer, counts)

    def load(self, path: Path) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: the state is damaged or of another network.
        """
        counts = load_state(path, self._tensors(), self.optimizer)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(counts["scaler"])
        self.num_done, self.num_summed = counts["num_done"], counts["num_summed"]
