"""The check that a compiled network has the gradients of the eager one."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError


def differing_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Name the parameters whose gradient is missing or off by over half its norm; rounding stays far below."""
    return [
        name
        for name, gradient in expected.items()
        if name not in found or (found[name] - gradient).norm() > 0.5 * gradient.norm()
    ]


def check_compiled(gradients: Callable[[], dict[str, Tensor]], device: torch.device) -> None:
    """Refuse a compiled network whose gradients are not the eager ones: one with layers cut off still trains.

    Args:
        gradients: computes them by name, each time on the same batch.

    Raises:
        UserError: as said.
    """
    found = []
    for stance in ("default", "force_eager"):
        torch.manual_seed(0)
        with torch.compiler.set_stance(stance):
            found.append(gradients())
    wrong = differing_gradients(*found)
    if wrong:
        raise UserError(
            f"torch.compile changes the gradients of {len(wrong)} parameters, {', '.join(wrong[:3])} among them, "
            f"which is a fault of torch {torch.__version__} on {device}: set compile to false"
        )
