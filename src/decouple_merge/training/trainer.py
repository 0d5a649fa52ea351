"""Train one model on one timestep range: an expert, the baseline, or a base from nothing."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from ..config import Data, Finetune, Training
from ..data.batches import Batch, Examples, held_out_images, model_input, training_batches
from ..diffusion.losses import add_noise, finetune_loss, per_sample_mse, prediction_target
from ..diffusion.timesteps import TimestepRange, draw_timesteps
from ..models.base import Base, new_network, predict
from ..models.lora import FILE, attach_lora, lora_factors, unadapted_state_dict, without_lora
from ..models.projection import folded_state_dict, projection_parameters
from ..seeds import generator, stream_seed
from ..storage.files import read_records, read_tensors, write_json, write_records, write_tensors

# A record is yielded at most this often, so that a live view costs nothing.
SECONDS_BETWEEN_RECORDS = 1.0


@dataclass(frozen=True)
class Task:
    """What one training run learns: its range, its mixture with all timesteps, its teacher, its projections.

    Attributes:
        name: keys the random streams, so that experts see different noise.
        consistency_weight: λ of DeMe, Eq. 5; 0 needs no teacher.
        projection: folded, trunk or none.
    """

    name: str
    own: TimestepRange
    ranges: tuple[TimestepRange, ...]
    global_prob: float = 0.0
    consistency_weight: float = 0.0
    projection: str = "none"
    projection_rate_scale: float = 1.0


@dataclass(frozen=True)
class StepRecord:
    """Progress of a training.

    Attributes:
        loss, consistency_loss: means over the updates since the last validation.
        own_range: the index of the range that is trained, where it is one of the task's ranges.
        validation: losses of the averaged weights on each range, where they were just taken.
        distance: of images drawn with the averaged weights, where it was just taken.
    """

    name: str
    update: int
    num_updates: int
    loss: float
    consistency_loss: float
    learning_rate: float
    images_per_second: float
    seconds_left: float
    own_range: int | None = None
    validation: list[float] | None = None
    distance: float | None = None


def is_main_process() -> bool:
    """Say whether this is the process that writes; under ``torchrun`` or ``accelerate launch`` there are several."""
    return PartialState().is_main_process


def main_process_first() -> AbstractContextManager[None]:
    """Let the main process through first, and the others when it is done."""
    return PartialState().main_process_first()


def learning_rate_at(update: int, settings: Training) -> float:
    """Compute the learning rate of an update (0-based) from the settings' schedule."""
    if update < settings.num_warmup_updates:
        return settings.learning_rate * (update + 1) / settings.num_warmup_updates
    if settings.schedule == "constant":
        return settings.learning_rate
    decaying = max(1, settings.num_updates * settings.decay_fraction - settings.num_warmup_updates)
    progress = min(1.0, (update - settings.num_warmup_updates) / decaying)
    fall = 1 - progress if settings.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate * (settings.floor + (1 - settings.floor) * fall)


def ema_decay(update: int, max_decay: float, power: float) -> float:
    """Compute the EMA decay min(max_decay, 1 - (1 + s)^-power) of update s (0-based)."""
    return min(max_decay, 1 - (1 + update) ** -power)


@contextmanager
def swapped(network: nn.Module, values: list[Tensor]) -> Iterator[None]:
    """Run with other values of the trained parameters; the network gets its own back, bit for bit."""
    parameters = [p.data for p in network.parameters() if p.requires_grad]
    kept = [p.clone() for p in parameters]
    torch._foreach_copy_(parameters, values)
    try:
        yield
    finally:
        torch._foreach_copy_(parameters, kept)


@torch.no_grad()
def validation_losses(
    network: nn.Module,
    images: Batch,
    base: Base,
    ranges: tuple[TimestepRange, ...],
    device: torch.device,
    batch_size: int = 128,
) -> list[float]:
    """Compute the denoising loss on each range, always on the same noise and on evenly spread timesteps.

    Args:
        images: held-out images, or their latents with captions.

    Returns:
        The mean squared error in the units of the network's output, one number for each range.
    """
    x0, condition = model_input(images, generator("validation latents"))
    noise = torch.randn(x0.shape, generator=generator("validation noise"))
    losses = []
    for own in ranges:
        t = (own.low + (torch.arange(len(x0)) + 0.5) / len(x0) * (own.high - own.low)).long()
        x_t = add_noise(x0, noise, t, base.alphas_cumprod)
        target = prediction_target(x0, noise, t, base.alphas_cumprod, base.prediction_type)
        total = 0.0
        for batch in torch.arange(len(x0)).split(batch_size):
            other = {name: value[batch].to(device) for name, value in condition.items()}
            output = predict(network, x_t[batch].to(device), t[batch].to(device), **other)
            total += float(per_sample_mse(output, target[batch].to(device)).double().sum())
        losses.append(total / len(x0))
    return losses


def differing_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Name the parameters whose gradient is missing or off by over half its norm; rounding stays far below."""
    return [
        name
        for name, gradient in expected.items()
        if name not in found or (found[name] - gradient).norm() > 0.5 * gradient.norm()
    ]


class Trainer:
    """A training run in memory: network, teacher, EMA, optimiser, and the number of updates done."""

    def __init__(self, base: Base, task: Task, settings: Training, seed: int, folder: Path) -> None:
        self.base, self.task, self.settings, self.seed = base, task, settings, seed
        # Accelerate's precision is the process's; an earlier training may have had another.
        AcceleratorState._reset_state(reset_partial_state=False)
        self.accelerator = Accelerator(
            mixed_precision="no" if settings.mixed_precision == "fp32" else settings.mixed_precision,
            log_with=None if settings.tracker == "none" else settings.tracker,
            project_dir=folder / "tracker",
        )
        if settings.tracker != "none":
            self.accelerator.init_trackers(task.name)
        self.device = self.accelerator.device
        self.alphas_cumprod = base.alphas_cumprod.to(self.device)
        network: Any = new_network(base, task.projection).train()
        if settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        self.has_lora = isinstance(settings, Finetune) and settings.lora is not None
        if isinstance(settings, Finetune) and settings.lora is not None:
            attach_lora(network, settings.lora, seed, task.name, "lora")
        self.network: nn.Module = network
        self.teacher = None
        if task.consistency_weight and not self.has_lora:
            self.teacher = new_network(base).to(self.device).requires_grad_(False).eval()
        if settings.compile:
            for network in filter(None, (self.network, self.teacher)):
                network.compile()
        self.wrapped, self.optimizer = self.accelerator.prepare(self.network, self._optimizer())
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.parameters]
        self.num_done = 0
        self.compile_checked = False
        # Loss and consistency loss, summed over the micro-batches since the last validation.
        self.sums = torch.zeros(2, device=self.device)
        self.num_summed = 0

    def _optimizer(self) -> torch.optim.Optimizer:
        scaled = {id(p): p for p in projection_parameters(self.network)}
        others = [p for p in self.network.parameters() if p.requires_grad and id(p) not in scaled]
        groups = [
            {"params": others, "scale": 1.0},
            {"params": list(scaled.values()), "scale": self.task.projection_rate_scale},
        ]
        s, groups = self.settings, [g for g in groups if g["params"]]
        settings: dict[str, Any] = {
            "lr": s.learning_rate,
            "betas": s.betas,
            "weight_decay": s.weight_decay,
            "eps": s.eps,
        }
        if s.optimizer == "adamw":
            return torch.optim.AdamW(groups, **settings, fused=True)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **settings)

    def _optimizer_states(self) -> list[dict[str, Any]]:
        """List what the optimiser remembers of each parameter, in its own order; written into, it goes on from there.

        Its ``state_dict`` is not the same for all: bitsandbytes nests some tensors for FSDP.
        """
        states = self.optimizer.state
        return [states[p] for group in self.optimizer.param_groups for p in group["params"]]

    def update(self, batches: Iterator[Batch]) -> None:
        """Do one optimiser update, on as many batches as are accumulated, and follow it with the EMA."""
        settings, rank = self.settings, self.accelerator.process_index
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.num_done, settings) * group["scale"]
        for micro in range(settings.accumulation):
            step = self.num_done * settings.accumulation + micro
            batch = next(batches)
            if settings.compile and not self.compile_checked:
                self._check_compiled(batch)
            # Dropout draws from the global stream, which only a seed of its own makes a function of the step.
            torch.manual_seed(stream_seed(self.seed, self.task.name, "dropout", rank, step))
            draws = generator(self.seed, self.task.name, "noise", rank, step)
            is_last = micro == settings.accumulation - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.wrapped):
                loss, denoising, consistency = self._losses(batch, draws)
                self.accelerator.backward(loss / settings.accumulation)
            self.sums += torch.stack([denoising.detach(), consistency.detach()])
            self.num_summed += 1
        self.accelerator.clip_grad_norm_(self.parameters, settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = ema_decay(self.num_done, settings.ema.max_decay, settings.ema.power)
        torch._foreach_lerp_(self.ema, [p.data for p in self.parameters], 1 - decay)
        self.num_done += 1

    def _losses(self, batch: Batch, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        task, base = self.task, self.base
        x0, condition = model_input(batch.to(self.device), draws)
        num_timesteps = base.num_train_timesteps
        t = draw_timesteps(len(x0), task.own, num_timesteps, task.global_prob, draws, self.settings.antithetic)
        t = t.to(self.device)
        noise = torch.randn(x0.shape, generator=draws).to(self.device)
        x_t = add_noise(x0, noise, t, self.alphas_cumprod)
        target = prediction_target(x0, noise, t, self.alphas_cumprod, base.prediction_type)
        with self.accelerator.autocast():
            teacher_output = self._teacher_output(x_t, t, condition)
            output = predict(self.wrapped, x_t, t, **condition)
        return finetune_loss(output, target, teacher_output, task.consistency_weight)

    @torch.no_grad()
    def _teacher_output(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor | None:
        if self.teacher is not None:
            return predict(self.teacher, x_t, t, **condition)
        if not (self.has_lora and self.task.consistency_weight):
            return None
        self.network.eval()
        with without_lora(self.network):
            output = predict(self.network, x_t, t, **condition)
        self.network.train()
        return output

    def _check_compiled(self, batch: Batch) -> None:
        """Refuse a compiled network whose gradients are not the eager ones: one with layers cut off still trains."""
        gradients = []
        for stance in ("default", "force_eager"):
            torch.manual_seed(0)
            with torch.compiler.set_stance(stance):
                loss, _, _ = self._losses(batch, generator(self.seed, "compiled"))
                self.accelerator.backward(loss)
            gradients.append({n: p.grad.clone() for n, p in self.network.named_parameters() if p.grad is not None})
            self.optimizer.zero_grad()
        wrong = differing_gradients(*gradients)
        if wrong:
            raise ValueError(
                f"torch.compile changes the gradients of {len(wrong)} parameters, {', '.join(wrong[:3])} among them, "
                f"which is a fault of torch {torch.__version__} on {self.device}: set compile to false"
            )
        self.compile_checked = True

    def validate(self, held_out: Batch) -> list[float]:
        """Compute the validation losses of the averaged weights; the network's own are untouched."""
        self.network.eval()
        with swapped(self.network, self.ema), self.accelerator.autocast():
            losses = validation_losses(self.network, held_out, self.base, self.task.ranges, self.device)
        self.network.train()
        return losses

    def ema_parameters(self) -> dict[str, Tensor]:
        """Name the averaged parameters."""
        names = [name for name, p in self.network.named_parameters() if p.requires_grad]
        return dict(zip(names, self.ema, strict=True))

    def result(self) -> dict[str, Tensor]:
        """Compute the averaged weights under the base's keys: what the training has made so far."""
        stock = unadapted_state_dict if self.has_lora else folded_state_dict
        return stock(self.network, self.ema_parameters())

    def save(self, folder: Path) -> None:
        """Write weights, EMA and optimiser as one safetensors file, replaced atomically."""
        tensors: dict[str, Tensor] = {f"network.{i}": p for i, p in enumerate(self.parameters)}
        tensors |= {f"ema.{i}": p for i, p in enumerate(self.ema)}
        for i, state in enumerate(self._optimizer_states()):
            for key, value in state.items():
                # A count is a number in bitsandbytes; its codebooks are one tensor for all, which safetensors refuses.
                own = value.clone() if isinstance(value, Tensor) and key.startswith("qmap") else value
                tensors[f"optimizer.{i}.{key}"] = own if isinstance(own, Tensor) else torch.tensor(own)
        tensors["sums"] = self.sums
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
        counts = {"num_done": self.num_done, "num_summed": self.num_summed, "scaler": scaler}
        write_tensors(folder / "state" / "state.safetensors", tensors, {"training": json.dumps(counts)})

    def load(self, folder: Path) -> None:
        """Continue from a saved state, if there is one.

        Raises:
            ValueError: the state is damaged or of another network.
        """
        path = folder / "state" / "state.safetensors"
        if not path.exists():
            return
        tensors, metadata = read_tensors(path)
        counts = json.loads(metadata["training"])
        try:
            with torch.no_grad():
                for i, (p, e) in enumerate(zip(self.parameters, self.ema, strict=True)):
                    p.copy_(tensors[f"network.{i}"])
                    e.copy_(tensors[f"ema.{i}"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path} is of another network ({error}); remove the folder to start over") from error
        states = self._optimizer_states()
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                states[int(index)][name] = (
                    value.to(self.device) if value.is_floating_point() or value.dim() else value.item()
                )
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(counts["scaler"])
        self.sums = tensors["sums"].to(self.device)
        self.num_done, self.num_summed = counts["num_done"], counts["num_summed"]


def train(
    base: Base,
    images: Examples,
    data: Data,
    task: Task,
    settings: Training,
    seed: int,
    folder: Path,
    distance: Callable[[dict[str, Tensor]], float] | None = None,
) -> Iterator[StepRecord]:
    """Train a copy of the base on one task; yields progress, leaves the folded EMA weights in ``folder``.

    Update s depends only on (seed, task.name, rank, s): a run that was killed goes on bitwise as if it had not
    been. Records go to ``folder/log.jsonl``, the state to ``folder/state/`` until the training is finished. The
    result is ``folder/model.safetensors`` (EMA weights, stock keys) with ``expert.json``; of an adapter also its
    factors, ``folder/lora/``, which diffusers loads.

    Args:
        distance: scores the averaged weights, given under the base's keys, every ``settings.distance.every`` updates.
            It must leave them as they are; then the training is bitwise the same with it and without.

    Raises:
        ValueError: the loss is no longer finite, or a saved state is damaged or of another network.
    """
    if (folder / "model.safetensors").exists():
        shutil.rmtree(folder / "state", ignore_errors=True)
        return
    trainer = Trainer(base, task, settings, seed, folder)
    trainer.load(folder)
    accelerator = trainer.accelerator
    batches = training_batches(
        images,
        data,
        settings.batch_size,
        stream_seed(seed, task.name),
        trainer.num_done * settings.accumulation,
        settings.num_updates * settings.accumulation,
        accelerator.process_index,
        accelerator.num_processes,
    )
    held_out = held_out_images(images, data)
    log = [r for r in read_records(folder / "log.jsonl") if r["update"] <= trainer.num_done]
    shown = started = time.monotonic()
    first = trainer.num_done

    while trainer.num_done < settings.num_updates:
        trainer.update(batches)
        finished = trainer.num_done == settings.num_updates
        validates = trainer.num_done % settings.validate_every == 0 or finished
        if validates or time.monotonic() - shown >= SECONDS_BETWEEN_RECORDS:
            shown = time.monotonic()
            seconds_per_update = (shown - started) / (trainer.num_done - first)
            record = _record(trainer, seconds_per_update)
            if validates:
                record = replace(record, validation=trainer.validate(held_out))
                if distance and settings.distance and (trainer.num_done % settings.distance.every == 0 or finished):
                    record = replace(record, distance=distance(trainer.result()))
                _log(trainer, record, log, folder)
                first, started = trainer.num_done, time.monotonic()
            yield record
        if trainer.num_done % settings.checkpoint_every == 0 and not finished and accelerator.is_main_process:
            trainer.save(folder)

    if accelerator.is_main_process:
        write_json(folder / "expert.json", _expert_record(base, task, settings, seed))
        if trainer.has_lora:
            write_tensors(folder / "lora" / FILE, lora_factors(trainer.network, trainer.ema_parameters()))
        write_tensors(folder / "model.safetensors", trainer.result())
    accelerator.end_training()
    shutil.rmtree(folder / "state", ignore_errors=True)


def _record(trainer: Trainer, seconds_per_update: float) -> StepRecord:
    settings = trainer.settings
    loss, consistency_loss = (trainer.sums / trainer.num_summed).tolist()
    if not math.isfinite(loss):
        raise ValueError(
            f"{trainer.task.name}: the loss is {loss} at update {trainer.num_done}; lower the learning rate "
            f"({settings.learning_rate:g}) or raise the precision ({settings.mixed_precision})"
        )
    num_images = settings.batch_size * settings.accumulation * trainer.accelerator.num_processes
    return StepRecord(
        trainer.task.name,
        trainer.num_done,
        settings.num_updates,
        loss,
        consistency_loss,
        learning_rate_at(trainer.num_done - 1, settings),
        num_images / seconds_per_update,
        (settings.num_updates - trainer.num_done) * seconds_per_update,
        trainer.task.ranges.index(trainer.task.own) if trainer.task.own in trainer.task.ranges else None,
    )


def _log(trainer: Trainer, record: StepRecord, log: list[dict[str, Any]], folder: Path) -> None:
    """Write a validation's record to log.jsonl and the tracker, and start the next mean."""
    assert record.validation is not None
    losses = {"loss": record.loss, "consistency_loss": record.consistency_loss}
    distance = {} if record.distance is None else {"distance": record.distance}
    log.append({"update": record.update, **losses, "validation": record.validation, **distance})
    if trainer.accelerator.is_main_process:
        write_records(folder / "log.jsonl", log)
    by_range = {
        f"validation_loss/{r.low}-{r.high}": v for r, v in zip(trainer.task.ranges, record.validation, strict=True)
    }
    trainer.accelerator.log(losses | by_range | distance, trainer.num_done)
    trainer.sums.zero_()
    trainer.num_summed = 0


def _expert_record(base: Base, task: Task, settings: Training, seed: int) -> dict[str, Any]:
    return {
        "base_sha256": base.sha256,
        "seed": seed,
        **asdict(task),
        "training": settings.model_dump(mode="json"),
    }
