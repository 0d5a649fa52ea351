"""Train one model on one timestep range: an expert, the baseline, or a base from nothing."""

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from .config import Data, Training
from .data import Images, held_out_images, to_model, training_batches
from .losses import add_noise, finetune_loss, per_sample_mse, prediction_target
from .models import Base, new_network, predict
from .projection import folded_state_dict, projection_parameters
from .runs import read_records, read_tensors, write_json, write_records, write_tensors
from .seeds import generator, stream_seed
from .timesteps import TimestepRange, draw_timesteps

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
    """Progress of a training: means over the updates since the last record, validation losses where just taken."""

    name: str
    update: int
    num_updates: int
    loss: float
    consistency_loss: float
    learning_rate: float
    images_per_second: float
    seconds_left: float
    validation: list[float] | None = None


def is_main_process() -> bool:
    """Say whether this is the process that writes; under ``torchrun`` or ``accelerate launch`` there are several."""
    return PartialState().is_main_process


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
    """Run with other parameter values; the network gets its own back, bit for bit."""
    parameters = [p.data for p in network.parameters()]
    kept = [p.clone() for p in parameters]
    torch._foreach_copy_(parameters, values)
    try:
        yield
    finally:
        torch._foreach_copy_(parameters, kept)


@torch.no_grad()
def validation_losses(
    network: nn.Module,
    images: UInt8[Tensor, "n c h w"],
    base: Base,
    ranges: tuple[TimestepRange, ...],
    device: torch.device,
    batch_size: int = 128,
) -> list[float]:
    """Compute the denoising loss on each range, always on the same noise and on evenly spread timesteps.

    Args:
        images: held-out images, uint8.

    Returns:
        The mean squared error in the units of the network's output, one number for each range.
    """
    x0 = to_model(images)
    noise = torch.randn(x0.shape, generator=generator("validation noise"))
    losses = []
    for own in ranges:
        t = (own.low + (torch.arange(len(x0)) + 0.5) / len(x0) * (own.high - own.low)).long()
        x_t = add_noise(x0, noise, t, base.alphas_cumprod)
        target = prediction_target(x0, noise, t, base.alphas_cumprod, base.prediction_type)
        total = 0.0
        for batch in torch.arange(len(x0)).split(batch_size):
            output = predict(network, x_t[batch].to(device), t[batch].to(device))
            total += float(per_sample_mse(output, target[batch].to(device)).double().sum())
        losses.append(total / len(x0))
    return losses


class Trainer:
    """The state of a training run: network, EMA, optimiser, and the number of updates done."""

    def __init__(self, base: Base, task: Task, settings: Training, accelerator: Accelerator) -> None:
        self.network = new_network(base, task.projection)
        self.network.train()
        scaled = {id(p) for p in projection_parameters(self.network)}
        parameters = list(self.network.parameters())
        groups = [
            {"params": [p for p in parameters if id(p) not in scaled], "scale": 1.0},
            {"params": [p for p in parameters if id(p) in scaled], "scale": task.projection_rate_scale},
        ]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            eps=settings.eps,
            fused=True,
        )
        if settings.compile:
            self.network.compile()
        self.wrapped, self.optimizer = accelerator.prepare(self.network, optimizer)
        self.parameters = list(self.network.parameters())
        self.ema = [p.detach().clone() for p in self.parameters]
        self.accelerator = accelerator
        self.num_done = 0

    def ema_parameters(self) -> dict[str, Tensor]:
        names = [name for name, _ in self.network.named_parameters()]
        return dict(zip(names, self.ema, strict=True))

    def validate(
        self, held_out: UInt8[Tensor, "n c h w"], base: Base, ranges: tuple[TimestepRange, ...]
    ) -> list[float]:
        """Compute the validation losses of the averaged weights; the network's own are untouched."""
        self.network.eval()
        with swapped(self.network, self.ema), self.accelerator.autocast():
            losses = validation_losses(self.network, held_out, base, ranges, self.accelerator.device)
        self.network.train()
        return losses

    def save(self, folder: Path, task: Task) -> None:
        """Write weights, EMA and optimiser as one safetensors file, replaced atomically."""
        if not self.accelerator.is_main_process:
            return
        tensors: dict[str, Tensor] = {f"network.{i}": p for i, p in enumerate(self.parameters)}
        tensors |= {f"ema.{i}": p for i, p in enumerate(self.ema)}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
        metadata = {"num_done": str(self.num_done), "task": json.dumps(asdict(task)), "scaler": json.dumps(scaler)}
        write_tensors(folder / "state" / "state.safetensors", tensors, metadata)

    def load(self, folder: Path) -> None:
        """Continue from a saved state, if there is one.

        Raises:
            ValueError: the state is damaged or of another network.
        """
        path = folder / "state" / "state.safetensors"
        if not path.exists():
            return
        tensors, metadata = read_tensors(path)
        try:
            with torch.no_grad():
                for i, (p, e) in enumerate(zip(self.parameters, self.ema, strict=True)):
                    p.copy_(tensors[f"network.{i}"])
                    e.copy_(tensors[f"ema.{i}"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"{path} is the state of another network ({error}); remove the folder to start over"
            ) from error
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(json.loads(metadata["scaler"]))
        self.num_done = int(metadata["num_done"])


def train(
    base: Base,
    images: Images,
    data: Data,
    task: Task,
    settings: Training,
    seed: int,
    folder: Path,
) -> Iterator[StepRecord]:
    """Train a copy of the base on one task; yields progress, leaves the folded EMA weights in ``folder``.

    Update s depends only on (seed, task.name, rank, s): a run that was killed goes on bitwise as if it had not
    been. Records go to ``folder/log.jsonl``, the state to ``folder/state/`` until the training is finished.

    Returns:
        Nothing; the result is ``folder/model.safetensors`` (EMA weights, stock keys) and ``expert.json``.
    """
    if (folder / "model.safetensors").exists():
        shutil.rmtree(folder / "state", ignore_errors=True)
        return
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_dir=folder / "tracker",
    )
    if settings.tracker != "none":
        accelerator.init_trackers(task.name)
    trainer = Trainer(base, task, settings, accelerator)
    trainer.load(folder)
    device = accelerator.device
    teacher = None
    if task.consistency_weight:
        teacher = new_network(base).to(device).requires_grad_(False).eval()
        if settings.compile:
            teacher.compile()
    held_out = held_out_images(images, data)
    alphas_cumprod = base.alphas_cumprod.to(device)
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = training_batches(
        images,
        data,
        settings.batch_size,
        stream_seed(seed, task.name),
        trainer.num_done * settings.accumulation,
        settings.num_updates * settings.accumulation,
        rank,
        world,
    )
    log = [r for r in read_records(folder / "log.jsonl") if r["update"] <= trainer.num_done]
    sums = torch.zeros(2, device=device)
    num_summed, started = 0, time.monotonic()
    shown = started

    for update in range(trainer.num_done, settings.num_updates):
        rate = learning_rate_at(update, settings)
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        for micro in range(settings.accumulation):
            step = update * settings.accumulation + micro
            last = micro == settings.accumulation - 1
            # Dropout draws from the global stream, which only a seed of its own makes a function of the step.
            torch.manual_seed(stream_seed(seed, task.name, "dropout", rank, step))
            with nullcontext() if last else accelerator.no_sync(trainer.wrapped):
                loss, denoising, consistency = _micro_step(
                    trainer.wrapped, teacher, next(batches), alphas_cumprod, base, task, settings,
                    generator(seed, task.name, "noise", rank, step), accelerator,
                )  # fmt: skip
                accelerator.backward(loss / settings.accumulation)
            sums += torch.stack([denoising.detach(), consistency.detach()])
        accelerator.clip_grad_norm_(trainer.parameters, settings.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        decay = ema_decay(update, settings.ema.max_decay, settings.ema.power)
        with torch.no_grad():
            torch._foreach_lerp_(trainer.ema, [p.data for p in trainer.parameters], 1 - decay)
        trainer.num_done = update + 1
        num_summed += settings.accumulation

        finished = trainer.num_done == settings.num_updates
        if trainer.num_done % settings.checkpoint_every == 0 and not finished:
            trainer.save(folder, task)
        validates = trainer.num_done % settings.validate_every == 0 or finished
        if not validates and time.monotonic() - shown < SECONDS_BETWEEN_RECORDS:
            continue
        shown = time.monotonic()
        seconds = shown - started
        loss, consistency_loss = (sums / num_summed).tolist()
        if not math.isfinite(loss):
            raise ValueError(
                f"{task.name}: the loss is {loss} at update {trainer.num_done}; lower the learning rate "
                f"({settings.learning_rate:g}) or raise the precision ({settings.mixed_precision})"
            )
        record = StepRecord(
            task.name,
            trainer.num_done,
            settings.num_updates,
            loss,
            consistency_loss,
            rate,
            num_summed * settings.batch_size * world / seconds,
            (settings.num_updates - trainer.num_done) * settings.accumulation * seconds / num_summed,
        )
        if validates:
            validation = trainer.validate(held_out, base, task.ranges)
            record = replace(record, validation=validation)
            log.append(
                {
                    "update": trainer.num_done,
                    "loss": loss,
                    "consistency_loss": consistency_loss,
                    "validation": validation,
                }
            )
            if accelerator.is_main_process:
                write_records(folder / "log.jsonl", log)
            by_range = {f"validation_loss/{r.low}-{r.high}": v for r, v in zip(task.ranges, validation, strict=True)}
            accelerator.log({"loss": loss, "consistency_loss": consistency_loss} | by_range, trainer.num_done)
            sums.zero_()
            num_summed, started = 0, time.monotonic()
        yield record

    if accelerator.is_main_process:
        weights = folded_state_dict(trainer.network, trainer.ema_parameters())
        write_json(folder / "expert.json", _expert_record(base, task, settings, seed))
        write_tensors(folder / "model.safetensors", weights)
    accelerator.end_training()
    shutil.rmtree(folder / "state", ignore_errors=True)


def _micro_step(
    network: nn.Module,
    teacher: nn.Module | None,
    pixels: UInt8[Tensor, "batch c h w"],
    alphas_cumprod: Float[Tensor, " T"],
    base: Base,
    task: Task,
    settings: Training,
    draws: torch.Generator,
    accelerator: Accelerator,
) -> tuple[Tensor, Tensor, Tensor]:
    device = accelerator.device
    x0 = to_model(pixels.to(device))
    t = draw_timesteps(len(x0), task.own, len(alphas_cumprod), task.global_prob, draws, settings.antithetic).to(device)
    noise = torch.randn(x0.shape, generator=draws).to(device)
    x_t = add_noise(x0, noise, t, alphas_cumprod)
    target = prediction_target(x0, noise, t, alphas_cumprod, base.prediction_type)
    with accelerator.autocast():
        teacher_output = None
        if teacher is not None:
            with torch.no_grad():
                teacher_output = predict(teacher, x_t, t)
        output = predict(network, x_t, t)
    return finetune_loss(output, target, teacher_output, task.consistency_weight)


def _expert_record(base: Base, task: Task, settings: Training, seed: int) -> dict[str, Any]:
    return {
        "base_sha256": base.sha256,
        "seed": seed,
        **asdict(task),
        "training": settings.model_dump(mode="json"),
    }
