"""Activations before and after: CKA against its definition, and a network whose change is known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from decouple_merge.analysis import activations
from decouple_merge.analysis.activations import linear_cka
from decouple_merge.analysis.fixed import fixed_images
from decouple_merge.analysis.gradients import GradientRows, sketch_of
from decouple_merge.analysis.subject import Finding, Subject
from decouple_merge.config import Analyze
from decouple_merge.data.batches import Batch, LabelledBatch, LatentBatch
from decouple_merge.models.base import Base, load_base
from decouple_merge.models.families import FAMILIES
from decouple_merge.models.family import Family
from decouple_merge.seeds import generator
from test_families import EACH, inputs


def test_cka_is_the_sum_over_quadruples_that_defines_the_unbiased_hsic() -> None:
    draws = generator("cka")
    a, b = torch.randn(6, 3, generator=draws).double(), torch.randn(6, 5, generator=draws).double()
    b[:, :2] += a[:, :2]

    def hsic(x: torch.Tensor, y: torch.Tensor) -> float:
        """Sum over all i ≠ j ≠ q ≠ r of k_ij·(l_ij + l_qr - 2·l_iq), Gretton et al. 2005, as a U-statistic."""
        k, l = x @ x.T, y @ y.T  # noqa: E741
        total, n = 0.0, range(6)
        for i in n:
            for j in n:
                for q in n:
                    for r in n:
                        if len({i, j, q, r}) == 4:
                            total += float(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]))
        return total

    expected = hsic(a, b) / (hsic(a, a) * hsic(b, b)) ** 0.5
    assert linear_cka(a, b) == pytest.approx(expected, rel=1e-9)


def test_cka_knows_no_rotation_scale_or_shift() -> None:
    a = torch.randn(20, 4, generator=generator("cka"))
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator("rotation")))[0]
    assert linear_cka(a, 3 * a @ rotation + 5) == pytest.approx(1, abs=1e-6)


def test_cka_of_unrelated_representations_is_around_zero() -> None:
    draws = generator("unrelated")
    found = [linear_cka(torch.randn(16, 50, generator=draws), torch.randn(16, 50, generator=draws)) for _ in range(40)]
    assert abs(np.mean(found)) < 0.1


def test_what_does_not_vary_has_no_cka() -> None:
    assert np.isnan(linear_cka(torch.ones(8, 3), torch.randn(8, 3, generator=generator("varies"))))


def subject_of(family: str, folder: Path, **settings: object) -> Subject:
    base = load_base(str(FAMILIES[family].save_tiny(folder)))
    state = base.network.state_dict()
    pixels = torch.randint(0, 256, (6, *base.shape), generator=generator("pixels"), dtype=torch.uint8)
    own = {"num_images": 6, **settings}
    ranges = tuple(base.process.split(2))
    return Subject(
        base,
        ranges,
        [state, state],
        state,
        settings=Analyze.model_validate({"activations": own}),
        batch_size=4,
        images=lambda num: pixels[:num],
    )


def result(subject: Subject) -> Finding:
    events = activations.compute(subject)
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value


def test_a_bias_moves_its_own_channels_mean_and_no_pixel_from_another(tmp_path: Path) -> None:
    subject = subject_of("DDPMPipeline", tmp_path / "base", blocks=["up_blocks.1"])
    layer = subject.base.family.output_layers(subject.base.network)["up_blocks.1"]
    key = next(k for k, v in subject.base.network.state_dict().items() if v.data_ptr() == layer.bias.data_ptr())
    moved = dict(subject.base.network.state_dict())
    moved[key] = moved[key] + torch.nn.functional.one_hot(torch.tensor(2), len(layer.bias))
    finding = result(replace(subject, experts=[moved, subject.experts[1]]))
    (block,) = finding.summary["blocks"]
    change = finding.arrays[f"channels|0|expert|{block}"]
    expected = np.eye(len(change), dtype=np.float32)[2]
    np.testing.assert_allclose(change, expected, atol=1e-5)
    np.testing.assert_allclose(finding.arrays[f"places|0|expert|{block}"], 1 / len(change), atol=1e-5)
    for row in finding.rows:
        is_moved = (row["model"], row["range"]) == ("expert", 0)
        assert row["cka"] == pytest.approx(1, abs=1e-6)
        assert (row["channel_change"] > 0) == is_moved
    for figure in activations.draw(finding).values():
        activations.plt.close(figure)


def batch_of(base: Base, num: int) -> Batch:
    """Make images, or latents and what a network is told of them."""
    draws, told = generator("batch"), inputs(base)
    condition = {name: value.repeat(num // 2, *[1] * (value.dim() - 1)) for name, value in told.items()}
    if base.family.is_latent:
        moments = torch.randn(num, 1, 2, *base.shape, generator=draws)
        return LatentBatch(moments, condition, {name: value[0] for name, value in condition.items()})
    pixels = torch.randint(0, 256, (num, *base.shape), generator=draws, dtype=torch.uint8)
    return LabelledBatch(pixels, condition) if condition else pixels


@pytest.mark.parametrize("family", EACH, ids=lambda family: type(family).__name__)
def test_every_family_has_activations_and_gradients(family: Family, tmp_path: Path) -> None:
    base = load_base(str(family.save_tiny(tmp_path / "base")))
    state, draws = base.network.state_dict(), generator("moved")
    steps = {k: torch.randn(v.shape, generator=draws) for k, v in state.items()}
    moved = {k: v + 0.05 * steps[k] if v.is_floating_point() else v for k, v in state.items()}
    batch, ranges = batch_of(base, 4), tuple(base.process.split(2))
    settings = Analyze.model_validate({"activations": {"num_images": 4}})
    subject = Subject(base, ranges, [moved, moved], state, settings=settings, batch_size=3, images=lambda num: batch)
    finding = result(subject)
    assert {row["block"] for row in finding.rows} == set(family.output_layers(base.network))
    changes = {m: [r["channel_change"] for r in finding.rows if r["model"] == m] for m in activations.MODELS}
    assert min(changes["expert"]) > 0
    assert max(changes["merged"]) == 0
    for figure in activations.draw(finding).values():
        activations.plt.close(figure)
    rows = GradientRows(base, state, sketch_of(state, 1, 0), torch.device("cpu"), 3)
    found, norms = rows.halves(fixed_images(subject, 4), base.process.spread(ranges[0], 1)[0])
    torch.testing.assert_close(found.double().square().sum(1), norms, rtol=1e-4, atol=0)
    assert bool((norms > 0).all())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("blocks", ["up_blocks.9"], r"blocks has 'up_blocks.9', expected some of down_blocks.0, "),
        ("timesteps", [20.5], r"timesteps has 20.5, expected whole numbers: the base's schedule is a table"),
        ("timesteps", [40], r"timesteps has 40, expected some within 0 to 40"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path: Path, key: str, value: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        activations.cost(subject_of("DDPMPipeline", tmp_path / "base", **{key: value}))
