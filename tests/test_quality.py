"""Fréchet distance against scipy, precision/recall against their formula, and what the encoder can tell apart."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from unrote.auditing.quality import frechet_distance, manifold_metrics, quality, subsample
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


def test_manifold_metrics_equal_their_formulas():
    random = np.random.default_rng(1)
    generated, reference = random.normal(size=(30, 3)), random.normal(0.5, 1, size=(40, 3))

    def radius(points, index, k):
        return sorted(np.linalg.norm(points[index] - other) for other in points)[k]

    def inside(point, points, k):
        return [np.linalg.norm(point - points[i]) <= radius(points, i, k) for i in range(len(points))]

    found = manifold_metrics(generated, reference)
    assert found["precision"] == np.mean([any(inside(x, reference, 3)) for x in generated])
    assert found["recall"] == np.mean([any(inside(y, generated, 3)) for y in reference])
    assert found["density"] == pytest.approx(np.mean([sum(inside(x, reference, 5)) for x in generated]) / 5)
    balls = np.array([inside(x, reference, 5) for x in generated])
    assert found["coverage"] == balls.any(0).mean()


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
    first, second, third = (random.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8) for _ in range(3))
    with_holdout = quality(first, second, third[:30], seed=0)
    assert with_holdout["reference"] == "holdout" and with_holdout["num_reference"] == 30
    assert with_holdout["floor"]["frechet_distance"] > 0
    without = quality(first, second, None, seed=0)
    assert without["reference"] == "train" and without["floor"] is None


def test_one_image_has_no_distance():
    image = np.zeros((1, 8, 8, 3), np.uint8)
    assert quality(image, np.zeros((9, 8, 8, 3), np.uint8), None, 0)["generated"] == {
        "frechet_distance": None, "precision": None, "recall": None, "density": None, "coverage": None,
    }  # fmt: skip


def test_subsample_is_seeded_sorted_and_whole_when_small():
    assert subsample(5, 9, 0, "x").tolist() == [0, 1, 2, 3, 4]
    chosen = subsample(100, 10, 0, "x")
    assert len(set(chosen.tolist())) == 10 and (np.diff(chosen) > 0).all()
    assert (chosen == subsample(100, 10, 0, "x")).all() and (chosen != subsample(100, 10, 1, "x")).any()
