"""Gradients in the merging weights, weights learned with them, and Fisher information, each against a definition."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from conftest import make_unet
from decouple_merge.cli import main as cli
from decouple_merge.config import Config
from decouple_merge.data.batches import training_batches
from decouple_merge.data.images import to_model
from decouple_merge.diffusion.process import VP
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.executors.devices import default_device
from decouple_merge.experiment.fisher import write_fishers
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.planned import Plan
from decouple_merge.experiment.provenance import made_from
from decouple_merge.merging.arithmetic import Tensors, merge
from decouple_merge.merging.keys import group_keys
from decouple_merge.models.base import Base
from decouple_merge.models.families.unet import UNet
from decouple_merge.models.projection import attach_projections
from decouple_merge.searching.learned import DenoisingLoss, layer_patterns, learn_weights
from decouple_merge.seeds import generator, stream_seed
from decouple_merge.training.fisher import fisher_information
from decouple_merge.training.gradient import NoisyBatch, noisy_batch

CPU = torch.device("cpu")
NUM_TIMESTEPS = 40
ALL_TIMESTEPS = TimestepRange(0, NUM_TIMESTEPS)
BLOCKS = ["down_blocks.*", "mid_block.*", "up_blocks.*", "*"]


class Linear(nn.Module):
    """A network that can be solved on paper: A·x_t + b, whatever the timestep; with a buffer that it doesn't use."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(4, 4, generator=draws) / 4)
        self.bias = nn.Parameter(torch.randn(4, generator=draws) / 4)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        assert not return_dict
        return ((x.flatten(1) @ self.matrix.T + self.bias).view_as(x),)


def base_of(network: nn.Module, prediction_type: str = "epsilon") -> Base:
    return Base(UNet(), None, network.eval(), VP(torch.linspace(0.999, 0.01, NUM_TIMESTEPS), prediction_type), "")


def images(num: int, size: int = 8, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 1, size, size), generator=draws, dtype=torch.uint8)


def moved(base: Base, num: int, scale: float = 0.05) -> list[Tensors]:
    """Make experts of a base: its weights, each moved at random."""
    draws = torch.Generator().manual_seed(7)
    return [
        {
            k: v + scale * torch.randn(v.shape, generator=draws).to(v.dtype) if v.is_floating_point() else v.clone()
            for k, v in base.network.state_dict().items()
        }
        for _ in range(num)
    ]


def batch_of(base: Base, num: int = 6, size: int = 8) -> NoisyBatch:
    return noisy_batch(base, images(num, size), ALL_TIMESTEPS, torch.Generator().manual_seed(1))


def value_at(base: Base, experts: list[Tensors], weights: list[float], batch: NoisyBatch) -> Tensor:
    """Compute the loss by loading a merge into the network."""
    kept = {k: v.clone() for k, v in base.network.state_dict().items()}
    base.network.load_state_dict(merge(kept, experts, weights))
    with torch.no_grad():
        output = base.network(batch.x_t, batch.t, return_dict=False)[0]
    base.network.load_state_dict(kept)
    return (output - batch.target).square().mean()


@pytest.fixture(scope="module")
def unet() -> Base:
    """A tiny U-Net in float64."""
    return base_of(make_unet().double())


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_gradient_is_that_of_central_differences(unet: Base, prediction_type: str) -> None:
    base = base_of(unet.network, prediction_type)
    experts, batch = moved(base, 2), batch_of(base)
    loss, patterns = DenoisingLoss(base, experts, CPU, BLOCKS), len(BLOCKS)
    weights = torch.linspace(-0.3, 1.1, patterns * 2, dtype=torch.float64).view(patterns, 2)
    _, gradient = loss(weights, batch)
    for index in range(weights.numel()):
        step = torch.zeros(weights.numel(), dtype=torch.float64)
        step[index] = 1e-5
        up, down = (loss(weights + sign * step.view_as(weights), batch)[0] for sign in (1, -1))
        assert float(gradient.flatten()[index]) == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-10)


def test_every_merge_is_in_the_same_memory(unet: Base) -> None:
    loss = DenoisingLoss(unet, moved(unet, 2), CPU)
    first, second = (loss.merge(torch.tensor([weights])) for weights in ([0.3, 0.6], [1.0, 0.0]))
    assert {k: v.data_ptr() for k, v in first.items()} == {k: v.data_ptr() for k, v in second.items()}
    assert all(p.is_meta for p in loss.network.parameters())


def test_the_loss_is_that_of_the_merged_network(unet: Base) -> None:
    experts, batch = moved(unet, 3), batch_of(unet)
    found, _ = DenoisingLoss(unet, experts, CPU)(torch.tensor([[0.3, -0.1, 1.2]]), batch)
    assert found == pytest.approx(float(value_at(unet, experts, [0.3, -0.1, 1.2], batch)), rel=1e-6)


def test_timestep_weights_choose_the_samples_that_count(unet: Base) -> None:
    experts, batch = moved(unet, 2), batch_of(unet)
    weights = torch.tensor([[0.3, 0.6]])
    is_late = batch.t >= 20
    assert 0 < int(is_late.sum()) < len(batch.t)
    late = NoisyBatch(batch.x_t[is_late], batch.t[is_late], batch.target[is_late])
    chosen = 2.0 * (torch.arange(NUM_TIMESTEPS) >= 20)
    value, gradient = DenoisingLoss(unet, experts, CPU, timestep_weights=chosen)(weights, batch)
    alone, its_gradient = DenoisingLoss(unet, experts, CPU)(weights, late)
    share = 2.0 * len(late.t) / len(batch.t)
    assert value == pytest.approx(share * alone, rel=1e-9)
    torch.testing.assert_close(gradient, share * its_gradient, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.floats(-0.2, 1.5), min_size=2, max_size=2))
def test_gradients_of_blocks_and_of_layers_add_up_to_the_experts(unet: Base, weights: list[float]) -> None:
    experts, batch = moved(unet, 2), batch_of(unet)
    value, whole = DenoisingLoss(unet, experts, CPU)(torch.tensor([weights]), batch)
    for patterns in (BLOCKS, layer_patterns(list(unet.network.state_dict()))):
        same, parts = DenoisingLoss(unet, experts, CPU, patterns)(torch.tensor([weights] * len(patterns)), batch)
        assert same == pytest.approx(value, rel=1e-12)
        torch.testing.assert_close(parts.sum(0, keepdim=True), whole, rtol=1e-9, atol=1e-12)


def test_a_block_moves_with_its_own_weights_alone(unet: Base) -> None:
    base, experts = unet.network.state_dict(), moved(unet, 1)
    merged = DenoisingLoss(unet, experts, CPU, BLOCKS).merge(torch.tensor([[0.0], [0.0], [1.0], [0.0]]))
    for key, value in merged.items():
        assert torch.equal(value, (experts[0] if key.startswith("up_blocks.") else base)[key])


def test_a_trunk_projection_has_a_gradient_too() -> None:
    base = base_of(make_unet())
    experts = []
    for seed in range(2):
        network = make_unet()
        attach_projections(network, base.family, "trunk")
        torch.manual_seed(seed)
        state = network.state_dict()
        experts.append(
            {k: v + 0.1 * torch.randn(v.shape) if "projection" in k else v.clone() for k, v in state.items()}
        )
    loss, batch = DenoisingLoss(base, experts, CPU), batch_of(base)
    weights = torch.tensor([[0.4, 0.2]], dtype=torch.float64)
    _, gradient = loss(weights, batch)
    step = torch.tensor([[0.02, 0.0]], dtype=torch.float64)
    difference = (loss(weights + step, batch)[0] - loss(weights - step, batch)[0]) / 0.04
    assert gradient.abs().min() > 0
    assert float(gradient[0, 0]) == pytest.approx(difference, rel=0.02)


def test_a_batch_is_fixed_by_its_seed_and_its_timesteps_mirror_each_other() -> None:
    base, own = base_of(Linear()), TimestepRange(10, 20)
    first, again, other = (
        noisy_batch(base, images(64, 2), own, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first.x_t, again.x_t)
    assert torch.equal(first.t, again.t)
    assert torch.equal(first.target, again.target)
    assert not torch.equal(first.x_t, other.x_t)
    assert (first.t[:32] + first.t[32:]).unique().tolist() == [29]
    assert (int(first.t.min()), int(first.t.max())) == (10, 19)
    alpha_bar = base.process.alphas_cumprod[first.t].view(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * to_model(images(64, 2)) + (1 - alpha_bar).sqrt() * first.target
    torch.testing.assert_close(first.x_t, x_t)


# --- learning the weights ---


def solved(num_images: int) -> tuple[Base, list[Tensors]]:
    """A linear base, and two experts: the least-squares solution on many samples, and a step that has nothing to it."""
    base = base_of(Linear())
    batch = noisy_batch(base, images(num_images, 2), ALL_TIMESTEPS, torch.Generator().manual_seed(3))
    inputs = torch.cat([batch.x_t.flatten(1), torch.ones(num_images, 1)], 1).double()
    solution = torch.linalg.lstsq(inputs, batch.target.flatten(1).double()).solution.float()
    best = {"matrix": solution[:4].T.contiguous(), "bias": solution[4], "count": torch.tensor(3)}
    start = base.network.state_dict()
    elsewhere = {**start, "bias": start["bias"] + torch.tensor([0.5, -0.5, 0.5, -0.5])}
    return base, [best, elsewhere]


def endless(size: int, batch_size: int = 128) -> Iterator[Tensor]:
    step = 0
    while True:
        yield images(batch_size, size, seed=step)
        step += 1


@pytest.mark.parametrize("start", [[0.0, 0.0], [0.5, 0.5], [2.0, -0.2]], ids=str)
def test_learning_finds_the_expert_that_is_the_solution(start: list[float]) -> None:
    base, experts = solved(20_000)
    loss = DenoisingLoss(base, experts, CPU)
    *_, last = learn_weights(loss, endless(2), torch.tensor([start]), 300, seed=0)
    assert last.step == 300
    assert last.weights[0] == pytest.approx([1.0, 0.0], abs=0.05)


def test_learning_finds_the_weights_of_each_layer() -> None:
    base, (best, _) = solved(20_000)
    start = base.network.state_dict()
    # Half way too far in one tensor, half way short in the other.
    expert = {
        "matrix": torch.lerp(start["matrix"], best["matrix"], 2.0),
        "bias": torch.lerp(start["bias"], best["bias"], 0.625),
        "count": torch.tensor(3),
    }
    loss = DenoisingLoss(base, [expert], CPU, ["matrix", "*"])
    *_, last = learn_weights(loss, endless(2), torch.zeros(2, 1), 300, seed=0)
    assert [w for (w,) in last.weights] == pytest.approx([0.5, 1.6], abs=0.1)


def test_learned_weights_stay_within_their_bounds() -> None:
    base, experts = solved(2000)
    loss = DenoisingLoss(base, experts, CPU)
    records = list(
        learn_weights(loss, endless(2), torch.tensor([[0.0, 0.1]]), 40, seed=0, bounds=(0.0, 0.6), learning_rate=0.1)
    )
    assert all(0.0 <= w <= 0.6 for r in records for w in r.weights[0])
    assert records[-1].weights[0][0] == 0.6


def test_a_record_has_the_loss_at_the_weights_before_its_step() -> None:
    base, experts = solved(2000)
    loss, start = DenoisingLoss(base, experts, CPU), torch.tensor([[0.25, 0.25]])
    first, second = learn_weights(loss, endless(2), start, 2, seed=4)
    assert (first.step, second.step) == (1, 2)
    assert first.loss != second.loss
    # The first step of Adam is the learning rate, against the gradient's sign.
    assert [abs(w - 0.25) for w in first.weights[0]] == pytest.approx([0.05, 0.05], rel=1e-4)
    again = next(learn_weights(loss, endless(2), torch.tensor(first.weights), 2, seed=4))
    assert again.loss != first.loss
    assert start.tolist() == [[0.25, 0.25]]


def test_the_learning_rate_falls_to_nothing() -> None:
    base, experts = solved(2000)
    records = list(
        learn_weights(
            DenoisingLoss(base, experts, CPU), endless(2, 4), torch.zeros(1, 2), 50, seed=0, bounds=(-9.0, 9.0)
        )
    )
    rows = torch.tensor([r.weights[0] for r in records])
    assert (rows[-1] - rows[-2]).abs().max() < 3 * 0.05 / 50


def test_learning_repeats_itself_and_depends_on_the_seed() -> None:
    base, experts = solved(2000)
    start = torch.tensor([[0.25, 0.25]])
    runs = [
        list(learn_weights(DenoisingLoss(base, experts, CPU), endless(2), start, 5, seed=seed)) for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


# --- Fisher information ---


def test_fisher_information_is_the_mean_of_squared_gradients_of_a_linear_model() -> None:
    base = base_of(Linear(0))
    expert, own = Linear(1).state_dict(), TimestepRange(10, 20)
    batches = [images(6, 2, seed=s) for s in (0, 1)]
    found = fisher_information(base, expert, own, batches, 9, CPU)
    seen = [noisy_batch(base, b, own, generator(9, "fisher", i)) for i, b in enumerate(batches)]
    matrix, bias = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for batch in seen:
        for x, target in zip(batch.x_t.flatten(1).double(), batch.target.flatten(1).double(), strict=True):
            # ℓ = mean over the 4 outputs of (A·x + b - target)².
            slope = 2 * (expert["matrix"].double() @ x + expert["bias"].double() - target) / 4
            matrix += torch.outer(slope, x).square() / 12
            bias += slope.square() / 12
    torch.testing.assert_close(found["matrix"], matrix.float(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found["bias"], bias.float(), rtol=1e-4, atol=1e-7)
    assert torch.equal(found["count"], torch.tensor(0.0))


def test_fisher_information_has_the_experts_keys_in_float32_and_is_not_negative(unet: Base) -> None:
    (expert,) = moved(unet, 1)
    found = fisher_information(unet, expert, ALL_TIMESTEPS, [images(3)], 0, CPU)
    assert list(found) == list(expert)
    for key, value in found.items():
        assert value.dtype == torch.float32
        assert value.shape == expert[key].shape
        assert value.min() >= 0
    assert sum(float(v.sum()) for v in found.values()) > 0


# --- what is left alone ---


@pytest.mark.parametrize("function", ["learn", "fisher"])
def test_inputs_and_the_global_random_state_are_untouched(function: str) -> None:
    network = make_unet(dropout=0.5)
    base, experts = base_of(network), moved(base_of(network), 2)
    network.train().requires_grad_(True)
    given = [*experts, dict(network.state_dict())]
    before, state = [{k: v.clone() for k, v in t.items()} for t in given], torch.get_rng_state()

    def use() -> Any:
        if function == "fisher":
            return fisher_information(base, experts[0], ALL_TIMESTEPS, [images(2)], 0, CPU)
        loss = DenoisingLoss(base, experts, CPU)
        return list(learn_weights(loss, endless(8, 4), torch.zeros(1, 2), 2, seed=0))

    first = use()
    assert torch.equal(torch.get_rng_state(), state)
    for tensors, copies in zip(given, before, strict=True):
        assert all(torch.equal(tensors[k], v) for k, v in copies.items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert network.training
    # Dropout is off: another global seed changes nothing.
    torch.manual_seed(123)
    second = use()
    if function == "fisher":
        assert all(torch.equal(first[k], second[k]) for k in first)
    else:
        assert first == second


# --- patterns ---


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "conv", "weight", "0"]), min_size=1, max_size=4).map(".".join),
        min_size=1,
        unique=True,
    )
)
def test_a_layers_pattern_takes_the_keys_of_that_layer(keys: list[str]) -> None:
    patterns = layer_patterns(keys)
    groups = group_keys(keys, patterns)
    assert sorted(k for group in groups for k in group) == sorted(keys)
    for group in groups:
        assert len({key.rpartition(".")[0] for key in group}) == 1


def test_the_first_pattern_that_matches_takes_a_key() -> None:
    assert group_keys(["a.x", "a.y", "b.x"], ["a.y", "a.*", "*"]) == [["a.y"], ["a.x"], ["b.x"]]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["down_blocks.*"], r"no pattern of down_blocks.\* matches conv_in.weight; end them with \*"),
        (["*", "up_blocks.*"], r"no key is left for the pattern 'up_blocks.\*'; keys are like"),
    ],
)
def test_patterns_that_dont_fit_are_refused(unet: Base, patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoisingLoss(unet, moved(unet, 1), CPU, patterns)


def test_what_cant_be_learned_is_refused() -> None:
    base, experts = solved(100)
    with pytest.raises(ValueError, match="expert 1 doesn't fit the base: missing: bias"):
        DenoisingLoss(base, [experts[0], {"matrix": experts[1]["matrix"], "count": torch.tensor(3)}], CPU)
    loss = DenoisingLoss(base, experts, CPU)
    with pytest.raises(ValueError, match=r"weights are \(1, 3\), expected \(1, 2\): a row for each pattern"):
        loss.merge(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"start weights are .*, expected all within the bounds -0.2 to 2.5"):
        next(learn_weights(loss, endless(2), torch.tensor([[0.0, 2.6]]), 1, seed=0))
    with pytest.raises(ValueError, match="the batches ended after 2, expected one for each of 3 steps"):
        list(learn_weights(loss, iter([images(4, 2)] * 2), torch.zeros(1, 2), 3, seed=0))
    with pytest.raises(ValueError, match="found 3 timestep weights, the least -1; expected 40, one for each"):
        DenoisingLoss(base, experts, CPU, timestep_weights=torch.tensor([1.0, -1.0, 1.0]))
    infinite = DenoisingLoss(base, [{**experts[0], "bias": torch.full((4,), torch.inf)}], CPU)
    with pytest.raises(ValueError, match=r"the loss is .* at step 0 with weights .*check the experts"):
        next(learn_weights(infinite, endless(2), torch.ones(1, 1), 1, seed=0))
    with pytest.raises(ValueError, match="the expert doesn't fit the base: unknown: extra"):
        fisher_information(base, {**experts[0], "extra": torch.zeros(1)}, ALL_TIMESTEPS, [], 0, CPU)
    with pytest.raises(ValueError, match="found no images, expected at least one batch"):
        fisher_information(base, experts[0], ALL_TIMESTEPS, [], 0, CPU)


# --- the files of a run ---


@pytest.fixture
def plan(tiny_config: Callable[..., Config], tmp_path: Path) -> Plan:
    """A run with two experts that were moved by hand."""
    made = prepare(tiny_config(), tmp_path / "run")
    for index, expert in enumerate(moved(made.base, 2)):
        folder = made.run.expert(index)
        folder.mkdir(parents=True)
        save_file(expert, folder / "model.safetensors")
        (folder / "expert.json").write_text(json.dumps(made_from(f"experts/{index}", made)))
    return made


def test_fisher_files_of_a_run_merge_it(plan: Plan, tmp_path: Path) -> None:
    found = CliRunner().invoke(cli.app, ["fisher", str(plan.run.folder), "--num-batches", "2"], catch_exceptions=False)
    assert found.exit_code == 0
    assert "8 images at timesteps [20, 40)" in found.output
    files = [plan.run.fisher(i) for i in range(2)]
    experts = [plan.run.expert(i) for i in range(2)]
    arguments = [*map(str, [plan.config.base, *experts]), "--weights", "1,2", "--out", str(tmp_path / "merged")]
    fishers = ["--set", f"fishers=[{', '.join(map(str, files))}]"]
    merging = CliRunner().invoke(cli.app, ["merge", *arguments, "--method", "fisher", *fishers], catch_exceptions=False)
    assert merging.exit_code == 0
    merged = load_file(tmp_path / "merged/unet/diffusion_pytorch_model.safetensors")
    key = "conv_in.weight"
    one, two = (load_file(f)[key].double() for f in files)
    a, b = (load_file(e / "model.safetensors")[key].double() for e in experts)
    expected = (one * a + 2 * two * b) / (one + 2 * two)
    torch.testing.assert_close(merged[key], expected.float(), rtol=1e-4, atol=1e-6)


def test_a_runs_fisher_file_is_of_its_expert_at_its_own_timesteps(plan: Plan) -> None:
    list(write_fishers(plan, 1))
    for index, own in enumerate(plan.ranges):
        expert, seed = load_file(plan.run.expert(index) / "model.safetensors"), stream_seed(0, "fisher", index)
        batches = training_batches(plan.images, plan.config.data, 4, seed, 0, 1)
        expected = fisher_information(plan.base, expert, own, batches, seed, default_device())
        found = load_file(plan.run.fisher(index))
        assert all(torch.equal(found[k], v) for k, v in expected.items())


def test_the_example_of_learned_weights_runs(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parent.parent / "docs/merging.md").read_text(encoding="utf-8")
    (example,) = [b for b in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "learn_weights" in b]
    exec(example.replace("runs/fashion-quick", str(plan.run.folder)).replace("), 200", "), 2"), {})
    *steps, down, _, up, _ = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in steps] == ["1", "2"]
    assert re.fullmatch(r"--block 'down_blocks\.\*=[-\d.]+,[-\d.]+'", down)
    assert re.fullmatch(r"--block 'up_blocks\.\*=[-\d.]+,[-\d.]+'", up)


def test_a_fisher_file_is_kept_until_its_expert_or_its_images_change(plan: Plan) -> None:
    def stamps(num_batches: int) -> list[int]:
        list(write_fishers(plan, num_batches))
        return [plan.run.fisher(i).stat().st_mtime_ns for i in range(2)]

    first = stamps(1)
    assert stamps(1) == first
    second = stamps(2)
    assert all(a != b for a, b in zip(first, second, strict=True))
    path = plan.run.expert(1) / "model.safetensors"
    save_file({k: v + 1e-3 for k, v in load_file(path).items()}, path)
    third = stamps(2)
    assert third[0] == second[0]
    assert third[1] != second[1]
    with safe_open(plan.run.fisher(1), framework="pt") as file:
        record = json.loads(file.metadata()["fisher"])
    assert record["num_images"] == 8
    assert record["timesteps"] == [20, 40]


def test_fisher_information_of_no_batches_is_refused(plan: Plan) -> None:
    with pytest.raises(ValueError, match="num_batches is 0, expected at least 1"):
        list(write_fishers(plan, 0))
    assert not plan.run.fisher(0).exists()
