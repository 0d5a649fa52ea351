"""What a run costs on many GPUs: operations counted on networks without memory, times from stated assumptions.

    python benchmarks/scale.py

Nothing is trained or drawn. A forward pass is counted by torch's FLOP counter on the meta device. A GPU is assumed to
do so many of its operations a second; the search's schedule is that of benchmarks/schedule.py.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from decouple_merge.config import Config, load_config
from schedule import batches_of, makespan, num_shares

CONFIGS = Path(__file__).parents[1] / "configs"
# Of the pretrained, the equally finetuned, the ensemble and the merged model.
NUM_MODELS = 4


def stable_diffusion() -> tuple[Any, dict[str, Any]]:
    """Build the U-Net of Stable Diffusion 1.x, and its input at 512 × 512."""
    network = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return network, {
        "sample": torch.empty(1, 4, 64, 64),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, 77, 768),
    }


def flux() -> tuple[Any, dict[str, Any]]:
    """Build the transformer of FLUX.1-dev, and its input at 1024 × 1024: 4,096 tokens of image, 512 of text."""
    network = FluxTransformer2DModel(guidance_embeds=True)
    return network, {
        "hidden_states": torch.empty(1, 4096, 64),
        "encoder_hidden_states": torch.empty(1, 512, 4096),
        "pooled_projections": torch.empty(1, 768),
        "timestep": torch.empty(1),
        "guidance": torch.empty(1),
        "img_ids": torch.empty(4096, 3),
        "txt_ids": torch.empty(512, 3),
    }


def count(build: Any) -> tuple[int, float]:
    """Count a network's parameters, and the operations of a forward pass of one image, in 10^12 (TFLOP)."""
    with torch.device("meta"), torch.no_grad():
        network, inputs = build()
        with FlopCounterMode(display=False) as counter:
            network(**inputs)
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() / 1e12


def stages(
    config: Config, forward: float, is_lora: bool, num_gpus: int, speed: float, shared: float
) -> dict[str, float]:
    """Estimate the hours of each stage.

    Args:
        forward: TFLOP of an image.
        speed: TFLOP a GPU does in an hour.
        shared: speed of a GPU that trains with others beside its speed alone.
    """
    finetune, guided = config.finetune, 2 if config.text.guidance_scale > 1 else 1
    # Backward is twice a forward pass, or once where weights don't learn; checkpointing makes another, consistency too.
    passes = 1 + (1 if is_lora else 2) + finetune.gradient_checkpointing + (finetune.consistency_weight > 0)
    images = finetune.num_updates * finetune.batch_size * finetune.accumulation
    expert = images * passes * forward / speed
    # One training on each GPU, or several GPUs to a training; the baseline is as long as all experts.
    trainings = [expert * finetune.num_ranges, *[expert] * finetune.num_ranges] if finetune.baseline else []
    trainings = trainings or [expert] * finetune.num_ranges
    longest = max(trainings) / max(1.0, shared * num_gpus / len(trainings))
    took, _ = makespan(batches_of(config), num_gpus, config.sample, 0.1)
    sets, num_each = NUM_MODELS * config.evaluate.num_seed_sets, num_shares(config.evaluate.num_images, config.sample)
    drawn = config.evaluate.num_images * config.sample.num_steps * guided * forward / speed
    return {
        "trainings": max(longest, sum(trainings) / num_gpus),
        "search": took * guided * forward / speed,
        "evaluation": drawn * -(-sets * num_each // num_gpus) / num_each,
    }


def main() -> None:
    """Print a table for each setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of the GPU, bf16; an H100 SXM by default")
    parser.add_argument("--share", type=float, default=0.35, help="of the peak that is reached")
    parser.add_argument("--shared", type=float, default=0.9, help="speed of a GPU that trains with others")
    arguments = parser.parse_args()
    speed = arguments.peak * arguments.share * 3600
    lora = ["search.batch_size=8", "finetune.batch_size=1", "finetune.accumulation=32", "text.guidance_scale=1"]
    lora += ["finetune.num_updates=4000", "sample.num_steps=28", "search.num_images=1000", "evaluate.num_images=5000"]
    settings = [
        (
            "SD 1.4, configs/sd14.yaml",
            stable_diffusion,
            load_config(CONFIGS / "sd14.yaml", ["search.batch_size=8"]),
            False,
        ),
        ("FLUX.1, LoRA", flux, load_config(CONFIGS / "sd14.yaml", lora), True),
    ]
    for name, build, config, is_lora in settings:
        num, forward = count(build)
        print(f"{name}: {num / 1e9:.2f} G parameters, {forward:.2f} TFLOP a forward pass of an image")
        print("GPUs | trainings, h | search, h | evaluation, h | all, h | GPU hours")
        for num_gpus in (1, 8, 64):
            hours = stages(config, forward, is_lora, num_gpus, speed, arguments.shared)
            total = sum(hours.values())
            each = " | ".join(f"{value:.1f}" for value in hours.values())
            print(f"{num_gpus} | {each} | {total:.1f} | {total * num_gpus:.0f}")


if __name__ == "__main__":
    main()
