"""Random parts of tiny pipelines, for the families' ``save_tiny``: a VAE, and CLIP's tokenizer and text encoder."""

import json
import string
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL


def tiny_vae(latent_channels: int = 4, **changes: Any) -> AutoencoderKL:
    """Build an AutoencoderKL for colour images of 16×16, whose latents are 8×8."""
    arguments: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "latent_channels": latent_channels,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    return AutoencoderKL(**(arguments | changes))


def tiny_text_parts(folder: Path, width: int, vocabulary_size: int | None = None, **changes: Any) -> tuple[Any, Any]:
    """Build CLIP's tokenizer with letters as vocabulary, and the config of a text encoder.

    Args:
        folder: for files that are removed again.
    """
    from transformers import CLIPTextConfig, CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [*string.ascii_lowercase, *(c + "</w>" for c in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    arguments: dict[str, Any] = {
        "vocab_size": vocabulary_size or len(vocabulary),
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
        "pad_token_id": vocabulary["<|endoftext|>"],
    }
    return tokenizer, CLIPTextConfig(**(arguments | changes))
