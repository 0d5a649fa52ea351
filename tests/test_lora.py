"""Experts as adapters: only they change, the teacher is the network without them, the task vector their product."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from conftest import make_text_unet, make_unet, stock_images
from decouple_merge.config import Config, Finetune, Lora, Merge
from decouple_merge.experiment import finetuning, workflow
from decouple_merge.experiment.plan import check, prepare
from decouple_merge.merging.recipes import merge_models
from decouple_merge.models import lora
from decouple_merge.models.base import load_base
from decouple_merge.models.families.stable_diffusion import StableDiffusion
from decouple_merge.models.lora import (
    FILE,
    attach_lora,
    check_lora,
    lora_factors,
    merge_factors,
    unadapted_state_dict,
    without_lora,
)
from decouple_merge.training import trainer

MakeConfig = Callable[..., Config]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


pytestmark = pytest.mark.usefixtures("every_record")


def output(network: nn.Module) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=draws), torch.randn(2, 5, 16, generator=draws)
    with torch.no_grad():
        return network(x, torch.tensor([3, 30]), encoder_hidden_states=text, return_dict=False)[0]


def adapted(**settings: Any) -> nn.Module:
    """An adapter whose factors are both away from 0."""
    network = make_text_unet().eval()
    attach_lora(network, Lora(**settings), 0, "lora")
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=draws)
    return network


def config_of(make: MakeConfig, **settings: Any) -> Config:
    rest = {"baseline": False, "projection": {"placement": "none"}, **settings}
    return make(finetune={"lora": {"rank": 3, "alpha": 6}, **rest})


def test_attaching_changes_no_bit_and_trains_the_factors_alone() -> None:
    network = make_text_unet().eval()
    before, state = output(network), torch.get_rng_state()
    attach_lora(network, Lora(rank=2), 0, "lora")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output(network), before)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in network.named_parameters() if "lora_" in name} != set()


def test_an_adapter_is_switched_off_and_on_again_with_its_gradients() -> None:
    network = adapted(rank=2)
    on, before = output(network), output(make_text_unet().eval())
    with without_lora(network):
        assert torch.equal(output(network), before)
    assert not torch.allclose(on, before, rtol=1e-2)
    assert torch.equal(output(network), on)
    assert all(p.requires_grad == ("lora_" in name) for name, p in network.named_parameters())


@pytest.mark.parametrize("targets", [["to_q", "to_out.0"], ["conv1", "proj_out", "conv_shortcut", "to_k"]])
def test_stock_weights_with_the_product_give_the_adapters_output(targets: list[str]) -> None:
    network = adapted(rank=3, alpha=5.0, target_modules=targets)
    stock = make_text_unet().eval()
    weights = unadapted_state_dict(network, {})
    changed = [k for k, v in stock.state_dict().items() if not torch.equal(v, weights[k])]
    assert {k.removesuffix(".weight").rpartition(".")[2] for k in changed} == {t.rpartition(".")[2] for t in targets}
    assert weights.keys() == stock.state_dict().keys()
    stock.load_state_dict(weights)
    torch.testing.assert_close(output(stock), output(network), rtol=1e-5, atol=1e-5)


def test_the_product_is_pefts_own_and_of_the_given_parameters() -> None:
    settings = Lora(rank=2, alpha=3.0, target_modules=["to_q"])
    network = adapted(**settings.model_dump())
    values = {n: 2 * p.detach() for n, p in network.named_parameters() if p.requires_grad}
    expected: Any = get_peft_model(make_text_unet(), LoraConfig(r=2, lora_alpha=3, target_modules=["to_q"]))  # type: ignore[arg-type]
    own = dict(expected.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            own[f"base_model.model.{name}"].copy_(value)
    merged = expected.merge_and_unload().state_dict()
    for key, value in unadapted_state_dict(network, values).items():
        torch.testing.assert_close(value, merged[key])


def test_adapters_combine_to_one_whose_product_is_the_weighted_sum() -> None:
    factors = [lora_factors(adapted(rank=r), StableDiffusion(), {}) for r in (2, 3)]
    one = merge_factors(factors, [0.5, -1.5])
    for key, down in one.items():
        if key.endswith("lora_A.weight"):
            other = key.replace("lora_A", "lora_B")
            expected = sum(w * f[other] @ f[key] for w, f in zip([0.5, -1.5], factors, strict=True))
            assert down.shape[0] == 5
            torch.testing.assert_close(one[other] @ down, expected)


def test_a_run_of_adapters_ends_as_a_merged_pipeline_and_as_a_lora_of_the_base(
    text_config: MakeConfig, tmp_path: Path
) -> None:
    config, folder = config_of(text_config, learning_rate=0.1), tmp_path / "run"
    # Whatever the search finds, the merge is not the base.
    config = config.model_copy(update={"search": config.search.model_copy(update={"frozen": {0: 1.0}})})
    list(workflow.run(config, folder))
    start = load_file(Path(config.base) / WEIGHTS)
    experts = [load_file(folder / f"experts/{i}/model.safetensors") for i in range(2)]
    for index, expert in enumerate(experts):
        factors = load_file(folder / f"experts/{index}/lora" / FILE)
        assert expert.keys() == start.keys()
        for key, value in start.items():
            down, up = (factors.get(f"unet.{key.removesuffix('.weight')}.lora_{s}.weight") for s in "AB")
            if down is None or up is None:
                assert torch.equal(expert[key], value)
            else:
                assert down.shape[0] == 3
                assert (up @ down).abs().max() > 1e-6
                torch.testing.assert_close(expert[key] - value, up @ down, rtol=1e-4, atol=1e-6)
    asked = {"num_inference_steps": 3, "guidance_scale": 3.0}
    merged = stock_images(folder / "merged", ["red cat"], [0], **asked)
    pipeline: Any = DiffusionPipeline.from_pretrained(config.base)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder / "merged-lora")
    generators = [torch.Generator().manual_seed(0)]
    found = pipeline(["red cat"], generator=generators, output_type="np", **asked).images
    assert abs(found - merged).max() < 1e-3
    assert abs(stock_images(Path(config.base), ["red cat"], [0], **asked) - merged).max() > 1e-2
    # The experts' files are what deme merge takes.
    loras = [folder / f"experts/{i}/lora" for i in range(2)]
    list(merge_models(config.base, loras, Merge(weights=[1.0, 0.5]), tmp_path / "by-hand"))
    by_hand = load_file(tmp_path / "by-hand" / WEIGHTS)
    for key, value in start.items():
        expected = value + (experts[0][key] - value) + 0.5 * (experts[1][key] - value)
        torch.testing.assert_close(by_hand[key], expected, rtol=1e-4, atol=1e-5)


def test_the_teacher_of_an_adapter_is_the_base(
    text_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, outputs = prepare(config_of(text_config, validate_every=9), tmp_path / "run"), []
    predict = trainer.predict

    def spy(base: Any, network: nn.Module, x: Tensor, t: Any, **condition: Tensor) -> Tensor:
        found = predict(base, network, x, t, **condition)
        if not torch.is_grad_enabled() and len(x) == 4 and t.dim():
            outputs.append((found, predict(plan.base, plan.base.network, x, t, **condition)))
        return found

    monkeypatch.setattr(trainer, "predict", spy)
    list(finetuning.finetune_experts(plan, 0))
    teacher = outputs[:4]
    assert len(teacher) == 4
    assert all(torch.equal(found, expected) for found, expected in teacher)


def test_training_an_adapter_goes_on_bitwise_after_an_interruption(text_config: MakeConfig, tmp_path: Path) -> None:
    config, results = config_of(text_config), []
    for name, stop in (("whole", False), ("interrupted", True)):
        plan = prepare(config, tmp_path / name)
        events = finetuning.finetune_experts(plan, 1)
        while stop and getattr(next(events), "update", 0) < 3:
            pass
        events.close()
        list(finetuning.finetune_experts(plan, 1))
        results.append(load_file(tmp_path / name / "experts/1/lora" / FILE))
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_a_pixel_model_trains_adapters_too(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = config_of(tiny_config)
    list(finetuning.finetune_experts(prepare(config, tmp_path / "run")))
    start, expert = load_base(config.base).network.state_dict(), load_file(tmp_path / "run/experts/0/model.safetensors")
    assert start.keys() == expert.keys()
    assert {k for k, v in start.items() if not torch.equal(v, expert[k])} == {
        k for k in start if k.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
    }


def test_adapters_with_projections_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lora is set and projection.placement is folded; .*set projection.placement"):
        Finetune(lora=Lora())


def test_modules_that_the_base_lacks_are_refused_before_any_compute(text_config: MakeConfig, tmp_path: Path) -> None:
    config = text_config(finetune={"lora": {"target_modules": ["to_q", "q_proj"]}, "projection": {"placement": "none"}})
    with pytest.raises(ValueError, match=r"the base has no module q_proj; its attention layers are called to_k, to_q,"):
        check(config, tmp_path / "run")


@pytest.mark.parametrize("target", ["attn1", "norm1", "to_out"])
def test_modules_that_take_no_adapter_are_refused_by_their_class(target: str) -> None:
    with pytest.raises(ValueError, match=rf"target_modules has {target}, and .*{target} is a \w+: give linear"):
        check_lora(make_text_unet(), Lora(target_modules=[target]))


def test_adapters_without_peft_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"finetune.lora needs peft, which isn't installed: pip install"):
        check_lora(make_unet(), Lora())
