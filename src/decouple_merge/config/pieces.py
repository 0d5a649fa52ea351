"""Where the independent pieces of a work run."""

from typing import Any

from .numbers import PositiveInt
from .ray import Ray
from .section import Section


class Pieces(Section):
    """Where the independent pieces of a work run; results don't depend on it.

    Attributes:
        num_processes: pieces at once, each with its models in its memory; on one machine GPUs are taken in turn.
        executor: a file of ``executors/`` by name: ``local`` is this machine, ``ray`` a cluster.
    """

    num_processes: PositiveInt = 1
    executor: str = "local"
    ray: Ray = Ray()

    @property
    def executor_options(self) -> dict[str, Any]:
        """What the executor is told besides: the section of its name."""
        return self.ray.model_dump() if self.executor == "ray" else {}

    @property
    def where(self) -> tuple[int, str, dict[str, Any]]:
        """What ``executors.run_all`` is told of it."""
        return self.num_processes, self.executor, self.executor_options
