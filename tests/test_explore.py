"""Exploring a run: its images against those of the models that it is about, and the page in a browser."""

import importlib.util
import json
import math
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chromium import Tab, find_browser
from decouple_merge.cli import main as cli
from decouple_merge.config import Config, Sample, Text
from decouple_merge.errors import UserError
from decouple_merge.experiment.finetuning import finetune_experts
from decouple_merge.experiment.plan import prepare
from decouple_merge.exploring.estimate import SearchKnowledge
from decouple_merge.exploring.explorer import Explorer
from decouple_merge.sampling.model import open_model

DEVICE = torch.device("cpu")
LEVEL = {"level": "screen", "num_images": 10, "seconds": 1.0}


@pytest.fixture
def run(tiny_config: Callable[..., Config], tmp_path: Path) -> Path:
    """A run whose two experts are finished, and whose search has tried eight candidates."""
    config = tiny_config(finetune={"baseline": False, "learning_rate": 1e-2}, search={"method": "ties", "density": 0.5})
    folder = tmp_path / "run"
    list(finetune_experts(prepare(config, folder)))
    (folder / "search").mkdir()
    write_trials(folder, [((0.25 * i, 0.1 * i), math.exp(3 + (0.25 * i - 1) ** 2)) for i in range(8)])
    return folder


def write_trials(folder: Path, found: list[tuple[tuple[float, ...], float | None]]) -> None:
    lines = [json.dumps(LEVEL | {"weights": w, "value": v}) for w, v in found]
    (folder / "search/trials.jsonl").write_text("\n".join(lines) + "\n")


def stock(model: str | Path) -> torch.Tensor:
    # The seeds that the search chooses by, so that none of the report's is among them.
    seeds = range(1_000_000, 1_000_008)
    drawn = open_model(str(model), Sample(sampler="DDIM", num_steps=3, batch_size=8), Text()).draw(seeds, DEVICE)
    return torch.cat(list(drawn))


def test_its_images_are_those_of_the_models(run: Path, tmp_path: Path) -> None:
    explorer = Explorer(run)
    assert torch.equal(explorer.pretrained, stock(explorer.config.base))
    assert torch.equal(explorer.ensemble, stock(run))
    assert torch.equal(explorer.draw((0.0, 0.0), "linear", 1.0), explorer.pretrained)
    for method, density in (("ties", 0.5), ("linear", 1.0), ("ties", 0.2)):
        out = tmp_path / f"{method}-{density}"
        list(explorer.export((0.7, 0.4), method, density, out))
        drawn = explorer.draw((0.7, 0.4), method, density)
        assert torch.equal(drawn, stock(out))
        assert not torch.equal(drawn, explorer.pretrained)
        record = json.loads((out / "merge.json").read_text())
        assert (record["method"], record["weights"], record["settings"]["density"]) == (method, [0.7, 0.4], density)


def test_many_densities_are_not_all_kept(run: Path) -> None:
    explorer = Explorer(run)
    first = explorer.draw((1.0, 0.5), "ties", 0.1)
    for i in range(2, 8):
        explorer.draw((1.0, 0.5), "ties", i / 10)
    assert len(explorer._mergers) == 4
    assert torch.equal(explorer.draw((1.0, 0.5), "ties", 0.1), first)


def test_it_starts_with_the_runs_own_merge(run: Path) -> None:
    assert Explorer(run).best == (0.5, 0.5)
    (run / "merged").mkdir()
    (run / "merged/merge.json").write_text(json.dumps({"weights": [1.2, 0.3], "settings": {"blocks": {}}}))
    assert Explorer(run).best == (1.2, 0.3)
    assert Explorer(run).names == ["[0, 20)", "[20, 40)"]


def test_it_merges_by_the_settings_of_the_search(run: Path, tmp_path: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("vote: sum", "vote: count").replace("scale: 1.0", "scale: 1.5"))
    explorer = Explorer(run)
    assert (explorer.config.search.vote, explorer.config.search.scale, explorer.density) == ("count", 1.5, 0.5)
    drawn = explorer.draw((0.7, 0.4), "ties", 0.5)
    list(explorer.export((0.7, 0.4), "ties", 0.5, tmp_path / "out"))
    assert torch.equal(drawn, stock(tmp_path / "out"))
    settings = json.loads((tmp_path / "out/merge.json").read_text())["settings"]
    assert (settings["vote"], settings["scale"]) == ("count", 1.5)


def test_a_measured_candidate_is_looked_up(run: Path, tiny_config: Callable[..., Config]) -> None:
    knowledge = SearchKnowledge(run / "search/trials.jsonl", Explorer(run).config)
    assert knowledge.known((0.5, 0.2)) == {"screen": (math.exp(3.25), 10)}
    assert knowledge.known((0.5, 0.21)) == {}
    assert [knowledge.knows(*how) for how in (("ties", 0.5), ("ties", 0.6), ("linear", 0.5))] == [True, False, False]


def test_the_estimate_is_near_a_smooth_truth_and_unsure_far_away(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    def truth(x: float, y: float) -> float:
        return math.exp(5 + (x - 0.8) ** 2 + 0.5 * (y - 0.4) ** 2)

    points = [(0.3 * i, 0.35 * j) for i in range(5) for j in range(5)]
    (tmp_path / "search").mkdir()
    write_trials(tmp_path, [(p, truth(*p)) for p in points])
    knowledge = SearchKnowledge(tmp_path / "search/trials.jsonl", tiny_config())
    near, far = knowledge.estimate((0.75, 0.5)), knowledge.estimate((4.0, -3.0))
    assert near is not None
    assert far is not None
    assert near.value == pytest.approx(truth(0.75, 0.5), rel=0.02)
    assert near.low < near.value < near.high
    assert math.log(far.high / far.low) > 10 * math.log(near.high / near.low)


def test_too_few_candidates_give_no_estimate(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    write_trials(
        tmp_path, [((0.0, 0.0), 1.0), ((1.0, 0.0), 2.0), ((1.0, 1.0), None), ((1.0, 2.0), 3.0), ((2.0, 2.0), 3.0)]
    )
    assert SearchKnowledge(tmp_path / "search/trials.jsonl", tiny_config()).estimate((0.5, 0.5)) is None
    assert SearchKnowledge(tmp_path / "none.jsonl", tiny_config()).estimate((0.5, 0.5)) is None


def test_without_the_extra_the_user_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "decouple_merge.exploring.page", raising=False)
    monkeypatch.delattr("decouple_merge.exploring.page", raising=False)
    monkeypatch.setattr("sys.argv", ["deme", "explore", "run"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "deme explore needs gradio, which isn't installed: pip install 'decouple-merge[explore]'" in (
        capsys.readouterr().err
    )


needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None or find_browser() is None,
    reason="no gradio or no Chromium here: pip install 'decouple-merge[explore]', apt-get install chromium",
)


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    with Tab(tmp_path / "profile") as opened:
        yield opened


def until(what: Callable[[], Any], seconds: float = 300.0) -> Any:
    """Wait until something is true, and return it; on a busy machine that takes a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s")


SLIDE = """(slider, value) => {
  slider.value = value;
  for (const kind of ['input', 'change', 'pointerup']) slider.dispatchEvent(new Event(kind, {bubbles: true}));
}"""


@needs_gradio
# What gradio and its server warn of is theirs.
@pytest.mark.filterwarnings("ignore")
def test_a_slider_changes_images_and_distance_and_the_merge_is_exported(run: Path, tab: Tab, tmp_path: Path) -> None:
    from decouple_merge.exploring import page

    write_trials(run, [((0.25 * i, 0.1 * i), 20.0 + (0.25 * i - 1) ** 2) for i in range(8)])
    opened = page.open_page(Explorer(run), tmp_path / "explored")
    try:
        url = page.launch(opened, "127.0.0.1", None, wait=False)
        assert url.startswith("http://127.0.0.1:")
        tab.show(1200)
        tab.open(url)
        distance, images = (
            "document.querySelector('#distance')?.innerText ?? ''",
            "document.querySelectorAll('.strip img')",
        )
        until(lambda: "expects" in tab.run(distance) and tab.run(f"{images}.length") == 3)
        first = tab.run(f"{images}[0].src")
        sliders = "document.querySelectorAll('input[type=range]')"
        for index, weight in enumerate((0.75, 0.3)):
            tab.run(f"({SLIDE})({sliders}[{index}], '{weight}')")
        until(lambda: "measured by the search, 20.06 on 10 images (screen)" in tab.run(distance))
        until(lambda: tab.run(f"{images}[0].src") != first)
        tab.run("[...document.querySelectorAll('button')].find(b => b.innerText == 'Export this merge').click()")
        until(lambda: "Written:" in tab.run("document.querySelector('#exported')?.innerText ?? ''"))
        record = json.loads((tmp_path / "explored/merge.json").read_text())
        assert (record["method"], record["weights"]) == ("ties", [0.75, 0.3])
        assert tab.errors == []
        assert [r for r in tab.requests if not r.startswith((url.rstrip("/"), "data:", "blob:"))] == []
    finally:
        opened.close()


@needs_gradio
@pytest.mark.filterwarnings("ignore")
def test_a_taken_port_is_told(run: Path, tmp_path: Path) -> None:
    from decouple_merge.exploring import page

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        opened = page.open_page(Explorer(run), tmp_path / "explored")
        with pytest.raises(UserError, match=f"--port {port} can't be served on"):
            page.launch(opened, "127.0.0.1", port, wait=False)
