"""The report page: its verdict against known numbers, what it shows of a run, and how it behaves in a browser."""

import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chromium import Tab, find_browser
from decouple_merge.config import Config, dump_config
from decouple_merge.errors import UserError
from decouple_merge.reporting import page
from decouple_merge.reporting.contents import read_run
from decouple_merge.reporting.gaps import not_measured
from decouple_merge.reporting.page import write_report
from decouple_merge.reporting.verdict import verdict
from decouple_merge.reporting.views import _costs

FD, KD = "fd_effnetlite0", "kd_effnetlite0"
BASELINE = "baseline-finetuned"
# On three sets of seeds; the merged model's are 0.8 of the pretrained model's up to a little noise.
VALUES = {
    "pretrained": [100.0, 104.0, 98.0],
    BASELINE: [95.0, 98.0, 94.0],
    "ensemble": [85.0, 88.0, 83.0],
    "merged": [80.1, 83.0, 78.5],
}
RANGES = [{"low": 0, "high": 20}, {"low": 20, "high": 40}]
MakeRun = Callable[..., Path]


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def metrics(values: dict[str, list[float]], metric: str = FD, **changes: Any) -> list[dict[str, Any]]:
    shared = {"metric": metric, "num_images": 10, "extractor": "effnetlite0:00", "reference": "images.npz:00"}
    shared |= {"sampler": "DDIM", "num_steps": 3, "git": None, "time": "2026-01-01T00:00:00+00:00", **changes}
    return [
        {"model": model, "value": value, "seeds": [10 * i, 10 * i + 9], **shared}
        for model, found in values.items()
        for i, value in enumerate(found)
    ]


def training(folder: Path, name: str, own: dict[str, int], level: float) -> None:
    write(folder / "expert.json", {"name": name, "own": own, "ranges": RANGES})
    losses = [[level * (1 + 0.1 / u), 0.01 * level * (1 + 0.2 / u)] for u in (1, 2, 3)]
    lines(folder / "log.jsonl", [{"update": 2 * u, "validation": v} for u, v in zip((1, 2, 3), losses, strict=True)])


@pytest.fixture
def make_run(tiny_config: Callable[..., Config], tmp_path: Path) -> MakeRun:
    """Write a run folder of known content; a size of images, seeds and numbers may be given."""

    def make(name: str = "run", seed: int = 0, size: int = 8, values: dict[str, list[float]] = VALUES) -> Path:
        run, chance = tmp_path / name, np.random.default_rng(seed)
        run.mkdir()
        (run / "config.yaml").write_text(dump_config(tiny_config(seed=seed)))
        base, versions = {"name": "base", "sha256": "b" * 64}, {"torch": "2"}
        data = {"source": "images.npz", "num_images": 48, "sha256": "d" * 64}
        write(run / "manifest.json", {"base": base, "data": data, "device": "cpu", "git": None, "versions": versions})
        lines(run / "metrics.jsonl", metrics(values) + metrics(values, KD))
        for i, own in enumerate(RANGES):
            training(run / f"experts/{i}", f"expert-{i}", own, 0.1 + 0.01 * i)
        training(run / f"baselines/{BASELINE}", BASELINE, {"low": 0, "high": 40}, 0.12)
        trial = {"level": "screen", "seconds": 1.5, "num_images": 10}
        points = [((0.0, 0.0), 100.0), ((0.5, 0.5), 90.0), ((1.0, 0.7), 79.0), ((2.0, 2.0), None)]
        lines(run / "search/trials.jsonl", [trial | {"weights": w, "value": v} for w, v in points])
        write(run / "search/candidates.json", {"metric": FD, "pretrained": 100.0, "best": 79.0, "sum": None})
        record = {"method": "ties", "weights": [1.0, 0.7], "settings": {"density": 0.7, "blocks": {}}}
        ranges = [[0, 20], [20, 40]]
        write(
            run / "merged/merge.json",
            record | {"ranges": ranges, "merged_sha256": "a" * 64, "pipeline": "DDPMPipeline"},
        )
        for model in values:
            (run / "samples" / model).mkdir(parents=True)
            for i in range(9):
                pixels = chance.integers(0, 256, (size, size), dtype=np.uint8)
                Image.fromarray(pixels).save(run / "samples" / model / f"{i}.png")
        summary = {"title": "Task vectors", "caption": "Cosines.", "finding": "They are 0.07 at most."}
        figures = [{"file": "task-vectors.png", "caption": "Cosines of them."}]
        summary |= {"name": "task-vectors", "settings": {"stride": 4}, "figures": figures}
        write(run / "analysis/task-vectors.json", summary)
        (run / "figures").mkdir()
        Image.effect_noise((300, 200), 60).save(run / "figures/task-vectors.png")
        Image.effect_noise((300, 200), 60).save(run / "figures/search-surfaces.png")
        lines(run / "costs.jsonl", [{"stage": "finetune", "seconds": 4000.0}, {"stage": "finetune", "seconds": 3200.0}])
        return run

    return make


class Page(HTMLParser):
    """What a page holds: its tags with their attributes, ids, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += " " if tag in ("td", "th") else ""

    def handle_data(self, data: str) -> None:
        self.text += data


def read(run: Path) -> Page:
    return Page(write_report([run]).read_text(encoding="utf-8"))


def test_the_verdict_has_the_ratios_of_the_paired_numbers(make_run: MakeRun) -> None:
    found = verdict([read_run(make_run())])
    merged, pretrained, baseline = (sum(VALUES[m]) for m in ("merged", "pretrained", BASELINE))
    assert found.state == "better"
    assert found.sentence.startswith(
        "The merged model is better than the pretrained model and better than plain finetuning with as many updates: "
        f"its {FD} is {merged / pretrained:.3f} times (95 % interval 0.798 to 0.801) that of the pretrained model and "
        f"{merged / baseline:.3f} times"
    )


@pytest.mark.parametrize(
    ("merged", "state", "words"),
    [
        ([120.0, 125.0, 118.0], "worse", "is worse than the pretrained model and worse than plain finetuning"),
        ([97.5, 100.9, 96.6], "mixed", "is better than the pretrained model and worse than plain finetuning"),
        ([90.0, 130.0, 80.0], "mixed", "is not told apart from the pretrained model and not told apart from plain"),
        # Of three differences of one sign, the bootstrap excludes 1 always; Student's t doesn't.
        ([60.0, 103.9, 97.0], "mixed", "is apparently better than the pretrained model and not told apart"),
    ],
)  # fmt: skip
def test_the_verdict_says_no_more_than_the_intervals(
    make_run: MakeRun, merged: list[float], state: str, words: str
) -> None:
    found = verdict([read_run(make_run(values=VALUES | {"merged": merged}))])
    assert (found.state, words in found.sentence) == (state, True)


def test_a_larger_recall_is_better(make_run: MakeRun) -> None:
    run = make_run()
    lines(run / "metrics.jsonl", metrics({"pretrained": [0.2, 0.21], "merged": [0.3, 0.31]}, "recall_effnetlite0"))
    found = verdict([read_run(run)])
    assert (found.state, "is better than the pretrained model:" in found.sentence) == ("better", True)


def test_one_set_of_images_has_no_interval(make_run: MakeRun) -> None:
    found = verdict([read_run(make_run(values={m: v[:1] for m, v in VALUES.items()}))])
    assert found.sentence.startswith("On one set of images, the merged model is better than the pretrained model and")
    assert "interval" not in found.sentence
    assert "raise evaluate.num_seed_sets" in found.note


def test_equal_numbers_are_as_good(make_run: MakeRun) -> None:
    found = verdict([read_run(make_run(values={m: [50.0] for m in VALUES}))])
    assert "the merged model is as good as the pretrained model" in found.sentence


@pytest.mark.parametrize(
    ("changes", "models", "sentence"),
    [
        ({"search": {"over": "nothing"}}, ["pretrained", BASELINE], "Nothing was merged: search.over is nothing."),
        (
            {"finetune": {"experts": "denoisers"}},
            ["ensemble", "merged"],
            "The merged model is better than the base's own denoisers: its fd_effnetlite0 is",
        ),
    ],
)
def test_what_a_run_does_not_do_is_not_missing(
    make_run: MakeRun,
    tiny_config: Callable[..., Config],
    changes: dict[str, Any],
    models: list[str],
    sentence: str,
) -> None:
    folder = make_run(values={m: VALUES[m] for m in models})
    (folder / "config.yaml").write_text(dump_config(tiny_config(**changes)))
    found = read_run(folder)
    assert verdict([found]).sentence.startswith(sentence)
    gaps = " ".join(not_measured([found], []))
    assert "isn't finished" not in gaps
    assert ("Equal compute counts updates" in gaps) == (BASELINE in models)
    trained = next(work for stage, work, _ in _costs(found) if stage == "trainings")
    assert "experts ×" not in trained


def test_training_seeds_stand_side_by_side_and_are_the_units_of_the_interval(make_run: MakeRun, tmp_path: Path) -> None:
    merged = {0: [80.0] * 3, 1: [90.0] * 3, 2: [85.0] * 3}
    values = {"pretrained": [100.0] * 3}
    runs = [make_run(f"seed-{s}", s, values=values | {"merged": m}) for s, m in merged.items()]
    found = verdict([read_run(r) for r in runs])
    # Student's t of three: 0.85 ± 4.30 · 0.05 / √3.
    assert "0.850 times (95 % interval 0.800 to 0.900)" in found.sentence
    assert "Of 3 training seeds a bootstrap is narrow: Student's t gives 0.726 to 0.974" in found.note
    shown = Page(write_report(runs, tmp_path / "all.html").read_text(encoding="utf-8")).text
    row = re.search(r"merged\s+80\s+90\s+85\s+85\s+0\.850\s+0\.800 to 0\.900\s+80 to 90", shown)
    assert row
    assert "One training seed" not in shown


def test_numbers_of_an_older_model_or_reference_are_left_out(make_run: MakeRun) -> None:
    run = make_run()
    old = metrics({"pretrained": [50.0] * 4}, reference="images.npz:11")
    old += [r | {"model_sha256": "old"} for r in metrics({"merged": [10.0] * 4})]
    lines(run / "metrics.jsonl", old + metrics(VALUES))
    found = read_run(run)
    assert found.values("pretrained", FD) == {(10 * i, 10 * i + 9): v for i, v in enumerate(VALUES["pretrained"])}
    assert list(found.values("merged", FD).values()) == VALUES["merged"]


def test_runs_that_differ_in_more_than_their_seed_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    first, second = make_run("a", 0), make_run("b", 0)
    with pytest.raises(UserError, match="training seed 0 stands for several of the runs"):
        write_report([first, second])
    text = (second / "config.yaml").read_text()
    (second / "config.yaml").write_text(
        text.replace("num_updates: 6", "num_updates: 7").replace("seed: 0", "seed: 1", 1)
    )
    with pytest.raises(UserError, match="differ in finetune, expected runs that differ in their training seed only"):
        write_report([first, second])
    third = make_run("c", 2)
    lines(third / "metrics.jsonl", metrics(VALUES, reference="others.npz:11"))
    with pytest.raises(UserError, match=f"records of {FD} differ in reference"):
        write_report([first, third])


def test_everything_that_a_run_holds_is_on_the_page(make_run: MakeRun) -> None:
    found = read(make_run())
    for text in (
        "seeds 0 to 8",
        "timesteps [0, 20)",
        "screen: 3 candidates of 10 images, best 79.",
        "pretrained 100, best 79, sum lost.",
        "They are 0.07 at most.",
        'settings: {"stride": 4}',
        "Cosines of them.",
        "2 experts × 6 updates = 48 images; equally finetuned model 12 updates = 48 images",
        "2.0 h",
        'DiffusionPipeline.from_pretrained("run/merged")',
        "Method ties, density 0.7, weights:",
        "b" * 64,
        "num_updates: 6",
        f"{FD} also chose the merging weights",
        "One training seed",
    ):
        assert text in found.text, text
    images = [a for tag, a in found.tags if tag == "img"]
    assert len(images) == 2 + 4 + 2
    assert all(a["alt"] and str(a["src"]).startswith("data:image/") for a in images)
    drawings = [a for _, a in found.tags if a.get("role") == "img"]
    assert len(drawings) == 3
    assert all(a.get("aria-label") for a in drawings)


def test_losses_of_ranges_are_drawn_apart(make_run: MakeRun) -> None:
    labels = [a["aria-label"] for _, a in read(make_run()).tags if a.get("role") == "img"]
    assert labels[0] == (
        "Validation loss on timesteps [0, 20) over the updates: expert-0 from 0.11 to 0.1033, "
        "baseline-finetuned from 0.132 to 0.124."
    )
    assert str(labels[1]).startswith("Validation loss on timesteps [20, 40) over the updates: expert-1 from ")


def test_links_inside_lead_somewhere_and_nothing_leads_outside(make_run: MakeRun) -> None:
    path = write_report([make_run()])
    html = path.read_text(encoding="utf-8")
    tags = Page(html).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [str(a["href"]) for tag, a in tags if tag == "a"]
    assert len(links) > 8
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert not re.search(r"""(?:src|href|url\()=?["']?(?:https?:)?//""", html)


def test_the_same_run_gives_the_same_bytes(make_run: MakeRun) -> None:
    run = make_run()
    first = write_report([run]).read_bytes()
    assert write_report([run]).read_bytes() == first


def test_a_page_of_large_pictures_stays_below_its_limit(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(size=128)
    monkeypatch.setattr(page, "MAX_BYTES", 250_000)
    monkeypatch.setattr(page, "SCALES", (1.0, 0.35))
    assert write_report([run]).stat().st_size < 250_000
    monkeypatch.setattr(page, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match=r"expected less than 5 MB: report on fewer runs"):
        write_report([run])


def test_a_run_that_has_just_begun_has_a_page(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config()))
    text = read(tmp_path).text
    for words in ("There is no verdict yet", "No training has finished yet", "Nothing was searched yet"):
        assert words in text


def test_what_a_run_holds_is_text_and_no_markup(make_run: MakeRun) -> None:
    run = make_run()
    write(run / "analysis/task-vectors.json", {"title": "<script>alert(1)</script>", "finding": "a < b & c"})
    found = read(run)
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert "<script>alert(1)</script>" in found.text
    assert "a < b & c" in found.text


def test_no_other_file_is_replaced(make_run: MakeRun, tmp_path: Path) -> None:
    run, other = make_run(), tmp_path / "thesis.html"
    other.write_text("<html>my thesis</html>")
    with pytest.raises(UserError, match="holds a file that deme report didn't write"):
        write_report([run], other)
    with pytest.raises(UserError, match=r"has no config.yaml, expected a run folder"):
        write_report([tmp_path])


needs_browser = pytest.mark.skipif(find_browser() is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with Tab(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


# Where the cut between the two pictures is, in percent of their width.
CUT = "parseFloat(getComputedStyle(document.querySelector('.compare')).getPropertyValue('--cut'))"


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1000, False), (1000, True), (400, False), (400, True)])
def test_the_page_is_clean_and_fits(make_run: MakeRun, tab: Tab, width: int, dark: bool) -> None:
    path = write_report([make_run()])
    tab.errors.clear()
    tab.requests.clear()
    tab.show(width, dark=dark)
    tab.open(path.as_uri())
    assert tab.errors == []
    (asked,) = [r for r in tab.requests if not r.startswith("data:")]
    assert asked.startswith("file:")
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    assert tab.run("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    # Text stands out from the page in both modes: WCAG's contrast of 4.5.
    for selector in ("body", ".note", "a[href='#images']", "figcaption", "thead th"):
        assert tab.run(f"({CONTRAST})({json.dumps(selector)})") >= 4.5, selector


CONTRAST = """selector => {
  const lightness = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(v => v / 255).map(
      v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const text = lightness(getComputedStyle(document.querySelector(selector)).color);
  const page = lightness(getComputedStyle(document.body).backgroundColor);
  return Math.max(text / page, page / text);
}"""


@needs_browser
def test_the_slider_moves_by_key_and_by_mouse(make_run: MakeRun, tab: Tab) -> None:
    tab.show(1000)
    tab.open(write_report([make_run()]).as_uri())
    tab.run("document.querySelector('.compare input').focus()")
    assert tab.run(CUT) == 50
    for _ in range(5):
        tab.press("ArrowLeft", 37)
    assert tab.run(CUT) == 45
    assert tab.run("document.querySelector('.compare input').ariaValueText") == "45 % pretrained, the rest merged"
    box = tab.run(
        "(b => [b.left, b.top, b.width, b.height])(document.querySelector('.compare img').getBoundingClientRect())"
    )
    x, y = box[0], box[1] + box[3] / 2
    tab.drag((x + 0.5 * box[2], y), (x + 0.2 * box[2], y))
    assert tab.run(CUT) == pytest.approx(20, abs=1)
    assert tab.run("getComputedStyle(document.querySelectorAll('.compare img')[1]).clipPath").startswith("inset(")


@needs_browser
def test_links_inside_jump_to_their_section(make_run: MakeRun, tab: Tab) -> None:
    tab.show(1000)
    tab.open(write_report([make_run()]).as_uri())
    for name in tab.run("[...document.querySelectorAll('nav a')].map(a => a.hash)"):
        tab.run(f"document.querySelector('nav a[href=\"{name}\"]').click()")
        assert tab.run("location.hash") == name
        top = tab.run(f"document.querySelector('{name}').getBoundingClientRect().top")
        at_end = tab.run("scrollY + innerHeight >= document.documentElement.scrollHeight - 2")
        assert -2 <= top <= 40 or at_end


@needs_browser
def test_without_scripts_and_on_paper_the_pictures_stand_side_by_side(make_run: MakeRun, tab: Tab) -> None:
    url = write_report([make_run()]).as_uri()
    places = "[...document.querySelectorAll('.compare img')].map(i => i.getBoundingClientRect().left)"
    for media, script in (("screen", False), ("print", True)):
        tab.show(1000, media=media, script=script)
        tab.open(url)
        left, right = tab.run(places)
        assert right > left + 100
        assert tab.run("getComputedStyle(document.querySelectorAll('.compare img')[1]).clipPath") == "none"
    tab.show(1000)
