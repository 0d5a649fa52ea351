"""The state of a training: what is read is what was written, and nothing is read into another network."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from decouple_merge.training.state import load_state, optimizer_states, save_state


def trained(num_updates: int, width: int = 3) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    torch.manual_seed(num_updates)
    layer = nn.Linear(2, width)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    for _ in range(num_updates):
        layer(torch.randn(4, 2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(layer.named_parameters()), optimizer


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    tensors, optimizer = trained(3)
    save_state(tmp_path / "state.safetensors", tensors, optimizer, {"num_done": 3})
    again, other = trained(0)
    assert load_state(tmp_path / "state.safetensors", again, other) == {"num_done": 3}
    assert all(torch.equal(tensors[k], v) for k, v in again.items())
    for ours, theirs in zip(optimizer_states(optimizer), optimizer_states(other), strict=True):
        assert ours.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("missing", [False, True])
def test_a_state_of_another_network_is_refused_and_changes_nothing(tmp_path: Path, missing: bool) -> None:
    tensors, optimizer = trained(1, width=1)
    save_state(tmp_path / "state.safetensors", tensors, optimizer, {})
    # One row would be broadcast to three.
    again, other = trained(0, width=1 if missing else 3)
    if missing:
        again["scale"] = torch.ones(1)
    before = {k: v.clone() for k, v in again.items()}
    name, found, expected = ("scale", "missing", r"\(1,\)") if missing else ("weight", r"\(1, 2\)", r"\(3, 2\)")
    with pytest.raises(ValueError, match=f"another network: {name} is {found}, expected {expected}; remove the folder"):
        load_state(tmp_path / "state.safetensors", again, other)
    assert all(torch.equal(before[k], v) for k, v in again.items())
