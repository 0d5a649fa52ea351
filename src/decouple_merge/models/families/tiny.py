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


def tiny_t5_parts(width: int) -> tuple[Any, Any]:
    """Build T5's tokenizer with letters as vocabulary, and the config of its encoder."""
    from transformers import T5Config, T5Tokenizer

    special = ["<pad>", "</s>", "<unk>"]
    # Unigram: each piece with its log-probability.
    vocabulary = [*((token, 0.0) for token in special), *((c, -2.0) for c in "▁" + string.ascii_lowercase)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=16)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_encoder_decoder=False
    )
    return tokenizer, config


def tiny_umt5_parts(width: int) -> tuple[Any, Any]:
    """Build T5's tokenizer with letters as vocabulary, and the config of an encoder of UMT5."""
    from transformers import UMT5Config

    tokenizer, config = tiny_t5_parts(width)
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "is_encoder_decoder")
    return tokenizer, UMT5Config(**{name: getattr(config, name) for name in names})


def tiny_qwen_parts(width: int) -> tuple[Any, Any]:
    """Build Qwen's tokenizer with bytes as vocabulary and a template of chats, and the config of a Qwen3 model."""
    from transformers import Qwen2Tokenizer, Qwen3Config

    letters = [*string.ascii_letters, *string.digits, "Ġ", "Ċ", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(letters)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], model_max_length=64)
    tokenizer.chat_template = "{% for m in messages %}user {{ m['content'] }}{% endfor %} assistant"
    config = Qwen3Config(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    return tokenizer, config
