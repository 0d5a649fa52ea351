"""The two denoisers of a base as a run's experts, which nothing trains."""

from collections.abc import Iterator
from pathlib import Path

from ..merging.experts import open_model
from ..merging.joining import describe_joined
from ..models.network import load_network
from ..storage.files import write_json, write_tensors
from ..storage.hub import pipeline_folder
from ..storage.layouts import denoisers
from .planned import Plan
from .provenance import trainings_made_from


def describe_given(plan: Plan) -> Iterator[str]:
    """Say whose timesteps are whose, and how near the weights are that become one."""
    turns = plan.base.family.turns(plan.base.pipeline)
    yield "experts: " + ", ".join(f"{name} on {own}" for name, own in turns.items()) + ", as the base has them"
    places = _places(plan)
    yield from describe_joined(places, {name: open_model(at) for name, at in places.items()})


def write_given(plan: Plan) -> Iterator[str]:
    """Write the denoisers into the run folder as its experts, the cleanest range's first."""
    yield from describe_given(plan)
    places, now = _places(plan), trainings_made_from(plan)
    for index, name in enumerate(plan.base.family.turns(plan.base.pipeline)):
        folder = plan.run.expert(index)
        if not (folder / "model.safetensors").exists():
            write_json(folder / "expert.json", now[f"experts/{index}"])
            write_tensors(folder / "model.safetensors", {k: v.float() for k, v in load_network(places[name]).items()})


def given_experts(plan: Plan) -> list[str]:
    """List the folders of the denoisers, in the order of the ranges, for records."""
    places = _places(plan)
    return [str(places[name]) for name in plan.base.family.turns(plan.base.pipeline)]


def _places(plan: Plan) -> dict[str, Path]:
    return denoisers(pipeline_folder(plan.config.base))
