"""DiT: a transformer on latents, told a class, that also learns a variance."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from ..family import Encoders
from .latent import Latent
from .tiny import tiny_vae


class DiT(Latent):
    """DiTPipeline."""

    pipelines = ("DiTPipeline",)
    network = DiTTransformer2DModel
    component = "transformer"
    has_variance = True

    def classes(self, config: Any, index: dict[str, Any]) -> dict[str, int]:
        num_classes, names = config.num_embeds_ada_norm, index.get("id2label") or {}
        # The row after the classes' is the null class. The stock pipeline says 1000 for it, whatever their number.
        numbered = {str(i): i for i in range(num_classes)} | {"": num_classes}
        return numbered | {name.strip(): int(i) for i, several in names.items() for name in several.split(",")}

    def prepare(self, network: nn.Module) -> None:
        for module in network.modules():
            if isinstance(module, LabelEmbedding):
                # In training, every block would drop other labels than the next, and the teacher none.
                module.dropout_prob = 0.0

    def predict(self, network: Any, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        # The pipeline leaves the learned variance out.
        return network(x, t, return_dict=False, **condition)[0][:, : x.shape[1]]

    def output_layers(self, network: Any) -> dict[str, Any]:
        """Find the last layer of each block's feed-forward branch."""
        return {
            f"transformer_blocks.{i}": next(layer for layer in reversed(block.ff.net) if isinstance(layer, nn.Linear))
            for i, block in enumerate(network.transformer_blocks)
        }

    def usage(self, encoders: Encoders | None) -> tuple[str, str]:
        example = 'pipeline(class_labels=[0], num_inference_steps=50).images[0].save("image.png")'
        return "class-conditional-image-generation", example

    def save_tiny(self, folder: Path) -> Path:
        return save_dit(folder)


def tiny_dit(**changes: Any) -> DiTTransformer2DModel:
    """Build a DiTTransformer2DModel with a learned variance, for latents of 4 channels and 8×8 and 1,000 classes."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": 1000,
    }
    return DiTTransformer2DModel(**(arguments | changes))


def save_dit(folder: Path, transformer: DiTTransformer2DModel | None = None, names: Any = None) -> Path:
    """Save a DiTPipeline of random parts: 16×16 images, T = 40."""
    torch.manual_seed(1)
    scheduler = DDIMScheduler(num_train_timesteps=40, clip_sample=False)
    vae: Any = tiny_vae()
    names = names or {0: "tench, Tinca tinca", 1: "goldfish", 2: "shark"}
    pipeline: Any = DiTPipeline(transformer or tiny_dit(), vae.eval(), scheduler, names)  # type: ignore[arg-type]
    pipeline.save_pretrained(folder)
    # The constructor keeps the names for itself; in released pipelines they are in the index.
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
    return folder
