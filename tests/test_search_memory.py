"""What a search worker holds: adapters in place of whole experts, one network, one tensor at a time."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from decouple_merge.config import Config, Lora, Sample
from decouple_merge.experiment.memory import estimate
from decouple_merge.merging.arithmetic import Tensors, merge
from decouple_merge.merging.merger import Merger
from decouple_merge.models.base import Base, load_base
from decouple_merge.models.lora import as_adapted, attach_lora, lora_factors, unadapted_state_dict
from decouple_merge.models.network import new_network
from decouple_merge.sampling.sampler import blank_sampling_network

CPU = torch.device("cpu")
TARGETS = ["to_q", "to_v", "conv1"]
WEIGHTS = tuple(f"{target}.weight" for target in TARGETS)


def finetuned(base: Base, seed: int, targets: list[str]) -> tuple[Tensors, Tensors]:
    """Whole weights and factors of an adapter whose change isn't 0, as a training writes them."""
    network, draws = new_network(base), torch.Generator().manual_seed(seed)
    attach_lora(network, Lora(rank=2, alpha=3, target_modules=targets), seed)
    moved = {
        n: p.detach() + 0.3 * torch.randn(p.shape, generator=draws)
        for n, p in network.named_parameters()
        if "lora_" in n
    }
    return unadapted_state_dict(network, moved), lora_factors(network, base.family, moved)


@pytest.mark.parametrize("method", ["linear", "ties", "breadcrumbs", "iso_c", "karcher"])
def test_merges_of_adapters_are_those_of_whole_experts_bit_for_bit(tiny_base: Path, method: str) -> None:
    base = load_base(str(tiny_base))
    start, pairs = base.network.state_dict(), [finetuned(base, seed, TARGETS) for seed in range(3)]
    adapters = [as_adapted(base, whole, factors, "an expert") for whole, factors in pairs]
    changed = {k for k, v in start.items() if not torch.equal(v, pairs[0][0][k])}
    assert changed == adapters[0].factors.keys() == {k for k in start if k.endswith(WEIGHTS)} != set()
    for adapter, (whole, _) in zip(adapters, pairs, strict=True):
        assert all(torch.equal(adapter[k], whole[k]) for k in whole)
    merger = Merger(start, adapters, method=method, device=CPU)
    for weights in ([0.3, 0.9, 0.2], [1.0, 0.0, 0.0]):
        expected = merge(start, [whole for whole, _ in pairs], weights, method)
        found = merger.merge(weights)
        assert list(found) == list(expected)
        assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_an_adapter_of_other_weights_is_refused(tiny_base: Path) -> None:
    base = load_base(str(tiny_base))
    (whole, factors), (_, others) = (finetuned(base, seed, ["to_q"]) for seed in range(2))
    with pytest.raises(
        ValueError, match=r"^here: its adapter isn't what .*to_q.weight of its weights was changed by; r"
    ):
        as_adapted(base, whole, others, "here")
    short = {k: v[:, :3] if "lora_A" in k else v for k, v in factors.items()}
    with pytest.raises(
        ValueError, match=r"^here: its adapter doesn't fit .*to_q.weight of the base; remove the expert"
    ):
        as_adapted(base, whole, short, "here")


class Held(TorchDispatchMode):
    """Remember the most bytes that tensors held at once, but for those that were there before."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.before = {t.untyped_storage().data_ptr() for t in before}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.num = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, list | tuple) else [found]:
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self.count(tensor.untyped_storage())
        return found

    def count(self, storage: torch.UntypedStorage) -> None:
        known = self.alive.get(storage._cdata)
        if storage.data_ptr() in self.before or (known and not known[0].expired()):
            return
        self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.num += storage.nbytes()
        if self.num > self.most:
            self.alive = {k: (ref, num) for k, (ref, num) in self.alive.items() if not ref.expired()}
            self.num = sum(num for _, num in self.alive.values())
            self.most = max(self.most, self.num)


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of 3 MB in layers so small that what merges one of them is far less than all."""
    kinds = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    sizes = {"layers_per_block": 6, "block_out_channels": [32, 32], "norm_num_groups": 8}
    network: Any = UNet2DModel(8, 1, 1, **sizes, **kinds)  # type: ignore[arg-type]
    pipeline: Any = DDPMPipeline(network, DDPMScheduler(num_train_timesteps=40))
    folder = tmp_path_factory.mktemp("deep") / "base"
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("is_lora", "precision", "method"), [(True, "fp32", "ties"), (False, "bf16", "linear")])
def test_a_worker_holds_no_more_than_is_said(deep_base: Path, is_lora: bool, precision: str, method: str) -> None:
    base = load_base(str(deep_base))
    pairs = [finetuned(base, seed, ["to_q"]) for seed in range(2)]
    experts: list[Any] = [as_adapted(base, *pair, "") if is_lora else pair[0] for pair in pairs]
    given = [base.network.state_dict(), *(tensors for pair in pairs for tensors in pair)]
    with Held([*base.network.buffers(), *(t for tensors in given for t in tensors.values())]) as held:
        merger = Merger(given[0], experts, method=method, dtype=base.dtype, device=CPU)
        network = blank_sampling_network(base, merger.has_trunk, Sample(precision=precision), CPU)
        merger.attach(network)
        merger.write([0.3, 0.9])
    lora = {"rank": 2, "target_modules": ["to_q"]} if is_lora else None
    config = {
        "base": str(deep_base),
        "finetune": {"num_ranges": 2, "projection": {"placement": "none"}, "lora": lora},
        "sample": {"precision": precision},
        "search": {"method": method},
    }
    [worker] = [s for s in estimate(Config.model_validate(config)) if s.name == "searching, each worker"]
    size = sum(p.nbytes for p in network.parameters())
    assert size < held.most <= worker.total < 1.8 * size
