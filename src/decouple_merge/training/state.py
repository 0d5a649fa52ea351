"""The state of a training in one safetensors file, from which it goes on bitwise."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..storage.files import read_tensors, write_tensors
from ..storage.reading import AGAIN, as_record, parse_json


def optimizer_states(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """List what an optimiser remembers of each parameter, in its own order; written into, it goes on from there.

    Its ``state_dict`` is not the same for all: bitsandbytes nests some tensors for FSDP.
    """
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


def save_state(
    path: Path, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, record: dict[str, Any]
) -> None:
    """Write the tensors of a training, what its optimiser remembers, and a JSON record; atomically.

    Args:
        tensors: parameters, averages and sums, by names of which none starts with ``optimizer.``.
    """
    stored = dict(tensors)
    for i, state in enumerate(optimizer_states(optimizer)):
        for key, value in state.items():
            # A count is a number in bitsandbytes; its codebooks are one tensor for all, which safetensors refuses.
            own = value.clone() if isinstance(value, Tensor) and key.startswith("qmap") else value
            stored[f"optimizer.{i}.{key}"] = own if isinstance(own, Tensor) else torch.tensor(own)
    write_tensors(path, stored, {"training": json.dumps(record)})


@torch.no_grad()
def load_state(path: Path, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read into the tensors and the optimiser, in place, what ``save_state`` wrote; returns the record.

    Raises:
        UserError: the file is missing, damaged or of another network.
    """
    stored, metadata = read_tensors(path)
    of_optimizer = {key: stored.pop(key) for key in list(stored) if key.startswith("optimizer.")}
    found, expected = ({k: tuple(v.shape) for k, v in side.items()} for side in (stored, tensors))
    if found != expected:
        first = next(k for k in {**expected, **found} if found.get(k) != expected.get(k))
        raise UserError(
            f"{path} is of another network: {first} is {found.get(first, 'missing')}, expected "
            f"{expected.get(first, 'none')}; remove the folder to start over"
        )
    for key, value in stored.items():
        tensors[key].copy_(value)
    states = optimizer_states(optimizer)
    device = optimizer.param_groups[0]["params"][0].device
    for key, value in of_optimizer.items():
        _, index, name = key.split(".")
        states[int(index)][name] = value.to(device) if value.is_floating_point() or value.dim() else value.item()
    return as_record(parse_json(metadata.get("training", ""), path, AGAIN), path, AGAIN)
