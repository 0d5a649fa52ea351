"""Scoring on a small network of our own: which features each metric takes, what it compares with, what it keeps."""

import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from decouple_merge.config import Stats
from decouple_merge.data.images import ArrayImages
from decouple_merge.evaluation import metrics
from decouple_merge.evaluation.distances import (
    FeatureStats,
    Moments,
    frechet_distance,
    frechet_infinity,
    gaussian_kernel_distance,
    inception_score,
    kernel_distance,
)
from decouple_merge.evaluation.extractors import EXTRACTORS, Extractor
from decouple_merge.evaluation.metrics import METRICS, check_is_distance, check_metrics
from decouple_merge.evaluation.neighbours import density_coverage, precision_recall
from decouple_merge.evaluation.records import make_record
from decouple_merge.evaluation.references import (
    holds_images,
    make_reference,
    names_of,
    read_statistics,
    write_statistics,
)
from decouple_merge.evaluation.score import score
from decouple_merge.evaluation.sliced import monge_distance

ALL = [m for m in METRICS if METRICS[m].extractor == "inception"]


def features_of(images: Tensor) -> dict[str, Tensor]:
    x = images.float().flatten(1) / 50
    return {"features": x[:, :5].sin() + x[:, 5:10], "spatial": x[:, :7].cos(), "logits": x[:, 3:9] * 2}


def extractor(extract: Callable[[Tensor], dict[str, Tensor]] = features_of) -> Extractor:
    return Extractor("inception", "0" * 64, {"features": 5, "spatial": 7}, extract)


def draw_images(num: int, seed: int, high: int = 256) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, high, (num, 1, 4, 4), dtype=np.uint8))


REAL, GENERATED = draw_images(300, 0), draw_images(200, 1, 230)


def scored(metrics: list[str], batch_size: int = 64, images: Tensor = GENERATED) -> dict[str, float]:
    reference = make_reference("real", ArrayImages(REAL.numpy()), extractor())
    return score(iter(images.split(batch_size)), metrics, [(extractor(), reference)])


def test_every_metric_takes_its_own_features_of_both_sides() -> None:
    a, b = features_of(GENERATED), features_of(REAL)

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.double().mean(0), x.double().T.cov()

    real, generated = b["features"], a["features"]
    expected = {
        "fid": frechet_distance(*moments(generated), *moments(real)),
        "sfid": frechet_distance(*moments(a["spatial"]), *moments(b["spatial"])),
        "kid": kernel_distance(generated, real),
        "mind": monge_distance(generated, real),
        "fid_infinity": frechet_infinity(generated, Moments(*moments(real))),
        "inception_score": inception_score(a["logits"])[0],
        "precision_inception": precision_recall(real, generated)[0],
        "recall_inception": precision_recall(real, generated)[1],
        "density_inception": density_coverage(real, generated)[0],
        "coverage_inception": density_coverage(real, generated)[1],
    }
    assert sorted(expected) == sorted(ALL)
    assert len(set(expected.values())) == len(expected)
    assert scored(ALL) == pytest.approx(expected, rel=1e-9)


def test_cmmd_is_a_thousand_times_the_distance_of_its_kernel() -> None:
    clip = Extractor("clip", "0" * 64, {"features": 5}, features_of)
    reference = make_reference("real", ArrayImages(REAL.numpy()), clip)
    a, b = features_of(GENERATED)["features"], features_of(REAL)["features"]
    found = score(iter([GENERATED]), ["cmmd"], [(clip, reference)])["cmmd"]
    assert found == pytest.approx(1000 * gaussian_kernel_distance(a, b), rel=1e-9)


@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_batches_change_nothing(batch_size: int) -> None:
    assert scored(ALL, batch_size) == pytest.approx(scored(ALL), rel=1e-9)


def test_order_changes_nothing_but_what_is_split_or_drawn() -> None:
    metrics = [m for m in ALL if m not in ("inception_score", "fid_infinity")]
    shuffled = GENERATED[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert scored(metrics, images=shuffled) == pytest.approx(scored(metrics), rel=1e-9)


def test_one_pass_feeds_all_metrics_of_an_extractor() -> None:
    sizes: list[int] = []

    def counting(images: Tensor) -> dict[str, Tensor]:
        sizes.append(len(images))
        return features_of(images)

    reference = make_reference("real", ArrayImages(REAL.numpy()), extractor())
    score(iter(GENERATED.split(80)), ALL, [(extractor(counting), reference)])
    assert sizes == [80, 80, 40]


def test_frechet_distances_keep_no_features() -> None:
    alive: list[weakref.ref] = []
    most = 0

    def watched(images: Tensor) -> dict[str, Tensor]:
        nonlocal most
        most = max(most, sum(r() is not None for r in alive))
        found = features_of(images)
        alive.extend(weakref.ref(v) for v in found.values())
        return found

    reference = make_reference("real", ArrayImages(REAL.numpy()), extractor())
    score(iter(GENERATED.split(5)), ["fid", "sfid"], [(extractor(watched), reference)])
    assert len(alive) == 120
    # Those of two batches before may still be there, the one that is summed and one that waits, and no others.
    assert most <= 6


def test_a_batch_is_summed_while_the_next_is_drawn_and_one_waits_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scored(["fid", "kid"], 20)
    asked, num_summed, most = [threading.Event() for _ in range(11)], 0, 0
    add = FeatureStats.add

    def batches() -> Iterator[Tensor]:
        nonlocal most
        for number, batch in enumerate(GENERATED.split(20)):
            most = max(most, number - num_summed)
            asked[number].set()
            yield batch
        asked[10].set()

    def waiting(self: FeatureStats, features: Tensor) -> None:
        nonlocal num_summed
        # Without a thread the next batch is never asked for, and this waits in vain.
        assert asked[num_summed + 1].wait(20)
        add(self, features)
        num_summed += 1

    reference = make_reference("real", ArrayImages(REAL.numpy()), extractor())
    monkeypatch.setattr(FeatureStats, "add", waiting)
    assert score(batches(), ["fid", "kid"], [(extractor(), reference)]) == expected
    assert num_summed == 10
    assert most == 1


@pytest.mark.parametrize("place", ["drawing", "summing"])
def test_what_goes_wrong_in_either_thread_is_raised(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, num_threads = 0, threading.active_count()

    def batches() -> Iterator[Tensor]:
        nonlocal drawn
        for batch in GENERATED.split(20):
            drawn += 1
            if place == "drawing" and drawn == 3:
                raise RuntimeError("it broke")
            yield batch

    def breaking(self: FeatureStats, features: Tensor) -> None:
        raise RuntimeError("it broke")

    reference = make_reference("real", ArrayImages(REAL.numpy()), extractor())
    if place == "summing":
        monkeypatch.setattr(FeatureStats, "add", breaking)
    with pytest.raises(RuntimeError, match="it broke"):
        score(batches(), ["fid"], [(extractor(), reference)])
    assert drawn <= 3
    assert threading.active_count() == num_threads


def test_images_that_were_not_quantised_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found torch.float32 images, expected uint8 \[N, C, H, W\], 0 to 255"):
        scored(["fid"], images=GENERATED.float() / 255)


def test_the_inception_score_needs_no_reference_and_its_record_names_none() -> None:
    found = score(iter([GENERATED]), ["inception_score"], [(extractor(), None)])
    assert found == scored(["inception_score"])
    reference = make_reference("real", ArrayImages(REAL.numpy()), extractor())
    record = make_record("m", "inception_score", 1.0, 200, None, names_of("inception_score", (extractor(), reference)))
    assert record["reference"] is None
    with pytest.raises(ValueError, match="fid needs a reference to compare with: give --reference"):
        score(iter([GENERATED]), ["fid"], [(extractor(), None)])


def adm_file(path: Path, *names: str) -> Path:
    """An npz as ADM publishes: images and the moments of more images than these."""
    x = features_of(REAL)
    arrays = {
        "arr_0": REAL[:120, 0].numpy()[..., None],
        "mu": x["features"].double().mean(0).numpy(),
        "sigma": x["features"].double().T.cov().numpy(),
        "mu_s": x["spatial"].double().mean(0).numpy(),
        "sigma_s": x["spatial"].double().T.cov().numpy(),
    }
    np.savez(path, **{n: arrays[n] for n in (names or arrays)})
    return path


def test_statistics_of_adm_serve_every_metric(tmp_path: Path) -> None:
    reference = read_statistics(adm_file(tmp_path / "adm.npz"), extractor(), ArrayImages(REAL[:120].numpy()))
    found = score(iter([GENERATED]), ALL, [(extractor(), reference)])
    assert {m: found[m] for m in ("fid", "sfid")} == pytest.approx(scored(["fid", "sfid"]), rel=1e-6)
    real, generated = (features_of(x)["features"] for x in (REAL[:120], GENERATED))
    assert found["recall_inception"] == precision_recall(real, generated)[1]
    assert found["kid"] == pytest.approx(kernel_distance(generated, real), rel=1e-9)


def test_statistics_of_pytorch_fid_serve_the_fid_only(tmp_path: Path) -> None:
    path = adm_file(tmp_path / "fid.npz", "mu", "sigma")
    assert not holds_images(path)
    reference = read_statistics(path, extractor())
    assert score(iter([GENERATED]), ["fid"], [(extractor(), reference)]) == pytest.approx(scored(["fid"]), rel=1e-6)
    with pytest.raises(ValueError, match=r"sfid needs the reference's spatial statistics \(mu_s, sigma_s\); fid.npz:"):
        score(iter([GENERATED]), ["sfid"], [(extractor(), reference)])
    with pytest.raises(ValueError, match=r"recall_inception needs the reference's images; fid.npz:"):
        score(iter([GENERATED]), ["recall_inception"], [(extractor(), reference)])


def test_written_statistics_are_read_back(tmp_path: Path) -> None:
    reference = make_reference("real", ArrayImages(REAL.numpy()), extractor())
    write_statistics(reference, tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as file:
        assert sorted(file.files) == ["mu", "mu_s", "sigma", "sigma_s"]
    again = read_statistics(tmp_path / "ours.npz", extractor())
    for output, moments in reference.moments.items():
        assert torch.equal(again.moments[output].covariance, moments.covariance)
        torch.testing.assert_close(again.moments[output].root, moments.root)


def test_statistics_that_are_not_finite_or_of_another_size_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "nan.npz", mu=np.full(5, np.nan), sigma=np.eye(5))
    with pytest.raises(ValueError, match=r"nan.npz: mean or covariance has NaN or infinity"):
        read_statistics(tmp_path / "nan.npz", extractor())
    np.savez(tmp_path / "other.npz", mu=np.zeros(9), sigma=np.eye(9))
    with pytest.raises(ValueError, match=r"other.npz: found \(9,\) features, expected 5: made by another extractor"):
        read_statistics(tmp_path / "other.npz", extractor())


def test_neighbours_are_computed_once_for_both_of_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(real: Tensor, generated: Tensor) -> tuple[float, float]:
        calls.append(len(real))
        return 0.25, 0.75

    monkeypatch.setattr(metrics, "precision_recall", counting)
    assert scored(["recall_inception", "precision_inception"]) == {
        "precision_inception": 0.25,
        "recall_inception": 0.75,
    }
    assert calls == [300]


def test_metrics_without_their_weights_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'fd_dinov2' needs a dinov2 model: .* --set dinov2=…, to .*, such as facebook/dinov2-large"
    ):
        check_metrics(["fd_dinov2"], Stats(clip="somewhere"))
    with pytest.raises(ValueError, match="'cmmd' needs a clip model"):
        check_metrics(["cmmd"], Stats())
    check_metrics(["cmmd", "kd_dinov2"], Stats(clip="a", dinov2="b"))
    assert {m.extractor for m in METRICS.values()} == EXTRACTORS.keys()


@pytest.mark.parametrize("metric", [m for m in METRICS if METRICS[m].extractor in ("inception", "clip")])
def test_the_least_number_of_images_is_what_the_formula_takes(metric: str) -> None:
    """One image fewer is refused by name, and with so many on either side there is a finite number."""
    record = METRICS[metric]
    network = Extractor(record.extractor, "0" * 64, {"features": 5, "spatial": 7}, features_of)
    reference = make_reference("real", ArrayImages(REAL[: record.min_reference_images].numpy()), network)
    found = score(iter([GENERATED[: record.min_images]]), [metric], [(network, reference)])
    assert np.isfinite(found[metric])
    few = GENERATED[: record.min_images - 1]
    message = rf"found {len(few)} image\(s\) to score, expected at least {record.min_images} for {metric}"
    with pytest.raises(ValueError, match=message):
        score(iter([few]), [metric], [(network, reference)])


def test_a_reference_of_too_few_images_is_refused() -> None:
    reference = make_reference("real", ArrayImages(REAL[:5].numpy()), extractor())
    score(iter([GENERATED]), ["precision_inception"], [(extractor(), reference)])
    with pytest.raises(ValueError, match=r"real:.*: found 5 image\(s\), expected at least 6 for density_inception"):
        score(iter([GENERATED]), ["density_inception"], [(extractor(), reference)])


def test_only_distances_fall_when_images_get_better() -> None:
    assert {m for m in METRICS if METRICS[m].is_distance} == {
        m for m in METRICS if m.startswith(("fd_", "kd_", "mind", "fid", "kid", "sfid", "cmmd"))
    }
    check_is_distance("kid", "search.metric")
    with pytest.raises(ValueError, match=r"search.metric is 'recall_clip', expected a distance, which is smaller for"):
        check_is_distance("recall_clip", "search.metric")
