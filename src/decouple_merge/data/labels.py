"""Images with their classes, as a class-conditional network on pixels is trained."""

import hashlib
from collections.abc import Hashable, Sequence

from ..models.family import Encoders
from .batches import LabelledBatch
from .images import Images
from .latents import ClassLabels


class LabelledImages:
    """Images and the class of each.

    Raises:
        ValueError: a caption is no class.
    """

    def __init__(self, encoders: Encoders, images: Images, captions: list[str]) -> None:
        self.captions, self.images = captions, images
        self.labels: Sequence[Hashable] = captions
        self.class_names = captions
        self.groups = images.groups
        self.classes = ClassLabels(encoders, captions)
        identity = f"images {images.sha256}, {self.classes.identity}, {captions}"
        self.sha256 = hashlib.sha256(identity.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.captions)

    def stack(self, indices: Sequence[int]) -> LabelledBatch:
        """Load several examples as one batch."""
        return LabelledBatch(self.images.stack(indices), self.classes.embed([self.captions[i] for i in indices]))
