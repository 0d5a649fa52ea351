"""Drawing from prompts: stock diffusers' images, one call of the network a step, an image for each seed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, PNDMScheduler
from PIL import Image
from torch import Tensor

from conftest import WORDS, save_stable_diffusion, stock_images
from decouple_merge.cli import main as cli
from decouple_merge.config import Protocol, Sample, Text
from decouple_merge.diffusion.routing import RangeRouter
from decouple_merge.diffusion.timesteps import TimestepRange
from decouple_merge.evaluation.evaluate import evaluate_model
from decouple_merge.models.base import Base, load_base
from decouple_merge.models.ensemble import TimestepEnsemble
from decouple_merge.models.network import new_network
from decouple_merge.sampling.sampler import Denoiser, Prompts, denoiser, sample_images

CPU = torch.device("cpu")
PROMPTS = ["red cat", "a green bird", "two dogs"]


@pytest.fixture
def base(tiny_text_base: Path) -> Base:
    return load_base(str(tiny_text_base))


def ask(base: Base, first_seed: int = 0, prompts: list[str] = PROMPTS, **text: Any) -> Prompts:
    assert base.encoders is not None
    return Prompts(base.encoders, prompts, Text(**text), CPU, first_seed=first_seed)


def draw(base: Base, seeds: list[int], prompts: Prompts, model: Denoiser | None = None, **settings: Any) -> Tensor:
    sample = Sample(**{"num_steps": 4, "batch_size": 4, **settings})
    return torch.cat(
        list(sample_images(model or denoiser(base, base.network), base, seeds, sample, CPU, prompts=prompts))
    )


@pytest.mark.parametrize(
    ("sampler", "scheduler", "prediction_type", "text"),
    [
        ("PNDM", PNDMScheduler, "epsilon", {}),
        ("PNDM", PNDMScheduler, "v_prediction", {"negative_prompt": "sun", "guidance_scale": 3.0}),
        ("DDIM", DDIMScheduler, "epsilon", {"guidance_scale": 1.0}),
        ("DDIM", DDIMScheduler, "v_prediction", {}),
        ("EulerDiscrete", EulerDiscreteScheduler, "epsilon", {"negative_prompt": "sun", "guidance_scale": 3.0}),
        ("EulerDiscrete", EulerDiscreteScheduler, "v_prediction", {"guidance_scale": 1.0}),
    ],
)
def test_images_are_those_of_the_stock_pipeline(
    tmp_path: Path, sampler: str, scheduler: Any, prediction_type: str, text: dict[str, Any]
) -> None:
    folder = save_stable_diffusion(tmp_path / "base", prediction_type=prediction_type)
    stock: Any = DiffusionPipeline.from_pretrained(folder)
    changes = {"clip_sample": False} if sampler == "DDIM" else {}
    stock.scheduler = scheduler.from_config(stock.scheduler.config, **changes)
    stock.save_pretrained(folder)
    base = load_base(str(folder))
    arguments = {"guidance_scale": 7.5, **text}
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = ["sun"] * 3
    expected = stock_images(folder, PROMPTS, [5, 6, 7], num_inference_steps=4, **arguments)
    found = draw(base, [5, 6, 7], ask(base, 5, **text), sampler=sampler)
    theirs = torch.from_numpy((expected * 255).round()).permute(0, 3, 1, 2)
    assert theirs.std() > 20
    assert (theirs - found).abs().max() <= 1


def test_guidance_is_one_call_of_twice_the_batch_a_step(base: Base) -> None:
    shapes: list[tuple[int, ...]] = []

    def model(x: Tensor, t: Any, **condition: Tensor) -> Tensor:
        shapes.append((len(x), len(condition["encoder_hidden_states"])))
        return denoiser(base, base.network)(x, t, **condition)

    draw(base, [0, 1, 2, 3, 4], ask(base), model, sampler="DDIM")
    assert shapes == [(8, 8)] * 8
    shapes.clear()
    draw(base, [0, 1, 2, 3, 4], ask(base, guidance_scale=1), model, sampler="DDIM")
    assert shapes == [(4, 4)] * 8


def test_an_image_depends_on_its_seed_alone(base: Base) -> None:
    prompts, seeds = ask(base), [4, 0, 7, 2, 3]
    expected = draw(base, seeds, prompts)
    assert len({tuple(i.flatten().tolist()) for i in expected}) == 5
    assert torch.equal(draw(base, seeds[::-1], prompts).flip(0), expected)
    found = draw(base, seeds, prompts, batch_size=2)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_prompt_negative_prompt_and_guidance_change_the_image(base: Base) -> None:
    images = [
        draw(base, [3], p)
        for p in (
            ask(base),
            ask(base, prompts=["one cat"]),
            ask(base, negative_prompt="sun"),
            ask(base, guidance_scale=20),
        )
    ]
    assert len({tuple(i.flatten().tolist()) for i in images}) == 4


def test_the_prompt_of_a_seed_comes_round_again(base: Base) -> None:
    # Seeds 10 and 13 share the first of three prompts; it is the same image as with that prompt alone.
    found = draw(base, [10, 13], ask(base, first_seed=10))
    assert torch.equal(found, draw(base, [10, 13], ask(base, prompts=PROMPTS[:1])))


def test_only_the_prompts_of_the_seeds_are_encoded_and_the_label_is_of_all(base: Base) -> None:
    assert base.encoders is not None
    few = Prompts(base.encoders, PROMPTS, Text(), CPU, first_seed=10, seeds=range(11, 12))
    assert sorted(few.texts.index) == ["", PROMPTS[1]]
    assert few.label == ask(base).label
    assert torch.equal(draw(base, [11], few), draw(base, [11], ask(base, 10)))


def test_the_label_tells_prompts_and_guidance_apart(base: Base) -> None:
    labels = [
        ask(base).label,
        ask(base, prompts=PROMPTS[::-1]).label,
        ask(base, negative_prompt="sun").label,
        ask(base, guidance_scale=2).label,
    ]
    assert len(set(labels)) == 4
    assert labels[0].startswith("3 texts ")


def test_the_ensemble_gives_the_texts_to_the_expert_of_each_step(base: Base) -> None:
    calls: list[tuple[int, int]] = []
    experts = [new_network(base), new_network(base)]
    for index, expert in enumerate(experts):
        expert.register_forward_pre_hook(
            lambda m, args, kwargs, i=index: calls.append((i, len(kwargs["encoder_hidden_states"]))), with_kwargs=True
        )
    router = RangeRouter([TimestepRange(0, 20), TimestepRange(20, 40)], 40)
    both = denoiser(base, TimestepEnsemble(experts, router, base.timestep_of))
    found = draw(base, [0, 1], ask(base), both, sampler="DDIM")
    # Steps at 31, 21, 11 and 1.
    assert calls == [(1, 4), (1, 4), (0, 4), (0, 4)]
    assert torch.equal(found, draw(base, [0, 1], ask(base), sampler="DDIM"))


def test_a_text_to_image_base_without_prompts_is_refused(base: Base) -> None:
    with pytest.raises(ValueError, match="found no prompts for a StableDiffusionPipeline, which draws what"):
        next(sample_images(denoiser(base, base.network), base, [0], Sample(num_steps=2), CPU))


def test_prompts_for_an_unconditional_base_are_refused(tiny_base: Path, base: Base) -> None:
    other = load_base(str(tiny_base))
    with pytest.raises(ValueError, match="found prompts for a DDPMPipeline, which takes no text: leave them out"):
        next(sample_images(denoiser(other, other.network), other, [0], Sample(num_steps=2), CPU, prompts=ask(base)))


def test_a_model_is_scored_on_the_images_of_its_prompts(
    tiny_text_base: Path, tiny_captioned: Path, base: Base, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    sample, text = Sample(num_steps=2), Text(prompts=tmp_path / "prompts.txt", guidance_scale=3)
    settings = Protocol(metrics=["kd_effnetlite0"], num_images=6, seed=4, sample=sample, text=text)
    scored = [str(tiny_text_base), draw(base, [4, 5, 6, 7, 8, 9], ask(base, 4, guidance_scale=3), num_steps=2).split(6)]
    model, images = (
        next(r for r in evaluate_model(s, str(tiny_captioned), settings) if isinstance(r, dict)) for s in scored
    )
    assert model["value"] == pytest.approx(images["value"], rel=1e-3)
    assert model["prompts"] == ask(base, guidance_scale=3).label


def test_the_command_draws_an_image_for_each_prompt_of_a_file(
    tiny_text_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(WORDS))
    command = ["deme", "sample", str(tiny_text_base), "--out", str(tmp_path / "out"), "--num-steps", "3"]
    command += ["--sampler", "PNDM", "--seed", "4"]

    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", [*command, *arguments])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        return int(exited.value.code or 0)

    changed = ("--set", "text.guidance_scale=3", "--set", "text.negative_prompt=two dogs")
    assert run("--prompts", str(tmp_path / "prompts.txt"), *changed) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"{i}.png" for i in range(4, 10)]
    negative = {"negative_prompt": ["two dogs"] * 6, "guidance_scale": 3.0}
    expected = stock_images(tiny_text_base, WORDS, list(range(4, 10)), num_inference_steps=3, **negative)
    for image, seed in zip(expected, range(4, 10), strict=True):
        found = np.asarray(Image.open(tmp_path / "out" / f"{seed}.png")).astype(int)
        assert abs((image * 255).round() - found).max() <= 1
    assert run("--num-images", "2") == 2
    assert "found no prompts for a StableDiffusionPipeline" in capsys.readouterr().err
    assert run("--prompts", str(tmp_path / "prompts.txt"), "--set", "text.guidance_scale=0.5") == 2
    assert "guidance_scale: Input should be greater than or equal to 1, found 0.5" in capsys.readouterr().err
