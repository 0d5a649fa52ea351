"""A feature network together with the reference that images are compared with in its features."""

import torch

from ..config import Evaluate
from ..data.images import Images
from .features import Extractor, load_extractor, weights_of
from .references import Reference, make_reference


def open_extractor(name: str, settings: Evaluate, device: torch.device) -> Extractor:
    """Load a feature network that a run's metrics are measured on."""
    # Networks draw weights before they load theirs.
    with torch.random.fork_rng(devices=[]):
        return load_extractor(name, device, weights_of(name, settings.inception_weights, settings.encoders))


def open_compared(
    name: str, settings: Evaluate, source: str, references: Images, device: torch.device
) -> tuple[Extractor, Reference]:
    """Load a feature network, and compute or read from the cache what images are compared with.

    Args:
        source: the name of the data that the references are of, as records carry it.
    """
    extractor = open_extractor(name, settings, device)
    return extractor, make_reference(source, references, extractor, settings.num_reference_images)
