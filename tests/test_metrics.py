"""Feature statistics and distances against closed forms, numpy, scipy, torchmetrics and a double loop."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from decouple_merge.evaluation.alignment import describe
from decouple_merge.evaluation.distances import (
    FeatureStats,
    Moments,
    frechet_distance,
    frechet_infinity,
    frechet_of,
    gaussian_kernel_distance,
    inception_score,
    kernel_distance,
    matrix_root,
    r_precision,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_covariance(num_features: int, rank: int, seed: int = 0) -> Tensor:
    factor = draw(num_features, rank, seed=seed)
    return factor @ factor.T / rank


def stats_of(features: Tensor, batch_size: int) -> FeatureStats:
    stats = FeatureStats.empty(features.shape[1])
    for batch in features.split(batch_size):
        stats.add(batch)
    return stats


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0, 0.25]).double(), torch.tensor([4.0, 1.0, 16.0, 0.0]).double()
    mean_a, mean_b = torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([0.0, 2.0, 5.0, 4.0]).double()
    expected = 5 + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(mean_a, a.diag(), mean_b, b.diag()) == pytest.approx(float(expected), abs=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_frechet_distance_agrees_with_scipys_matrix_root(seed: int) -> None:
    a, b = random_covariance(12, 40, seed), random_covariance(12, 40, seed + 10)
    mean_a, mean_b = draw(12, seed=seed + 20), draw(12, seed=seed + 30)
    root = scipy.linalg.sqrtm(a.numpy() @ b.numpy()).real
    expected = float((mean_a - mean_b).square().sum() + a.trace() + b.trace()) - 2 * np.trace(root)
    assert frechet_distance(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("num", [2, 7, 29, 30, 31, 80])
def test_few_samples_are_as_far_as_their_covariance_says(num: int) -> None:
    """Around as many as there are features, 30, where the smaller matrix is left."""
    features, real = draw(num, 30), Moments(draw(30, seed=1), random_covariance(30, 60, 2))
    found = stats_of(features, 4)
    assert bool(found.few) == (num < 30)
    expected = frechet_distance(features.mean(0), features.T.cov(), real.mean, real.covariance)
    assert frechet_of(found, real) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("rank", [3, 12, 40])
def test_frechet_distance_of_a_distribution_from_itself_is_zero(rank: int) -> None:
    mean, covariance = draw(12), random_covariance(12, rank)
    # Roots of eigenvalues that rounding made about 1e-16 instead of 0 cost 1e-8 each.
    assert frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("rank", [3, 40])
def test_frechet_distance_is_symmetric(rank: int) -> None:
    a, b, mean_a, mean_b = random_covariance(12, rank), random_covariance(12, 40, 1), draw(12), draw(12, seed=1)
    there, back = frechet_distance(mean_a, a, mean_b, b), frechet_distance(mean_b, b, mean_a, a)
    assert there == pytest.approx(back, abs=1e-6)


def test_frechet_distance_of_rank_deficient_covariances_is_finite_and_right() -> None:
    # Two planes that share one axis of the basis: tr of the root is that of the shared axis alone.
    basis = torch.linalg.qr(draw(6, 6))[0]
    a = basis[:, :2] @ torch.tensor([4.0, 9.0]).double().diag() @ basis[:, :2].T
    b = basis[:, 1:3] @ torch.tensor([1.0, 16.0]).double().diag() @ basis[:, 1:3].T
    zero = torch.zeros(6).double()
    assert frechet_distance(zero, a, zero, b) == pytest.approx(4 + 9 + 1 + 16 - 2 * 3, abs=1e-6)


def test_a_shift_of_the_mean_adds_its_squared_length() -> None:
    a, b, mean_a, mean_b = random_covariance(8, 30), random_covariance(8, 30, 1), draw(8), draw(8, seed=1)
    shift = draw(8, seed=2)
    centred, shifted = frechet_distance(mean_a, a, mean_a, b), frechet_distance(mean_a + shift, a, mean_a, b)
    assert shifted - centred == pytest.approx(float(shift.square().sum()), rel=1e-10)
    assert frechet_distance(mean_a + shift, a, mean_b + shift, b) == pytest.approx(
        frechet_distance(mean_a, a, mean_b, b), rel=1e-10
    )


def test_a_stored_root_gives_the_same_distance() -> None:
    a, b, mean = random_covariance(8, 30), random_covariance(8, 5, 1), draw(8)
    assert frechet_distance(mean, a, mean, b, matrix_root(b)) == frechet_distance(mean, a, mean, b)


@pytest.mark.parametrize("rank", [2, 20])
def test_matrix_root_squares_to_the_matrix(rank: int) -> None:
    covariance = random_covariance(8, rank)
    root = matrix_root(covariance)
    torch.testing.assert_close(root @ root, covariance, rtol=0, atol=1e-12)
    torch.testing.assert_close(root, root.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_streamed_statistics_are_numpys(batch_size: int) -> None:
    features = draw(100, 5).float()
    stats = stats_of(features, batch_size)
    assert stats.num == 100
    np.testing.assert_allclose(stats.mean, features.double().numpy().mean(0), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(stats.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-10)


def test_statistics_are_accumulated_in_float64() -> None:
    # Features around 1000: outer products of 1e6, whose float32 sums are off by 0.1 an entry or more.
    features = (draw(4000, 4) + 1000).float()
    stats = stats_of(features, 250)
    assert stats.mean.dtype == stats.covariance.dtype == torch.float64
    np.testing.assert_allclose(stats.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=0, atol=1e-7)


def test_statistics_do_not_depend_on_the_split_into_batches() -> None:
    features = draw(96, 5).float()
    a, b = stats_of(features, 96), stats_of(features, 5)
    torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-14)


def naive_kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    n, m = len(a), len(b)
    inner_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    inner_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return inner_a + inner_b - 2 * sum(kernel(x, y) for x in a for y in b) / (n * m)


def test_kernel_distance_is_the_unbiased_estimate_of_a_double_loop() -> None:
    a, b = draw(13, 6), draw(9, 6, seed=1) * 1.5 + 0.3
    expected = naive_kernel_distance(a.numpy(), b.numpy())
    assert kernel_distance(a.float(), b.float()) == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_is_that_of_torchmetrics() -> None:
    a, b = draw(50, 16), draw(50, 16, seed=1) + 0.5
    assert kernel_distance(a.float(), b.float()) == pytest.approx(float(poly_mmd(a, b)), rel=1e-4)


def test_kernel_distance_does_not_depend_on_its_blocks() -> None:
    # 1,500 rows are two blocks, of which the second is not full.
    a, b = draw(1500, 4), draw(1100, 4, seed=1) + 0.2
    reversed_ = kernel_distance(a.flip(0).float(), b.flip(0).float())
    assert kernel_distance(a.float(), b.float()) == pytest.approx(reversed_, rel=1e-6)
    gram = {(x, y): ((p @ q.T / 4 + 1) ** 3) for x, p in (("a", a), ("b", b)) for y, q in (("a", a), ("b", b))}
    expected = (gram["a", "a"].sum() - gram["a", "a"].trace()) / (1500 * 1499)
    expected = expected + (gram["b", "b"].sum() - gram["b", "b"].trace()) / (1100 * 1099) - 2 * gram["a", "b"].mean()
    assert kernel_distance(a.float(), b.float()) == pytest.approx(float(expected), rel=1e-4)


def test_kernel_distance_of_equal_distributions_is_zero_on_average() -> None:
    values = torch.tensor(
        [kernel_distance(draw(40, 4, seed=2 * i).float(), draw(40, 4, seed=2 * i + 1).float()) for i in range(200)]
    ).double()
    # A biased estimate, with the diagonal, would be off by about (E k(x, x) - E k(x, y))/n·2, twenty times this bound.
    assert abs(values.mean()) < 4 * values.std() / 200**0.5
    assert (values < 0).any()


@pytest.mark.parametrize(("n", "m"), [(1, 5), (5, 0)])
def test_kernel_distance_refuses_fewer_than_two_samples(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"{n} and {m} samples, expected at least 2 each"):
        kernel_distance(draw(n, 3), draw(m, 3))


def reference_of(num_features: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(num_features).double(), torch.eye(num_features).double()


def test_extrapolated_distance_is_nearer_the_true_one() -> None:
    """Features of the reference's own distribution: the true distance is 0, the bias of 400 of them is 20²/400."""
    mean, covariance = reference_of(20)
    plain, extrapolated = [], []
    for seed in range(10):
        features = draw(400, 20, seed=seed)
        stats = stats_of(features, 100)
        plain.append(frechet_distance(stats.mean, stats.covariance, mean, covariance))
        extrapolated.append(frechet_infinity(features, Moments(mean, covariance), seed=seed))
    assert np.mean(plain) > 0.2
    assert abs(np.mean(extrapolated)) < 0.25 * np.mean(plain)


def test_extrapolation_is_the_intercept_of_the_line_through_its_subsets() -> None:
    features, (mean, covariance) = draw(300, 4).float(), reference_of(4)
    generator = torch.Generator().manual_seed(7)
    inverse, distances = [], []
    for size in (150, 225, 300):
        subset = features[torch.randperm(300, generator=generator)[:size]].double().numpy()
        moments = torch.from_numpy(subset.mean(0)), torch.from_numpy(np.cov(subset, rowvar=False))
        inverse.append(1 / size)
        distances.append(frechet_distance(*moments, mean, covariance))
    expected = np.polyfit(inverse, distances, 1)[1]
    found = frechet_infinity(features, Moments(mean, covariance), num_points=3, seed=7)
    assert found == pytest.approx(expected, rel=1e-9)
    known = Moments(mean, covariance, lambda: matrix_root(covariance))
    assert frechet_infinity(features, known, 3, 7) == pytest.approx(found, rel=1e-9)


def test_extrapolation_refuses_few_images() -> None:
    with pytest.raises(ValueError, match="has 19 images and 15 points, expected at least 20 and 2"):
        frechet_infinity(draw(19, 3), Moments(*reference_of(3)))


def test_gaussian_kernel_distance_is_that_of_a_double_loop() -> None:
    a, b = draw(11, 6).float(), draw(8, 6, seed=1).float() + 0.5
    x, y = (v.double().numpy() / np.linalg.norm(v.double().numpy(), axis=1, keepdims=True) for v in (a, b))

    def mean_kernel(p: np.ndarray, q: np.ndarray) -> float:
        return float(np.mean([[np.exp(-np.sum((i - j) ** 2) / (2 * 0.7**2)) for j in q] for i in p]))

    expected = mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
    assert gaussian_kernel_distance(a, b, 0.7) == pytest.approx(expected, rel=1e-12)


def test_gaussian_kernel_distance_depends_on_directions_only_and_is_zero_for_equal_samples() -> None:
    a, b = draw(1100, 5).float(), draw(1030, 5, seed=1).float() + 0.3
    distance = gaussian_kernel_distance(a, b)
    assert distance > 1e-4
    assert gaussian_kernel_distance(a * 3, b * 0.1) == pytest.approx(distance, rel=1e-5)
    assert gaussian_kernel_distance(b, a) == pytest.approx(distance, rel=1e-10)
    # In float32 the difference of three means of about 1 would be off by 1e-7.
    assert abs(gaussian_kernel_distance(a, a.flip(0))) < 1e-13


def naive_inception_score(logits: np.ndarray, num_splits: int) -> tuple[float, float]:
    scores = []
    n = len(logits)
    for i in range(num_splits):
        part = logits[i * n // num_splits : (i + 1) * n // num_splits].astype(np.float64)
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        marginal = p.mean(0)
        scores.append(np.exp(np.mean([scipy.stats.entropy(row, marginal) for row in p])))
    return float(np.mean(scores)), float(np.std(scores))


@pytest.mark.parametrize("num_splits", [1, 4, 10])
def test_inception_score_is_its_definition(num_splits: int) -> None:
    logits = (draw(103, 12) * 2).float()
    assert inception_score(logits, num_splits) == pytest.approx(
        naive_inception_score(logits.numpy(), num_splits), rel=1e-10
    )


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save all extracted features")
@pytest.mark.filterwarnings("ignore:std\\(\\). degrees of freedom")
def test_inception_score_is_that_of_torchmetrics() -> None:
    logits = (draw(120, 9) * 2).float()
    # One split, since torchmetrics shuffles.
    metric = InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.update(logits)
    assert inception_score(logits, 1)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-5)


def test_inception_score_of_sure_and_varied_images_is_the_number_of_classes() -> None:
    assert inception_score(1000 * torch.eye(7), 1)[0] == pytest.approx(7)
    assert inception_score(1000 * torch.eye(7)[[2] * 5], 1)[0] == pytest.approx(1)
    assert inception_score(torch.zeros(5, 7), 1)[0] == pytest.approx(1)


def test_inception_score_refuses_more_splits_than_images() -> None:
    with pytest.raises(ValueError, match="found 9 images in 10 splits"):
        inception_score(draw(9, 4))


class Flat(torch.nn.Module):
    """Images to features for torchmetrics: the pixels."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).double()


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    a, b = draw(90, 3, 2, 2), draw(70, 3, 2, 2, seed=1) * 1.3 + 0.2
    metric = FrechetInceptionDistance(feature=Flat()).set_dtype(torch.float64)
    metric.update(b, real=True)
    metric.update(a, real=False)
    found, reference = stats_of(a.flatten(1), 32), stats_of(b.flatten(1), 32)
    distance = frechet_distance(found.mean, found.covariance, reference.mean, reference.covariance)
    assert distance == pytest.approx(float(metric.compute()), rel=1e-6)


def test_r_precision_is_the_mean_over_draws_of_the_other_texts() -> None:
    draws = torch.Generator().manual_seed(0)
    texts = torch.randn(30, 4, generator=draws)
    images = texts + torch.randn(30, 4, generator=draws)
    similarity = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    hits = []
    for _ in range(500):
        for i in range(30):
            others = [j for j in torch.randperm(30, generator=draws).tolist() if j != i][:9]
            hits.append(bool((similarity[i, i] > similarity[i, others]).all()))
    assert 20 < r_precision(images, texts, 10) < 80
    assert r_precision(images, texts, 10) == pytest.approx(100 * sum(hits) / len(hits), abs=1.2)


def test_r_precision_of_many_images_is_that_of_their_parts() -> None:
    draws = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(1500, 4, generator=draws) for _ in range(2))
    whole = F.normalize(images.double(), dim=1) @ F.normalize(texts.double(), dim=1).T
    nearer = (whole > whole.diagonal()[:, None]).sum(1)
    # With as many candidates as texts, an image counts where none is nearer.
    assert r_precision(images, texts, 1500) == pytest.approx(100 * float((nearer == 0).double().mean()), rel=1e-12)


def test_r_precision_at_its_ends() -> None:
    texts = torch.eye(200)
    assert r_precision(texts, texts) == 100
    assert r_precision(-texts, texts) == 0
    # Of few texts all are candidates, and the own text is no other one where it comes twice.
    assert r_precision(torch.eye(3)[[0, 1, 1]], torch.eye(3)[[0, 1, 2]]) == pytest.approx(200 / 3)
    assert r_precision(torch.eye(2)[[0, 0, 1]], torch.eye(2)[[0, 0, 1]]) == 100
    # An image that is as near to every text finds none.
    assert r_precision(torch.ones(200, 200), texts) == 0
    with pytest.raises(ValueError, match=r"has 1 different text\(s\), expected at least 2"):
        r_precision(texts, torch.ones(200, 200))


def test_a_grey_image_is_described_as_in_colour() -> None:
    grey = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = describe(grey, lambda x: {"features": x.float().flatten(1)})
    assert torch.equal(found, describe(grey.expand(-1, 3, -1, -1), lambda x: {"features": x.float().flatten(1)}))
    assert found.shape == (3, 3 * 64 + 3 * 16)
