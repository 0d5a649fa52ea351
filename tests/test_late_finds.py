"""What a run would find out late is found before its trainings."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from decouple_merge.config import Config, Merge, Text
from decouple_merge.errors import UserError
from decouple_merge.experiment.plan import check
from decouple_merge.merging.recipes import merge_models
from decouple_merge.storage.hub import pipeline_folder


def test_prompts_for_a_base_that_reads_none_are_not_passed_over(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(UserError, match="found prompts for a DDPMPipeline, which takes no text: leave them out"):
        check(tiny_config(text=Text(prompts=tmp_path / "p.txt")), tmp_path / "run")


def test_a_name_that_neither_a_path_nor_the_hub_has_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str) -> str:
        raise OSError(f"no model {name}\nand a hint")

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    with pytest.raises(UserError, match=r"^'org/nothing' is no path here .*\(no model org/nothing\); check the"):
        pipeline_folder("org/nothing")


def test_a_base_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "b.safetensors")
    base, out = tmp_path / "b.safetensors", tmp_path / "o.safetensors"
    with pytest.raises(UserError, match=r"b\.safetensors holds no tensors"):
        list(merge_models(str(base), [base], Merge(weights=[1]), out))
