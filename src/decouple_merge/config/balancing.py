"""How a training balances its timesteps by weights that it learns, and clusters of timesteps."""

from typing import Any, Literal

from pydantic import model_validator

from ..errors import UserError
from .numbers import PositiveFloat, PositiveInt
from .paths import FilePath
from .section import Section

Cost = Literal["timestep", "log_snr", "gradient"]


class Clusters(Section):
    """Contiguous clusters of timesteps that are alike (ANT, Go et al. 2023).

    Attributes:
        clusters: by what they are: ``timestep``, of equal size; ``log_snr``; or ``gradient``, by the similarity of the
            loss's gradients.
        similarity: of ``gradient``: the file that ``deme analyze RUN --only gradient-similarity`` wrote.
    """

    clusters: Cost
    similarity: FilePath | None = None

    @model_validator(mode="after")
    def _similarity_of_gradients(self) -> "Clusters":
        if (self.clusters == "gradient") != (self.similarity is not None):
            raise UserError(
                f"clusters is {self.clusters} and similarity is {self.similarity}; the cost gradient needs that "
                "file of deme analyze, and the others none"
            )
        return self


class Balancing(Clusters):
    """Weights of the losses of timesteps that are learned while a network is trained; its method may stand for it.

    Attributes:
        method: ``uncertainty``, a continuous u(t) (Karras et al. 2024: EDM2); for all others each batch is cut evenly
            among clusters of timesteps: ``ant_uw``, one uncertainty for each (Kendall et al. 2018); ``ant_nash``
            (Navon et al. 2022); ``pcgrad`` (Yu et al. 2020).
        num_clusters: k; a batch has at least one image for each.
        learning_rate: of the uncertainties, under the schedule of the network's; None is the network's own for
            ``uncertainty`` and 0.025 for ``ant_uw``.
        solve_every: updates between two bargains of ``ant_nash``, each of k backward passes.
    """

    method: Literal["uncertainty", "ant_uw", "ant_nash", "pcgrad"]
    clusters: Cost = "timestep"
    num_clusters: PositiveInt = 5
    learning_rate: PositiveFloat | None = None
    solve_every: PositiveInt = 25

    @model_validator(mode="after")
    def _read_by_the_method(self) -> "Balancing":
        read = {
            "clusters": self.cuts_batches,
            "num_clusters": self.cuts_batches,
            "learning_rate": self.method in ("uncertainty", "ant_uw"),
            "solve_every": self.method == "ant_nash",
        }
        for name, is_read in read.items():
            if not is_read and getattr(self, name) != type(self).model_fields[name].default:
                raise UserError(f"balancing is {self.method}, which reads no {name}: leave it out")
        return self

    @property
    def cuts_batches(self) -> bool:
        """Whether each batch has equal parts of all clusters."""
        return self.method != "uncertainty"


def by_method(balancing: Any) -> Any:
    """Let a method's name stand for the section."""
    return {"method": balancing} if isinstance(balancing, str) else balancing
