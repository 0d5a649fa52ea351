"""``deme init``: what base and data are is found, and the config that it writes runs."""

import re
from pathlib import Path

import pytest

from decouple_merge.config import dump_commented, load_config
from decouple_merge.errors import UserError
from decouple_merge.experiment import initial
from decouple_merge.experiment.dry_run import describe
from decouple_merge.experiment.initial import write_config


def init(base: Path, source: Path, folder: Path, *overrides: str) -> tuple[str, str, str]:
    """Write a config; returns what was said, the file with single spaces, and what a dry run of it says."""
    out = folder / "config.yaml"
    said = "\n".join(write_config(str(base), str(source), out, [*overrides]))
    return said, re.sub(" +", " ", out.read_text()), "\n".join(describe(load_config(out), folder / "run"))


def test_grey_pixels(tiny_base: Path, tiny_images: Path, tmp_path: Path) -> None:
    said, text, dry = init(tiny_base, tiny_images, tmp_path, "evaluate.num_images=20", "seed=3")
    assert "DDPMPipeline, " in said
    assert " 8 x 8, 1 channel(s), told nothing" in said
    assert "48 images, the first 8 wide" in said
    assert "fit:" not in text
    assert "metric: kd_effnetlite0 # the Fréchet distance to so few images is mostly bias" in text
    assert "evaluation: 3 x 20 images a model" in dry
    assert load_config(tmp_path / "config.yaml").seed == 3
    with pytest.raises(UserError, match=r"config\.yaml is there already"):
        init(tiny_base, tiny_images, tmp_path)


def test_captioned_colour_for_latents(tiny_text_base: Path, tiny_captioned: Path, tmp_path: Path) -> None:
    said, text, dry = init(tiny_text_base, tiny_captioned, tmp_path)
    assert "told texts" in said
    assert "24 images, the first 16 wide, 3 channel(s), such as 'red cat'" in said
    assert "guidance_scale: 3.0 # 1 is none" in text
    assert "prompts: 24, guidance 3" in dry


def test_images_without_classes_for_a_base_that_is_told_some(
    tiny_dit_base: Path, tiny_images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has no captions"):
        list(write_config(str(tiny_dit_base), str(tiny_images), tmp_path / "c.yaml"))
    assert not (tmp_path / "c.yaml").exists()


def test_other_sizes_are_resized_and_a_large_base_gets_adapters(
    tiny_text_base: Path, tiny_captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial, "SCALES", initial.SCALES[-1:])
    _, text, dry = init(tiny_text_base, tiny_captioned, tmp_path, "data.fit=resize", "data.num_held_out=4")
    assert "rank: 32" in text
    assert "num_held_out: 4 " in text
    assert "experts: 4 x 5000 updates of 16 images" in dry


def test_comments_stand_behind_their_keys() -> None:
    found = dump_commented(
        {"a": {"b": 1, "c": [2]}, "b": 3}, {"b": "outer", "a.b": "inner", "a.c": "list", "c": "none"}
    )
    assert [line.partition("#")[::2] for line in found.splitlines()] == [
        ("a:", ""),
        (f"{'  b: 1':<32}", " inner"),
        (f"{'  c:':<32}", " list"),
        ("  - 2", ""),
        (f"{'b: 3':<32}", " outer"),
    ]
