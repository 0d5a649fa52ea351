"""Latents and text embeddings, computed once and kept in the cache folder, where all experts read them."""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from ..config import Data
from ..errors import UserError
from ..models.family import Encoders
from ..models.parts import check_classes, encoder_sha256, load_text_encoders, load_vae
from ..storage.files import cache_folder, read_tensors, write_tensors
from ..storage.locks import make_once
from .batches import LatentBatch
from .images import Images, to_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A killed computation goes on at the file it was at.
ROWS_PER_FILE = 1024
ENCODED_AT_ONCE = 16
# Of the files; another has another folder.
FORMAT = 2

Rows = dict[str, Tensor]


@cache
def _read_rows(path: Path, identity: str) -> Rows:
    """Map the rows of a file: the operating system reads what is asked for, and processes share it."""
    tensors, metadata = read_tensors(path)
    found = metadata.get("made_from")
    if found != identity:
        raise UserError(f"{path} was made from {found}, expected {identity}; remove it to have it made again")
    return tensors


class CachedRows:
    """Rows of some tensors, which an encoder computes once; files of the cache folder hold them.

    Attributes:
        identity: all that the rows depend on, encoders and data among it; files of another are refused.
        num_rows: how many there are.
    """

    def __init__(self, kind: str, identity: str, num_rows: int, precision: str) -> None:
        self.kind, self.num_rows, self.precision = kind, num_rows, precision
        self.identity = f"{identity}, {precision}"
        self.folder = cache_folder() / kind / hashlib.sha256(f"{self.identity}, {FORMAT}".encode()).hexdigest()[:24]

    def open_encoder(self) -> Callable[[Sequence[int]], Rows]:
        """Load what computes rows of the given indices; it leaves memory with the function."""
        raise NotImplementedError

    def _path(self, index: int) -> Path:
        return self.folder / f"{index // ROWS_PER_FILE:05}.safetensors"

    def fill(self) -> Iterator[str]:
        """Compute what the cache lacks; yields a line after each file."""
        missing = [i for i in range(0, self.num_rows, ROWS_PER_FILE) if not self._path(i).exists()]
        if not missing:
            return
        opened = cache(self.open_encoder)
        for first in missing:
            last = min(first + ROWS_PER_FILE, self.num_rows)
            make_once(self._path(first), partial(self._compute, opened, range(first, last)))
            yield f"{self.kind}: {last:,} of {self.num_rows:,} computed"

    def _compute(self, opened: Callable[[], Callable[[Sequence[int]], Rows]], indices: range) -> None:
        encode, dtype, found = opened(), DTYPES[self.precision], list[Rows]()
        for i in torch.tensor(indices).split(ENCODED_AT_ONCE):
            # Off the device at once, where the encoders leave little room.
            found.append({name: value.to("cpu", dtype) for name, value in encode(i.tolist()).items()})
        rows = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        write_tensors(self._path(indices.start), rows, {"made_from": self.identity})

    def read(self, indices: Sequence[int]) -> Rows:
        """Read some rows, in float32; computes what the cache lacks.

        Raises:
            UserError: a file is damaged, or was made from other data or by other encoders.
        """
        if not all(self._path(i).exists() for i in indices):
            for _ in self.fill():
                pass
        files = [_read_rows(self._path(i), self.identity) for i in indices]
        return {
            name: torch.stack([f[name][i % ROWS_PER_FILE] for f, i in zip(files, indices, strict=True)]).float()
            for name in files[0]
        }


class ImageLatents(CachedRows):
    """Mean and log-variance of the latents of images, [n, views, 2, z, h, w]; a second view is mirrored."""

    def __init__(self, encoders: Encoders, images: Images, size: int, data: Data, device: torch.device) -> None:
        self.encoders, self.images, self.device, self.mirrored = encoders, images, device, data.flip
        vae = encoder_sha256(encoders, "vae")
        identity = f"images {images.sha256} of {size}x{size}{' and mirrored' if data.flip else ''}, vae {vae}"
        super().__init__("latents", identity, len(images), data.cache_precision)

    def open_encoder(self) -> Callable[[Sequence[int]], Rows]:
        vae = load_vae(self.encoders, self.device)

        def encode(indices: Sequence[int]) -> Rows:
            pixels = to_model(self.images.stack(indices)).to(self.device)
            views = [pixels, pixels.flip(-1)] if self.mirrored else [pixels]
            return {"moments": torch.stack([self.encoders.family.encode_images(vae, view) for view in views], 1)}

        return encode


class TextEmbeddings(CachedRows):
    """The embeddings of some texts, and of the empty one."""

    def __init__(self, encoders: Encoders, texts: Iterable[str], precision: str, device: torch.device) -> None:
        self.encoders, self.device = encoders, device
        # Sorted, so that the captions in any order, as training and sampling have them, are the same rows.
        self.index = {text: i for i, text in enumerate(sorted({"", *texts}))}
        digest = hashlib.sha256(repr(list(self.index)).encode()).hexdigest()
        encoder = encoder_sha256(encoders, *encoders.text_parts)
        empty = ", zeros for the empty one" if encoders.zeros_for_empty else ""
        # Pipelines may share encoders of texts, and one alone tell its denoiser a guidance with them.
        told = ", with a guidance" if encoders.guidance == "embedded" else ""
        super().__init__("texts", f"texts {digest}{empty}, text encoder {encoder}{told}", len(self.index), precision)

    def open_encoder(self) -> Callable[[Sequence[int]], Rows]:
        pipeline, texts = load_text_encoders(self.encoders, self.device), list(self.index)
        return lambda indices: self.encoders.family.encode_texts(pipeline, [texts[i] for i in indices])

    def embed(self, texts: Sequence[str]) -> Rows:
        """Look up the embeddings of some of the texts, [n, ...], by the names of the denoiser's inputs."""
        return self.read([self.index[text] for text in texts])


class ClassLabels:
    """Classes in the place of embeddings of texts: there is nothing to compute.

    Raises:
        UserError: a text is no class.
    """

    def __init__(self, encoders: Encoders, texts: Iterable[str]) -> None:
        assert encoders.classes is not None
        check_classes(encoders, texts)
        self.classes = encoders.classes
        self.identity = f"classes {hashlib.sha256(repr(self.classes).encode()).hexdigest()}"

    def fill(self) -> Iterator[str]:
        """Compute nothing."""
        yield from ()

    def embed(self, texts: Sequence[str]) -> Rows:
        """Look up the numbers of some classes, int64 [n], by the name of the denoiser's input."""
        return {"class_labels": torch.tensor([self.classes[text] for text in texts])}


def open_texts(
    encoders: Encoders, texts: Iterable[str], precision: str, device: torch.device
) -> TextEmbeddings | ClassLabels:
    """Open what a denoiser is told of some texts.

    Raises:
        UserError: a text is no class of a class-conditional pipeline.
    """
    return ClassLabels(encoders, texts) if encoders.classes else TextEmbeddings(encoders, texts, precision, device)


class Latents:
    """Captioned images as a latent model is trained on them; for a class-conditional one a caption is a class.

    Attributes:
        sha256: identifies the content.
    """

    def __init__(
        self, encoders: Encoders, images: Images, captions: list[str], size: int, data: Data, device: torch.device
    ) -> None:
        self.captions, self.images, self.sizes_input = captions, images, encoders.family.sizes_input
        self.labels: Sequence[Hashable] = captions if encoders.classes else images.labels
        self.class_names = captions if encoders.classes else images.class_names
        self.groups = images.groups
        self.latents = ImageLatents(encoders, images, size, data, device)
        self.texts = open_texts(encoders, captions, data.cache_precision, device)
        identity = f"{self.latents.identity}, {self.texts.identity}, {captions}"
        if self.sizes_input:
            frames = images.frames(range(len(images)))
            identity += f", cut {hashlib.sha256(frames.numpy().data).hexdigest()}"
        self.sha256 = hashlib.sha256(identity.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.captions)

    def fill(self) -> Iterator[str]:
        """Compute what the cache lacks; yields lines for the user. The encoders leave memory at the end."""
        # Texts first: they take minutes where images take hours, and parts that don't fit show there.
        yield from self.texts.fill()
        yield from self.latents.fill()

    def stack(self, indices: Sequence[int]) -> LatentBatch:
        """Read several examples as one batch."""
        condition = self.texts.embed([self.captions[i] for i in indices])
        empty = {name: value[0] for name, value in self.texts.embed([""]).items()}
        if self.sizes_input:
            condition[self.sizes_input] = self.images.frames(indices)
        return LatentBatch(self.latents.read(indices)["moments"], condition, empty)
