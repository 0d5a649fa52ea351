"""A base made narrower for one of its ranges: the pruned expert of a mixture, before it is finetuned."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config import Config
from ..data.batches import training_batches
from ..errors import UserError
from ..executors.devices import default_device
from ..merging.arithmetic import cast
from ..models.base import Base, load_base, tensors_sha256
from ..models.costs import num_macs
from ..models.export import save_pipeline
from ..models.network import num_parameters
from ..seeds import stream_seed
from ..storage.outputs import PRUNED, check_output
from ..storage.provenance import git_commit
from ..training.importance import taylor_products
from .plan import check

RECORD = "prune.json"


def prune_base(config: Config, index: int, keep: float, out: Path, num_batches: int = 10) -> Iterator[str]:
    """Write a config's base with a share of its channels, those that matter most to the loss on a range.

    The result is a stock pipeline, with ``prune.json``: how it was made, and what it costs. Structured pruning by
    importance is that of Fang et al. 2023; by a range's own loss, for a mixture of experts on ranges, it is the width
    of DiffPruning (Ganjdanesh et al. 2024) without its agent.

    Args:
        index: of the range.
        keep: the share, in (0, 1], of every level's channels, rounded to whole multiples of the norms' groups.
        num_batches: of ``finetune.batch_size`` training images.

    Raises:
        UserError: there is no such range, the share is none or too small for the network, the network can't be pruned,
            the config is wrong, or ``out`` holds something else.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep is {keep:g}, expected a share of the channels above 0 and up to 1, such as 0.7")
    check_output(out, PRUNED, [config.base, config.data.source])
    base = load_base(config.base)
    network = base.family.narrow(base.network, keep)
    plan = check(config, out.parent / "unused")
    if not 0 <= index < len(plan.ranges):
        raise UserError(f"range {index} doesn't exist, expected 0 to {len(plan.ranges) - 1}")
    own, seed = plan.ranges[index], stream_seed(config.seed, "importance", index)
    batches = training_batches(plan.images, config.data, config.finetune.batch_size, seed, 0, num_batches)
    num_images = num_batches * config.finetune.batch_size
    yield f"importance of {num_parameters(base.network):,} weights to the loss on {own}, by {num_images:,} images"
    base.family.fill_narrow(base.network, network, taylor_products(plan.base, own, batches, seed, default_device()))
    pruned = _with_network(base, network)
    costs = {name: _costs(each) for name, each in (("base", base), ("pruned", pruned))}
    record = {
        **{"keep": keep, "range": asdict(own), "base": config.base, "base_sha256": base.sha256},
        **{"num_images": num_images, "data_sha256": plan.images.sha256, "seed": config.seed, "git": git_commit()},
        **{"costs": costs, "sha256": pruned.sha256},
    }
    save_pipeline(pruned, out, RECORD, record)
    yield from _describe(costs)
    yield f"pruned model: {out}"


def _with_network(base: Base, network: Any) -> Base:
    """Put another network of the same kind into a base, in the dtype that the base is stored in."""
    network.load_state_dict(cast(network.state_dict(), base.dtype), assign=True)
    pipeline = type(base.pipeline)(**{**base.pipeline.components, base.family.component: network})
    return replace(base, pipeline=pipeline, network=network, sha256=tensors_sha256(network.state_dict()))


def _costs(base: Base) -> dict[str, Any]:
    widths = list(base.network.config.block_out_channels)
    return {"channels": widths, "parameters": num_parameters(base.network), "macs": num_macs(base)}


def _describe(costs: dict[str, dict[str, Any]]) -> Iterator[str]:
    before, after = costs["base"], costs["pruned"]
    yield f"channels: {before['channels']} before, {after['channels']} after"
    for key, what in (("parameters", "parameters"), ("macs", "multiply-accumulates for one image")):
        yield f"{what}: {before[key]:,} before, {after[key]:,} after, {after[key] / before[key]:.1%}"
