"""What the section ``sample`` asks of a base, checked before anything is drawn."""

from ..config import Sample
from ..models.base import Base
from ..models.schedulers import make_scheduler


def check_sample(base: Base, settings: Sample, num_steps: int | None = None) -> None:
    """Require that the sampler exists and takes so many steps; None is the settings' own number.

    Raises:
        ValueError: it doesn't.
    """
    make_scheduler(base, settings.sampler, num_steps or settings.num_steps, settings.timestep_spacing)
