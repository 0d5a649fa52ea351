"""Weights of timesteps that are learned along: what an update makes of the losses, and that it goes on bitwise."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from decouple_merge.config import Config, Training
from decouple_merge.data.batches import training_batches
from decouple_merge.data.sources import load_images
from decouple_merge.diffusion.multitask import nash_weights
from decouple_merge.diffusion.process import Flow
from decouple_merge.diffusion.timesteps import TimestepRange, range_index, split_timesteps
from decouple_merge.errors import UserError
from decouple_merge.models.base import load_base
from decouple_merge.training.balancing import BALANCERS, Setup, Uncertainty, balancer_of
from decouple_merge.training.checks import check_finetune
from decouple_merge.training.loop import train
from decouple_merge.training.made_from import settings_parts
from decouple_merge.training.trainer import Task, Trainer

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")
EVERYTHING = TimestepRange(0, 40)


def whole_task() -> Task:
    return Task("baseline", EVERYTHING, tuple(split_timesteps(40, 2)))


def config_of(tiny_config: MakeConfig, method: str, **finetune: Any) -> Config:
    clusters = {} if method == "uncertainty" else {"num_clusters": 3, "clusters": "log_snr"}
    balancing = {"method": method} | clusters | ({"solve_every": 2} if method == "ant_nash" else {})
    plain = {"global_prob": 0.0, "consistency_weight": 0.0, "projection": {"placement": "none"}}
    return tiny_config(finetune=plain | {"balancing": balancing, "checkpoint_every": 3} | finetune)


def trainer_of(config: Config) -> Trainer:
    return Trainer(load_base(config.base), whole_task(), config.finetune, config.seed)


def start(config: Config, folder: Path) -> Any:
    base = load_base(config.base)
    images = load_images(config.data, base.channels, base.image_size)
    return train(base, images, config.data, whole_task(), config.finetune, config.seed, folder)


def batches(config: Config) -> Any:
    images = load_images(config.data, 1, 8)
    return training_batches(images, config.data, config.finetune.batch_size, 0, 0, 100)


# -- going on
@pytest.mark.usefixtures("every_record")
@pytest.mark.parametrize("method", BALANCERS)
def test_a_training_that_was_stopped_ends_in_the_same_bits(
    method: str, tmp_path: Path, tiny_config: MakeConfig
) -> None:
    config = config_of(tiny_config, method, accumulation=2)
    list(start(config, tmp_path / "whole"))
    stopped = start(config, tmp_path / "stopped")
    # Behind the checkpoint after 3 updates: its state holds the factors of the third, which the fourth uses.
    assert len(list(itertools.islice(stopped, 4))) == 4
    stopped.close()
    assert not (tmp_path / "stopped/model.safetensors").exists()
    list(start(config, tmp_path / "stopped"))
    for file in ("model.safetensors", "log.jsonl"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


# Gradients of these batches have no conflicts: PCGrad's factors stay 1.
@pytest.mark.parametrize("method", [name for name in BALANCERS if name != "pcgrad"])
def test_what_is_learned_along_moves_and_is_in_the_state(method: str, tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = config_of(tiny_config, method)
    trainer, images = trainer_of(config), batches(config)
    for _ in range(3):
        trainer.update(images)
    trainer.save(tmp_path / "state")
    again = trainer_of(config)
    again.load(tmp_path / "state")
    ours, theirs = trainer.balancer.tensors(), again.balancer.tensors()
    assert ours.keys() == theirs.keys()
    assert len(ours) == 1
    for key, value in ours.items():
        assert torch.equal(theirs[key], value)
        assert not torch.equal(value, trainer_of(config).balancer.tensors()[key])
    # No part of the model.
    assert trainer.weights().keys() == trainer.base.network.state_dict().keys()


# -- what an update is
def gradients_of(trainer: Trainer, images: Any) -> tuple[Tensor, list[Tensor], Tensor, Any]:
    """Take the gradient that an update uses, and those of the cluster losses, one by one, by another way."""
    batch = next(images)
    found: list[Tensor] = []
    k = trainer.balancer.k  # type: ignore[attr-defined]
    for i in range(k):
        losses = draw_losses(trainer, batch)
        losses.total[i::k].mean().backward()
        found.append(flat(trainer))
        trainer.optimizer.zero_grad()
    losses = draw_losses(trainer, batch)
    trainer.balancer.backward(losses.total, losses.t, lambda loss: loss, 0)
    trainer.balancer.finish(0)
    used = flat(trainer)
    return used, found, losses.total.detach(), losses.t


def draw_losses(trainer: Trainer, batch: Any) -> Any:
    torch.manual_seed(0)
    return trainer.losses(batch, torch.Generator().manual_seed(1))


def flat(trainer: Trainer) -> Tensor:
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in trainer.parameters])


def test_pcgrad_and_nash_make_their_sum_of_the_clusters_gradients(tiny_config: MakeConfig) -> None:
    config = config_of(tiny_config, "ant_nash", batch_size=7)
    used, each, _, _ = gradients_of(trainer_of(config), batches(config))
    stacked = torch.stack(each).double()
    gram = stacked @ stacked.T
    alpha = nash_weights(gram / gram.norm())
    torch.testing.assert_close(used.double(), alpha @ stacked / 3, rtol=1e-3, atol=1e-5)

    config = config_of(tiny_config, "pcgrad", batch_size=7)
    used, each, _, _ = gradients_of(trainer_of(config), batches(config))
    stacked = torch.stack(each).double()
    # Gradients of one network's tiny batch agree: nothing is projected away.
    assert bool((stacked @ stacked.T > 0).all())
    torch.testing.assert_close(used.double(), stacked.mean(0), rtol=1e-3, atol=1e-5)


def test_between_two_bargains_the_factors_stay(tiny_config: MakeConfig) -> None:
    config = config_of(tiny_config, "ant_nash")
    trainer, images = trainer_of(config), batches(config)
    seen = []
    for _ in range(5):
        trainer.update(images)
        seen.append(trainer.balancer.tensors()["balancing.factors"].clone())
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[1], seen[2])
    # The gradient of the weighted loss is the sum of the weighted gradients.
    batch = next(images)
    found = []
    for update in (0, 1):
        losses = draw_losses(trainer, batch)
        trainer.balancer.backward(losses.total, losses.t, lambda loss: loss, update)
        trainer.balancer.finish(update)
        found.append(flat(trainer))
        trainer.optimizer.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_ant_uw_is_its_closed_form_and_finds_half_the_log_of_its_losses(tiny_config: MakeConfig) -> None:
    config = config_of(tiny_config, "ant_uw")
    balancer: Any = trainer_of(config).balancer
    losses = torch.tensor([1.0, 4.0, 2.0, 3.0])
    s = torch.tensor([0.5, -0.2, 0.1])
    balancer.learned["s"].data.copy_(s)
    means = torch.tensor([2.0, 4.0, 2.0])
    expected = (0.5 * ((-s).exp() * means / 3 + s)).sum()
    torch.testing.assert_close(balancer.objective(losses, torch.zeros(4)), expected)
    # Its minimum is where exp(s_i) is the loss of the cluster.
    balancer.learned["s"].data.copy_((means / 3).log())
    balancer.objective(losses, torch.zeros(4)).backward()
    torch.testing.assert_close(balancer.learned["s"].grad, torch.zeros(3), rtol=0, atol=1e-6)
    (group,) = balancer.groups()
    assert group["scale"] * config.finetune.learning_rate == pytest.approx(0.025)
    assert group["weight_decay"] == 0


def test_the_uncertainty_starts_at_the_plain_loss_and_learns_the_log_of_the_loss() -> None:
    settings = Training.model_validate({"balancing": "uncertainty"})
    setup = Setup(Flow(), Flow().split(1)[0], 0.0, settings, [], (0, "test"), CPU)
    balancer = Uncertainty(setup)
    t = torch.linspace(5, 995, 200)

    def loss(t: Tensor) -> Tensor:
        return 0.05 + (t / 1000) ** 2

    assert balancer.objective(loss(t), t).item() == pytest.approx(loss(t).mean().item())
    optimizer = torch.optim.Adam(balancer.learned.values(), lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        balancer.objective(loss(t), t).backward()
        optimizer.step()
    error = (balancer.u(t) - loss(t).log()).abs()
    assert error.mean() < 0.03
    assert balancer.objective(loss(t), t).item() == pytest.approx(1 + loss(t).log().mean().item(), abs=0.01)


def test_uncertainty_features_have_mean_square_one_and_are_the_seeds() -> None:
    settings = Training.model_validate({"balancing": "uncertainty"})
    found = []
    for seed in (0, 0, 1):
        balancer = Uncertainty(Setup(Flow(), TimestepRange(0, 1000), 0.0, settings, [], (seed, "test"), CPU))
        balancer.learned["u"].data.normal_(generator=torch.Generator().manual_seed(0))
        found.append(balancer.u(torch.arange(1.0, 1000.0)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    squares = torch.zeros(999)
    for unit in torch.eye(128):
        balancer.learned["u"].data.copy_(unit)
        squares += balancer.u(torch.arange(1.0, 1000.0)).detach().square()
    assert squares.mean().item() / 128 == pytest.approx(1, abs=0.1)
    assert bool(balancer.u(torch.tensor([1e-6, 1000.0])).isfinite().all())


# -- batches
@pytest.mark.parametrize("num", [5, 7, 64])
@pytest.mark.parametrize("process", [Flow(), None])
def test_a_batch_has_equal_parts_of_all_clusters(num: int, process: Any, tiny_config: MakeConfig) -> None:
    process = process or load_base(tiny_config().base).process
    settings = Training.model_validate({"balancing": "ant_uw", "batch_size": num})
    own = TimestepRange(0, process.num_train_timesteps)
    balancer: Any = balancer_of(Setup(process, own, 0.0, settings, [], (0, "test"), CPU))
    t = balancer.draw(num, torch.Generator().manual_seed(0)).tolist()
    found = [range_index(balancer.clusters, one) for one in t]
    assert found == [j % 5 for j in range(num)]
    torch.testing.assert_close(balancer.share.sum(1), torch.ones(5))


def test_a_coin_of_one_cuts_all_timesteps_and_any_other_is_refused(tiny_config: MakeConfig) -> None:
    settings = Training.model_validate({"balancing": "ant_uw"})
    process, own = load_base(tiny_config().base).process, TimestepRange(10, 20)
    for prob, expected in ((0.0, own), (1.0, EVERYTHING)):
        balancer: Any = balancer_of(Setup(process, own, prob, settings, [], (0, "test"), CPU))
        assert (balancer.clusters[0].low, balancer.clusters[-1].high) == (expected.low, expected.high)
    with pytest.raises(ValueError, match=r"global_prob is 0\.4, which draws some samples elsewhere"):
        balancer_of(Setup(process, own, 0.4, settings, [], (0, "test"), CPU))
    with pytest.raises(ValueError, match=r"finetune.balancing is ant_uw.* set it to 0 or 1"):
        tiny_config(finetune={"balancing": {"method": "ant_uw", "num_clusters": 2}})
    tiny_config(finetune={"balancing": {"method": "ant_uw", "num_clusters": 2}}, search={"over": "baseline"})


@pytest.mark.parametrize(
    ("finetune", "match"),
    [
        ({"balancing": "ant_uw", "batch_size": 4}, "a batch of all processes has 4 images, and ant_uw cuts it"),
        ({"balancing": {"method": "uncertainty", "num_clusters": 3}}, "uncertainty, which reads no num_clusters"),
        ({"balancing": {"method": "pcgrad", "learning_rate": 0.1}}, "pcgrad, which reads no learning_rate: leave"),
        ({"balancing": {"method": "ant_uw", "solve_every": 1}}, "ant_uw, which reads no solve_every"),
        ({"balancing": {"method": "nash"}}, "finetune.balancing.method"),
        ({"balancing": {"method": "pcgrad", "clusters": "gradient"}}, "the cost gradient needs that file"),
        ({"balancing": {"method": "pcgrad", "similarity": "a.npz"}}, "and the others none"),
    ],
)
def test_settings_that_fit_no_batch_are_refused(finetune: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Config.model_validate({"finetune": {"global_prob": 0, **finetune}})


def test_clusters_cut_the_batch_of_all_processes() -> None:
    Config.model_validate({"finetune": {"global_prob": 0, "balancing": "ant_uw", "batch_size": 4, "num_ranks": 2}})


@pytest.mark.parametrize("method", ["ant_nash", "pcgrad"])
def test_gradients_of_clusters_are_not_taken_of_a_compiled_network(tiny_config: MakeConfig, method: str) -> None:
    balancing = {"method": method, "num_clusters": 2}
    config = tiny_config(finetune={"global_prob": 0.0, "compile": True, "balancing": balancing})
    with pytest.raises(UserError, match=f"compile is true and balancing is {method}"):
        check_finetune(config.finetune, load_base(config.base), CPU)


def test_a_map_of_similarities_counts_by_what_it_holds(tmp_path: Path) -> None:
    """It may be moved, and a training doesn't go on by another one."""
    found = []
    for name, content in (("a", "1"), ("b", "1"), ("b", "2")):
        (tmp_path / name).write_text(content)
        balancing = {"method": "ant_uw", "clusters": "gradient", "similarity": str(tmp_path / name)}
        found.append(settings_parts(Training.model_validate({"balancing": balancing})))
    assert found[0] == found[1]
    assert found[1]["balancing"]["similarity"] != found[2]["balancing"]["similarity"]


def test_no_uncertainty_leaves_the_mean(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    balancer = trainer_of(config).balancer
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert balancer.objective(losses, torch.zeros(3)).item() == 3
    assert balancer.groups() == []
    assert math.isclose(balancer.learning_rate, config.finetune.learning_rate)
