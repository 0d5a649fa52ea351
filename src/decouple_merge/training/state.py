"""The state of a training in one safetensors file, from which it goes on bitwise."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..executors.sharding import as_part_of, own_part
from ..storage.files import read_tensors, write_tensors
from ..storage.reading import AGAIN, as_record, parse_json

# Of a network that is shared out: which process this is, of how many.
Part = tuple[int, int]


def state_path(folder: Path, update: int, part: Part | None = None) -> Path:
    """Say where the state of a training is written: one file, or in a folder of the update one of each process."""
    return folder / "state.safetensors" if part is None else folder / str(update) / f"{part[0]}.safetensors"


def saved_state(folder: Path, part: Part | None = None) -> Path | None:
    """Find the state to go on from, of the newest update that all processes have written; None where there is none.

    Raises:
        UserError: the training was shared out otherwise.
    """
    updates = sorted(int(path.name) for path in folder.glob("[0-9]*"))
    if updates if part is None else state_path(folder, 0).exists():
        other = "full" if part is None else "none"
        raise UserError(f"{folder} is of a training whose sharding was {other}: put that back, or {AGAIN}")
    if part is None:
        return state_path(folder, 0) if state_path(folder, 0).exists() else None
    whole = [u for u in updates if all(state_path(folder, u, (rank, part[1])).exists() for rank in range(part[1]))]
    return state_path(folder, whole[-1], part) if whole else None


def remove_older(folder: Path, update: int) -> None:
    """Remove the states of other updates, of a training that is shared out."""
    for path in folder.glob("[0-9]*"):
        if path.name != str(update):
            shutil.rmtree(path)


def optimizer_states(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """List what an optimiser remembers of each parameter, in its own order; written into, it goes on from there.

    Its ``state_dict`` is not the same for all: bitsandbytes nests some tensors for FSDP.
    """
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


def save_state(
    path: Path, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, record: dict[str, Any]
) -> None:
    """Write the tensors of a training, what its optimiser remembers, and a JSON record; atomically.

    Of what is shared out among processes, this one's part.

    Args:
        tensors: parameters, averages and sums, by names of which none starts with ``optimizer.``.
    """
    stored = {key: own_part(value) for key, value in tensors.items()}
    for i, state in enumerate(optimizer_states(optimizer)):
        for key, value in state.items():
            # A count is a number in bitsandbytes; its codebooks are one tensor for all, which safetensors refuses.
            value = own_part(value) if isinstance(value, Tensor) else value
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
    tensors = {key: own_part(value) for key, value in tensors.items()}
    found, expected = ({k: tuple(v.shape) for k, v in side.items()} for side in (stored, tensors))
    if found != expected:
        first = next(k for k in {**expected, **found} if found.get(k) != expected.get(k))
        raise UserError(
            f"{path} is of another network: {first} is {found.get(first, 'missing')}, expected "
            f"{expected.get(first, 'none')}; remove the folder to start over"
        )
    for key, value in stored.items():
        tensors[key].copy_(value)
    states, parameters = optimizer_states(optimizer), [p for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    for key, value in of_optimizer.items():
        _, index, name = key.split(".")
        if value.is_floating_point() or value.dim():
            moved = value.to(device)
            # A count is one number, however its parameter is shared out.
            states[int(index)][name] = as_part_of(parameters[int(index)], moved) if value.dim() else moved
        else:
            states[int(index)][name] = value.item()
    return as_record(parse_json(metadata.get("training", ""), path, AGAIN), path, AGAIN)
