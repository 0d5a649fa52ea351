"""CLIP's tokenizer and text encoder from nothing: byte pairs learned from texts, and a network that reads them."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Bool, Int
from torch import Tensor

from ..errors import UserError, is_ours
from .encoders import import_transformers


def learn_byte_pairs(words: Counter[str], num_merges: int) -> list[tuple[str, str]]:
    """Learn which neighbouring symbols of words are merged, in order (Sennrich et al. 2016, Algorithm 1).

    Of pairs that are equally frequent the first in order of code points is taken: ``tokenizers`` leaves that to chance.

    Args:
        words: how often each occurs; its last character is another symbol than within a word, with ``</w>``.
    """
    split: dict[str, list[str]] = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < num_merges:
        counts: Counter[tuple[str, str]] = Counter()
        for word, symbols in split.items():
            for pair in pairwise(symbols):
                counts[pair] += words[word]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for symbols in split.values():
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = ["".join(best)]
                i += 1
    return merges


def create_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """Make CLIP's tokenizer with byte pairs learned from some texts; as CLIP's own, it knows every byte.

    Args:
        vocab_size: at least 514, for bytes within and at the end of words, start and end; less than this where the
            texts have no more pairs.

    Raises:
        UserError: transformers isn't installed.
    """
    transformers = import_transformers("a text encoder")
    from tokenizers.pre_tokenizers import ByteLevel

    def clip_tokenizer(merges: list[tuple[str, str]]) -> Any:
        letters = sorted(ByteLevel.alphabet())
        symbols = [*letters, *(c + "</w>" for c in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
        with TemporaryDirectory() as folder:
            vocab, lines = Path(folder, "vocab.json"), Path(folder, "merges.txt")
            vocab.write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}), encoding="utf-8")
            lines.write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n", encoding="utf-8")
            return transformers.CLIPTokenizerFast(str(vocab), str(lines))

    backend = clip_tokenizer([]).backend_tokenizer
    words: Counter[str] = Counter()
    for text in texts:
        words.update(w for w, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)))
    return clip_tokenizer(learn_byte_pairs(words, vocab_size - 514))


def create_text_encoder(tokenizer: Any, arguments: dict[str, Any], seed: int) -> Any:
    """Make an untrained CLIPTextModel that reads a tokenizer's tokens, and tell the tokenizer how many.

    Args:
        arguments: of CLIPTextConfig.

    Raises:
        UserError: transformers doesn't accept the arguments.
    """
    transformers = import_transformers("a text encoder")
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            config = transformers.CLIPTextConfig(**arguments, **ends, vocab_size=len(tokenizer))
            text_encoder = transformers.CLIPTextModel(config)
        # transformers wraps its ValueError in an error of another kind.
        except (TypeError, ValueError, StrictDataclassError) as error:
            if is_ours(error):
                raise
            raise UserError(f"pretrain.text_encoder.model: {error}") from error
    tokenizer.model_max_length = config.max_position_embeddings
    return text_encoder


def tokenize(tokenizer: Any, texts: Sequence[str]) -> tuple[Int[Tensor, "n l"], Bool[Tensor, "n l"]]:
    """Turn texts to tokens as diffusers' pipelines do, and say which are the text's, its start and end included."""
    found = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
    return found.input_ids, found.attention_mask.bool()


def load_text_parts(folder: Path) -> tuple[Any, Any]:
    """Read a tokenizer, and make a CLIPTextModel, whose weights are still to come, from a config.

    Raises:
        OSError, ValueError: a file is missing or damaged.
    """
    transformers = import_transformers("a text encoder")
    config = transformers.CLIPTextConfig.from_pretrained(folder, local_files_only=True)
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    with torch.random.fork_rng(devices=[]):
        return tokenizer, transformers.CLIPTextModel(config)
