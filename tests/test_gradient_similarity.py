"""The map of gradients, against a model whose gradients are known, plain autograd, and a run that was killed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from decouple_merge.analysis import gradient_similarity, gradients
from decouple_merge.analysis.fixed import fixed_images
from decouple_merge.analysis.gradients import GradientRows, Grams, Sketch, grams_of, next_prime
from decouple_merge.analysis.subject import Finding, Progress, Subject
from decouple_merge.cli import main as cli
from decouple_merge.config import Analyze, Config, dump_config
from decouple_merge.data.images import to_model
from decouple_merge.diffusion.losses import per_sample_mse
from decouple_merge.diffusion.process import VP, Flow, Process
from decouple_merge.errors import UserError
from decouple_merge.experiment.analyses import analyze
from decouple_merge.experiment.plan import prepare
from decouple_merge.experiment.planned import Plan
from decouple_merge.models.base import Base, load_base
from decouple_merge.models.families.unet import UNet
from decouple_merge.seeds import generator
from decouple_merge.storage.files import write_tensors

CPU = torch.device("cpu")


@pytest.fixture
def tiny_base(two_level_base: Path) -> Path:
    return two_level_base


class Constant(nn.Module):
    """Says the same of every image: the gradient of ‖target - b‖² is 2·(b - target) / 4."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([0.1, -0.2, 0.3, 0.0]))

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.bias.view(1, 1, 2, 2).expand_as(x),)


def subject_of(process: Process, num_images: int = 6, **settings: object) -> Subject:
    network = Constant().requires_grad_(False)
    pixels = torch.randint(0, 256, (num_images, 1, 2, 2), generator=generator("pixels"), dtype=torch.uint8)
    return Subject(
        Base(UNet(), None, network, process, "hash"),
        tuple(process.split(2)),
        settings=Analyze.model_validate({"gradient_similarity": {"num_images": num_images, **settings}}),
        images=lambda num: pixels[:num],
    )


def finding_of(subject: Subject) -> Finding:
    events = gradient_similarity.compute(subject)
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value


VELOCITY = VP(torch.linspace(0.99, 0.01, 20), "v_prediction")


@pytest.mark.parametrize("process", [VELOCITY, Flow()], ids=["v", "flow"])
def test_the_map_of_a_constant_is_the_cosine_of_its_mean_errors(process: Process) -> None:
    stride = process.num_train_timesteps // 10
    subject = subject_of(process, stride=stride)
    finding = finding_of(subject)
    images = fixed_images(subject, 6)
    t = torch.as_tensor(finding.arrays["timesteps"])
    assert len(t) == 10

    def cosines(first: slice, second: slice) -> Tensor:
        def means(part: slice) -> Tensor:
            x0, noise = images.x0[part].double(), images.noise[part].double()
            at = [process.target(x0, noise, one.expand(len(x0))).mean(0).flatten() for one in t]
            return Constant().bias.detach().double() - torch.stack(at)

        a, b = means(first), means(second)
        return a @ b.T

    gram = cosines(slice(0, 6), slice(0, 6))
    norms = gram.diagonal().sqrt()
    torch.testing.assert_close(torch.tensor(finding.arrays["usual-base"]), (gram / torch.outer(norms, norms)).float())
    shared = cosines(slice(0, 3), slice(3, 6))
    root = torch.where(shared.diagonal() > 0, shared.diagonal(), torch.nan).sqrt()
    expected = (shared + shared.T) / 2 / torch.outer(root, root)
    a, b = cosines(slice(0, 3), slice(0, 3)), cosines(slice(3, 6), slice(3, 6))
    ceiling = shared.diagonal() / (a.diagonal() * b.diagonal()).sqrt()
    found = torch.tensor(finding.arrays["halves-base"])
    torch.testing.assert_close(found, expected.diagonal_scatter(ceiling).float(), equal_nan=True, rtol=1e-4, atol=1e-5)


def test_an_epsilon_model_that_is_constant_has_the_same_gradient_everywhere() -> None:
    finding = finding_of(subject_of(VP(VELOCITY.alphas_cumprod, "epsilon"), stride=1))
    assert finding.arrays["usual-base"].min() == pytest.approx(1, abs=1e-6)
    assert finding.summary["negative_share"] == 0
    counts = finding.arrays["histograms-base"]
    assert counts[:, -1].tolist() == [20 * 19 / 2, 10 * 9 / 2, 10 * 9 / 2]
    assert counts.sum() == counts[:, -1].sum()


def test_noise_shrinks_the_usual_cosine_and_not_that_of_two_halves() -> None:
    """Two directions with a cosine of 0.6; each half of the images adds noise of its own, as long as they are."""
    draws = generator("noise")
    width = 20_000
    directions = torch.zeros(2, width)
    directions[0, 0], directions[1, 0], directions[1, 1] = 1.0, 0.6, 0.8
    noise = torch.randn(2, 2, width, generator=draws) / width**0.5
    (grams,) = grams_of(directions[:, None] + noise, [width])
    assert float(grams.usual()[0, 1]) == pytest.approx(0.6 / 1.5, abs=0.05)
    assert float(grams.halves()[0, 1]) == pytest.approx(0.6, abs=0.05)
    torch.testing.assert_close(grams.halves().diagonal(), torch.full((2,), 0.5, dtype=torch.float64), atol=0.05, rtol=0)


def test_where_the_halves_share_nothing_there_is_no_cosine() -> None:
    one = torch.eye(2, dtype=torch.float64)
    found = Grams(one, one, torch.tensor([[0.5, 0.2], [0.2, -0.1]], dtype=torch.float64)).halves()
    assert found.isnan().tolist() == [[False, True], [True, False]]
    assert found[1, 1] == pytest.approx(-0.1)


def test_a_sketch_keeps_cosines_within_its_stated_error() -> None:
    draws, size = generator("sketch test"), next_prime(512)
    keys = ["a", "b"]
    directions = torch.randn(40, 6000, generator=draws)
    # A common part makes cosines of about 0.5.
    directions += torch.randn(6000, generator=draws)
    sketch = Sketch({"all": keys}, size, seed=0)
    tensors = [dict(zip(keys, d.split([1000, 5000]), strict=True)) for d in directions]
    signs = sketch.signs(tensors[0])
    rows = torch.stack([sketch.row(one, signs) for one in tensors])
    unit = nn.functional.normalize(directions)
    exact = unit @ unit.T
    sketched = nn.functional.normalize(rows) @ nn.functional.normalize(rows).T
    above = torch.triu_indices(40, 40, 1)
    stated = (1 - exact[above[0], above[1]] ** 2) / size**0.5
    error = (sketched - exact)[above[0], above[1]]
    assert 0.8 < float((error / stated).square().mean().sqrt()) < 1.3


def test_a_projected_map_says_its_error_and_stays_within_it(tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = _map(tiny_plan, {})
    monkeypatch.setattr(gradient_similarity, "BLOCK", 7)
    found = _map(tiny_plan, {"max_gigabytes": 0, "num_projected": 4096})
    assert exact.summary["projected_to"] is None
    assert found.summary["projected_to"] == 4099
    assert found.summary["measured_norm_error"]["base"] < 3 * (2 / 4099) ** 0.5
    difference = found.arrays["usual-base"] - exact.arrays["usual-base"]
    assert abs(difference).max() < 4 * found.summary["cosine_error"]


def test_gradients_are_autograds(tiny_plan: Plan) -> None:
    subject = _subject(tiny_plan, {})
    network, base = tiny_plan.base.network, tiny_plan.base
    state = network.state_dict()
    sketch = Sketch({"all": list(state)}, None, 0)
    rows, norms = GradientRows(base, state, sketch, CPU, 3).halves(fixed_images(subject, 8), torch.tensor(11))
    images = to_model(subject.images(8))[:4]
    noise = fixed_images(subject, 8).noise[:4]
    network.requires_grad_(True)
    t = torch.full((4,), 11)
    output = network(base.process.mix(images, noise, t), t).sample
    per_sample_mse(output, noise).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in network.parameters()])
    network.requires_grad_(False)
    torch.testing.assert_close(rows[0], expected, rtol=1e-4, atol=1e-6)
    assert float(norms[0]) == pytest.approx(float(expected.double().square().sum()), rel=1e-4)


def test_layers_add_up_to_the_whole(tiny_plan: Plan) -> None:
    whole, layers = _map(tiny_plan, {}), _map(tiny_plan, {"per_layer": True})
    difference = whole.arrays["usual-base"] - layers.arrays["usual-base"]
    assert abs(difference).max() < 1e-5
    names = {row["layer"] for row in layers.rows}
    assert {"all", "conv_in", "mid_block.resnets.0.conv1"} <= names
    assert layers.arrays["layers-base"].shape == (len(names) - 1, 10, 10)


def test_a_killed_map_goes_on_to_the_same_bytes(tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _settings({})
    for _ in analyze(tiny_plan, ["gradient-similarity"], settings):
        pass
    files = [tiny_plan.run.analysis(f"gradient-similarity.{end}") for end in ("csv", "json", "npz")]
    files += [tiny_plan.run.figure(f"gradient-similarity.{end}") for end in ("png", "svg")]
    whole = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    events = analyze(tiny_plan, ["gradient-similarity"], settings)
    for event in events:
        if isinstance(event, Progress) and event.num_done == 8:
            break
    events.close()
    assert len(list(tiny_plan.run.analysis("gradient-similarity.parts").rglob("*.safetensors"))) == 2
    calls = []
    halves = gradients.GradientRows.halves

    def counted(self: GradientRows, *args: object) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return halves(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(gradients.GradientRows, "halves", counted)
    list(analyze(tiny_plan, ["gradient-similarity"], settings))
    assert len(calls) == 2
    assert [file.read_bytes() for file in files] == whole
    assert not tiny_plan.run.analysis("gradient-similarity.parts").exists()


def test_it_says_first_what_it_costs_and_a_dry_run_does_no_more(tiny_plan: Plan) -> None:
    lines = list(analyze(tiny_plan, ["gradient-similarity"], _settings({}), dry_run=True))
    assert len(lines) == 1
    assert str(lines[0]).startswith("gradient-similarity: 80 images with gradients, ")
    assert not tiny_plan.run.analysis("gradient-similarity.json").exists()


def test_more_images_than_there_are_are_refused_before_any_compute(tiny_plan: Plan) -> None:
    with pytest.raises(ValueError, match=r"gradient-similarity takes 41 images, and 40 are trained on"):
        next(analyze(tiny_plan, ["gradient-similarity"], _settings({"num_images": 41})))


def test_other_settings_are_computed_anew(tiny_plan: Plan) -> None:
    list(analyze(tiny_plan, ["gradient-similarity"], _settings({})))
    again = list(analyze(tiny_plan, ["gradient-similarity"], _settings({})))
    assert [str(line).split(",")[0] for line in again] == ["gradient-similarity: done"]
    record = json.loads(tiny_plan.run.analysis("gradient-similarity.json").read_text())
    assert record["settings"]["stride"] == 4
    assert len(list(analyze(tiny_plan, ["gradient-similarity"], _settings({"stride": 8})))) > 1


@pytest.fixture
def tiny_plan(tiny_config: Callable[..., Config], tmp_path: Path) -> Plan:
    return prepare(tiny_config(), tmp_path / "run")


def _settings(changes: dict[str, object]) -> Analyze:
    own = {"num_images": 8, "stride": 4, **changes}
    return Analyze.model_validate({"batch_size": 8, "gradient_similarity": own})


def _subject(plan: Plan, changes: dict[str, object]) -> Subject:
    pixels = plan.images.stack(range(8))
    assert isinstance(pixels, Tensor)
    return Subject(plan.base, plan.ranges, settings=_settings(changes), images=lambda num: pixels[:num])


def _map(plan: Plan, changes: dict[str, object]) -> Finding:
    return finding_of(_subject(plan, changes))


def test_the_training_of_a_base_has_a_map_for_every_checkpoint(
    tiny_config: Callable[..., Config], tiny_base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "training-of-a-base"
    shutil.copytree(tiny_base, folder / "pipeline")
    sections = {"pretrain": {"num_ranges": 2}, "analyze": _settings({}).model_dump()}
    config = Config.model_validate(tiny_config().model_dump() | sections)
    (folder / "config.yaml").write_text(dump_config(config))
    state = load_base(str(tiny_base)).network.state_dict()
    for update, step in ((20, 0.1), (100, 0.0)):
        weights = {key: value + step for key, value in state.items()}
        write_tensors(folder / "training" / "checkpoints" / f"{update}.safetensors", weights)
    found = CliRunner().invoke(cli.app, ["analyze", str(folder), "--only", "gradient-similarity"])
    assert found.exit_code == 0, found.output
    record = json.loads((folder / "analysis" / "gradient-similarity.json").read_text())
    assert [figure["file"] for figure in record["figures"]] == [
        "gradient-similarity.png",
        "gradient-similarity-training.png",
    ]
    with np.load(folder / "analysis" / "gradient-similarity.npz") as arrays:
        assert {name for name in arrays if name.startswith("usual")} == {"usual-20", "usual-100", "usual-base"}
        np.testing.assert_array_equal(arrays["usual-100"], arrays["usual-base"])
        assert abs(arrays["usual-20"] - arrays["usual-base"]).max() > 0.01
    smaller = [f"--set=landscape_ranges.{key}=8" for key in ("num_images", "num_gradient_images")]
    found = CliRunner().invoke(cli.app, ["analyze", str(folder), "--dry-run", *smaller])
    assert "task-vectors needs experts, which" in found.output
    assert "gradient-similarity: done" in found.output


@pytest.mark.parametrize("arguments", [["a", "b"], ["a", "--over", "seed"]])
def test_several_runs_are_compared_over_a_setting_and_one_is_not(arguments: list[str]) -> None:
    found = CliRunner().invoke(cli.app, ["analyze", *arguments])
    assert "several runs are compared over a setting" in str(found.exception)


def test_a_stride_that_leaves_one_timestep_is_refused_before_any_gradient() -> None:
    process = VP(VELOCITY.alphas_cumprod, "epsilon")
    with pytest.raises(UserError, match="stride is 11, expected at most 10, half of the timesteps"):
        gradient_similarity.cost(subject_of(process, stride=11))


def test_gradients_that_are_noise_are_told_to_be() -> None:
    draws = generator("noise alone")
    (grams,) = grams_of(torch.randn(6, 2, 5000, generator=draws), [5000])
    usual, halves = (values.float().numpy() for values in (grams.usual(), grams.halves()))
    found = gradient_similarity._statistics(usual, halves, np.array([0, 0, 0, 1, 1, 1]))
    said = gradient_similarity._sentence(found | {"num_images": 8})
    assert said.startswith("Most of these gradients is noise: one timestep's, from two halves of 8 images, have a mean")
