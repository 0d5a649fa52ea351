"""How pieces of work run as tasks of a Ray cluster."""

from .numbers import NonNegativeFloat, NonNegativeInt, PositiveFloat
from .section import Section


class Ray(Section):
    """What ``executor: ray`` needs to know.

    Attributes:
        address: of the cluster: ``auto`` is the one of this machine, ``host:port`` another. None is that of
            $RAY_ADDRESS, which ``ray job submit`` sets, and else one that starts and ends with the command.
        num_cpus: of a piece, which are its threads.
        num_gpus: of a piece; None is one where a node has any.
        num_retries: how often a piece is done again elsewhere whose node or process died.
    """

    address: str | None = None
    num_cpus: PositiveFloat = 1.0
    num_gpus: NonNegativeFloat | None = None
    num_retries: NonNegativeInt = 10
