"""Quality metrics against scipy, formulas in loops and brute-force jackknives; what the encoder can tell apart."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from unrote.auditing.frechet import Moments, frechet_distance, frechet_with_influence
from unrote.auditing.intervals import bootstrap_mean, estimate, jackknife_spread, mean_spread, squared_estimate
from unrote.auditing.kernel import KernelDistance
from unrote.auditing.manifold import manifold_metrics, nearest_others
from unrote.auditing.quality import METRICS, measure_quality, mifid, subsample
from unrote.data import open_images
from unrote.encoders.random_conv import RandomConvEncoder

WEIGHTS_SHA256 = "80aba535e015"


def scipy_frechet(first: np.ndarray, second: np.ndarray) -> float:
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    difference = first.mean(0) - second.mean(0)
    return float(difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * np.real(root)))


@pytest.mark.parametrize("count", [300, 40])
def test_frechet_equals_scipy(count):
    random = np.random.default_rng(0)
    mixing = random.normal(size=(16, 16))
    first, second = random.normal(size=(count, 16)) @ mixing, random.normal(0.3, 1.4, size=(500, 16))
    assert frechet_distance(first, second) == pytest.approx(scipy_frechet(first, second), rel=1e-8)


def test_frechet_of_fewer_images_than_features_is_finite_and_of_itself_zero():
    features = np.random.default_rng(0).normal(size=(10, 64))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    shifted = frechet_distance(features, features + 1.0)
    assert shifted == pytest.approx(64, rel=1e-6)


def test_influence_is_what_the_distance_loses_without_an_image():
    random = np.random.default_rng(2)
    generated, reference = random.normal(0.2, 1.3, size=(400, 6)), random.normal(size=(500, 6))
    value, influence = frechet_with_influence(generated, Moments.of(reference))
    assert value == pytest.approx(frechet_distance(generated, reference), rel=1e-10)
    left_out = np.array([frechet_distance(np.delete(generated, i, 0), reference) for i in range(len(generated))])
    np.testing.assert_allclose(influence, 399 * (left_out.mean() - left_out), atol=0.2 * influence.std())
    assert mean_spread(influence) == pytest.approx(jackknife_spread(left_out), rel=0.04)


def test_frechet_does_not_depend_on_where_blocks_end(monkeypatch):
    random = np.random.default_rng(3)
    generated, reference = random.normal(size=(300, 8)), random.normal(size=(200, 8))
    value, influence = frechet_with_influence(generated, Moments.of(reference))
    monkeypatch.setattr("unrote.auditing.rows.BLOCK", 7)
    found = frechet_with_influence(generated, Moments.of(reference))
    assert found[0] == pytest.approx(value, rel=1e-10)
    np.testing.assert_allclose(found[1], influence, atol=1e-9)


def loop_kernel_distance(generated, reference):
    def kernel(x, y):
        return (x @ y / len(x) + 1) ** 3

    n, m = len(generated), len(reference)
    within = sum(kernel(generated[i], generated[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    other = sum(kernel(reference[i], reference[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within + other - 2 * np.mean([[kernel(x, y) for y in reference] for x in generated])


def test_kid_equals_a_double_loop_and_its_error_a_jackknife_by_recomputing():
    random = np.random.default_rng(4)
    generated, reference = random.normal(0.5, 1, size=(25, 5)), random.normal(size=(30, 5))
    found = KernelDistance(reference).to(generated)
    value = loop_kernel_distance(generated, reference)
    assert found["value"] == pytest.approx(value, rel=1e-10)
    removed = [loop_kernel_distance(np.delete(generated, i, 0), reference) for i in range(len(generated))]
    everything = np.vstack([generated, reference])
    signs = np.repeat([1 / 25, -1 / 30], [25, 30])
    biased = signs @ (everything @ everything.T / 5 + 1) ** 3 @ signs
    expected = squared_estimate(value, jackknife_spread(np.array(removed)), biased - value)
    assert found["interval"] == pytest.approx(expected["interval"], rel=1e-8)
    assert found["interval"][0] < value < found["interval"][1]


def test_manifold_metrics_equal_their_formulas():
    random = np.random.default_rng(1)
    generated, reference = random.normal(size=(30, 3)), random.normal(0.5, 1, size=(40, 3))

    def radius(points, index, k):
        return sorted(np.linalg.norm(points[index] - other) for other in points)[k]

    def inside(point, points, k):
        return [np.linalg.norm(point - points[i]) <= radius(points, i, k) for i in range(len(points))]

    found = {metric: row["value"] for metric, row in manifold_metrics(generated, reference).items()}
    assert found["precision"] == np.mean([any(inside(x, reference, 3)) for x in generated])
    assert found["recall"] == np.mean([any(inside(y, generated, 3)) for y in reference])
    assert found["density"] == pytest.approx(np.mean([sum(inside(x, reference, 5)) for x in generated]) / 5)
    balls = np.array([inside(x, reference, 5) for x in generated])
    assert found["coverage"] == balls.any(0).mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_intervals_of_recall_and_coverage_are_jackknives_by_recomputing(seed):
    random = np.random.default_rng(seed)
    generated, reference = random.normal(size=(40, 2)), random.normal(0.5, 1.5, size=(60, 2))
    generated[7] = generated[8] = generated[9]
    found = manifold_metrics(generated, reference)
    left_out = [manifold_metrics(np.delete(generated, i, 0), reference) for i in range(len(generated))]
    for metric in ("recall", "coverage", "density"):
        values = np.array([one[metric]["value"] for one in left_out])
        expected = estimate(found[metric]["value"], jackknife_spread(values), 0.0, 2.0 if metric == "density" else 1.0)
        assert found[metric]["interval"] == pytest.approx(expected["interval"])


def test_copies_lie_in_the_balls_they_make():
    random = np.random.default_rng(5)
    reference = random.normal(1000, 1, size=(600, 32)).astype(np.float32)
    found = {metric: row["value"] for metric, row in manifold_metrics(reference.copy(), reference).items()}
    # In each ball of 5 neighbours are its centre and, the last of them on the edge, these 5.
    assert found == {"precision": 1.0, "recall": 1.0, "density": 1.2, "coverage": 1.0}
    copies = np.repeat(reference[:1], 9, 0)
    assert nearest_others(copies.astype(np.float64), 3)[0].max() == 0


def test_mifid_equals_its_definition_and_its_error_a_jackknife_by_recomputing():
    random = np.random.default_rng(6)
    generated, train, reference = (random.normal(size=(count, 4)) for count in (200, 50, 100))
    generated *= 1.5
    cosines = [[abs(x @ y) / np.linalg.norm(x) / np.linalg.norm(y) for y in train] for x in generated]
    near = np.array(cosines).max(1)

    def by_definition(rows):
        memorization = np.mean(1 - near[rows])
        assert memorization < 0.1
        return scipy_frechet(generated[rows], reference) / memorization

    distance, influence = frechet_with_influence(generated, Moments.of(reference))
    found = mifid(distance, influence, near)
    assert found["value"] == pytest.approx(by_definition(np.arange(200)))
    left_out = np.array([by_definition(np.delete(np.arange(200), i)) for i in range(200)])
    expected = squared_estimate(found["value"], jackknife_spread(left_out))
    assert found["interval"] == pytest.approx(expected["interval"], rel=0.03)
    assert mifid(7.0, influence, near - 0.5)["value"] == 7.0
    assert mifid(7.0, influence, np.ones(200)) is None


def test_bootstrap_of_a_mean_is_seeded_and_near_the_normal_interval():
    values = np.random.default_rng(7).exponential(size=2000)
    row = bootstrap_mean(values, 1000, 3)
    assert row == bootstrap_mean(values, 1000, 3) and row != bootstrap_mean(values, 1000, 4)
    expected = estimate(values.mean(), values.std() / 2000**0.5)
    assert row["value"] == expected["value"]
    np.testing.assert_allclose(row["interval"], expected["interval"], atol=0.01)


def test_too_few_images_have_no_manifold():
    assert manifold_metrics(np.zeros((5, 4)), np.zeros((50, 4))) is None


def test_encoder_is_the_same_everywhere_and_for_any_batch():
    encoder = RandomConvEncoder()
    assert encoder.weights_sha256.startswith(WEIGHTS_SHA256)
    images = np.random.default_rng(0).integers(0, 256, (1100, 16, 16, 3), dtype=np.uint8)
    together, alone = encoder(images), np.concatenate([encoder(images[i : i + 1]) for i in range(0, 1100, 100)])
    np.testing.assert_allclose(together[::100], alone, atol=1e-4)
    assert encoder(images[:3, :, :, :1]).shape == (3, 64) and encoder(images[:2, :1, :2]).shape == (2, 64)


def test_encoder_orders_real_blur_noise_collapsed_on_real_images():
    """What the feature space was chosen for, on the embedded images at 500 samples."""
    store = open_images("emoji", resolution=None)
    real = np.asarray(store.images[subsample(len(store), 1000, 0, "test")])
    order = np.random.default_rng(0).permutation(len(real))
    reference, other = real[order[:500]], real[order[500:1000]]
    noise = np.random.default_rng(1).normal(0, 0.15 * 255, other.shape)
    variants = {
        "real": other,
        "blurred": blurred(other),
        "noise": (other + noise).clip(0, 255).astype(np.uint8),
        "collapsed": other[np.arange(len(other)) % 10],
    }
    encoder = RandomConvEncoder()
    target = encoder(reference)
    distances = {name: frechet_distance(encoder(images), target) for name, images in variants.items()}
    assert distances["real"] * 2 < min(distances["blurred"], distances["noise"])
    assert max(distances["blurred"], distances["noise"]) * 1.2 < distances["collapsed"]


def blurred(images: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    for _ in range(3):
        pixels = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    return pixels.round().permute(0, 2, 3, 1).to(torch.uint8).numpy()


def test_floor_and_reference():
    random = np.random.default_rng(0)
    first, second, third = (random.normal(size=(40, 8)).astype(np.float32) for _ in range(3))
    near = np.full(40, 0.5)
    with_holdout = measure_quality(first, second, third[:30], near, seed=0)
    assert with_holdout["reference"] == "holdout" and with_holdout["num_reference"] == 30
    assert list(with_holdout["generated"]) == list(with_holdout["floor"]) == list(METRICS)
    assert with_holdout["floor"]["frechet_distance"]["value"] == pytest.approx(frechet_distance(second, third[:30]))
    assert with_holdout["floor"]["mifid"] is None and with_holdout["generated"]["mifid"]["value"] > 0
    without = measure_quality(first, second, None, near, seed=0)
    assert without["reference"] == "train" and without["floor"] is None


def test_few_images_have_no_numbers():
    found = measure_quality(np.zeros((9, 8), np.float32), np.zeros((99, 8), np.float32), None, np.zeros(9), seed=0)
    assert found["generated"] == dict.fromkeys(METRICS)


def test_images_that_are_all_the_same_have_finite_numbers():
    flat = np.ones((20, 8), np.float32)
    found = measure_quality(flat, flat, flat, np.ones(20), seed=0)["generated"]
    assert found["frechet_distance"] == {"value": 0.0, "interval": [0.0, 0.0]} and found["mifid"] is None
    assert found["precision"]["value"] == found["coverage"]["value"] == 1.0


def test_subsample_is_seeded_sorted_and_whole_when_small():
    assert subsample(5, 9, 0, "x").tolist() == [0, 1, 2, 3, 4]
    chosen = subsample(100, 10, 0, "x")
    assert len(set(chosen.tolist())) == 10 and (np.diff(chosen) > 0).all()
    assert (chosen == subsample(100, 10, 0, "x")).all() and (chosen != subsample(100, 10, 1, "x")).any()
