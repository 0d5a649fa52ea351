"""The section ``distil``: the experts' outputs, pulled into the merged model."""

from pydantic import model_validator

from ..errors import UserError
from .numbers import PositiveFloat, PositiveInt
from .training import Training


class Distil(Training):
    """Training of the merged model towards the experts, each on its own range, in few updates at a small rate."""

    num_updates: PositiveInt = 500
    learning_rate: PositiveFloat = 1e-4
    validate_every: PositiveInt = 250
    checkpoint_every: PositiveInt = 250

    @model_validator(mode="after")
    def _density_of_experts(self) -> "Distil":
        if self.density is not None:
            raise UserError("distil.density is set, and timesteps are drawn as the experts': set finetune.density")
        return self
