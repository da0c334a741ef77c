"""Ratios, intervals and control against short independent references."""

import numpy as np
import pytest
from scipy import stats

from unrote.auditing.intervals import wilson_interval
from unrote.auditing.memorization import (
    image_identity,
    memorization_quantity,
    neighbour_ratio,
    train_share,
)
from unrote.data.store import image_digests
from unrote.neighbours.found import Neighbours
from unrote.neighbours.images import nearest_images


def images(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def neighbours(squared: list[list[int]]) -> Neighbours:
    values = np.array(squared, dtype=np.int64)
    return Neighbours(values, np.zeros_like(values), np.zeros(values.shape, np.int16))


@pytest.mark.parametrize("power", [1, 2])
def test_ratio_equals_a_plain_reference(power):
    generated, train = images(1, 12), images(2, 70)
    ratios = neighbour_ratio(nearest_images(generated, train, 50), "l2" if power == 1 else "squared-l2")
    for ratio, image in zip(ratios, generated, strict=True):
        distances = sorted(float(np.linalg.norm(image / 255.0 - other / 255.0)) ** power for other in train)[:50]
        assert ratio == pytest.approx(distances[0] / (sum(distances) / 50), rel=1e-12)


def test_definitions_differ():
    both = neighbours([[1, 4, 9]])
    assert neighbour_ratio(both, "l2")[0] == pytest.approx(1 / 2)
    assert neighbour_ratio(both, "squared-l2")[0] == pytest.approx(3 / 14)


@pytest.mark.parametrize(
    ("squared", "expected"),
    [([[0, 0, 0]], 0.0), ([[0, 5, 5]], 0.0), ([[7, 7, 7]], 1.0), ([[3]], 1.0), ([[0]], 0.0)],
    ids=["copy of n identical images", "exact copy", "all equally far", "one training image", "copy of the only one"],
)
def test_degenerate_ratios(squared, expected):
    for definition in ("l2", "squared-l2"):
        assert neighbour_ratio(neighbours(squared), definition).tolist() == [expected]


@pytest.mark.parametrize(("count", "total"), [(0, 10), (3, 10), (10, 10), (37, 1000)])
def test_wilson_equals_scipy(count, total):
    expected = stats.binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert wilson_interval(count, total) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_wilson_of_nothing_is_everything():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_mq_counts_strictly_below_and_distinct_originals():
    rows = memorization_quantity(np.array([0.1, 0.1, 0.2, 0.9]), np.array([4, 4, 5, 6]), thresholds=(0.2, 0.3, 1.0))
    assert [(row["count"], row["distinct"]) for row in rows] == [(2, 1), (3, 2), (4, 3)]
    assert rows[0]["fraction"] == 0.5


def test_share_counts_ties_half():
    share = train_share(neighbours([[1], [5], [9]]), neighbours([[2], [5], [3]]), 200)
    assert share.wins.tolist() == [1.0, 0.5, 0.0]
    assert share.summary()["fraction"] == 0.5 and share.summary()["ties"] == 1


def test_share_of_a_memorizing_and_of_a_fair_sample():
    train, holdout = images(1, 200), images(2, 200)
    copies = train_share(nearest_images(train, train, 5), nearest_images(train, holdout, 5), 200)
    assert copies.summary()["fraction"] == 1.0
    fresh = images(3, 400)
    fair = train_share(nearest_images(fresh, train, 5), nearest_images(fresh, holdout, 5), 200).summary()
    assert fair["null_interval"][0] < fair["fraction"] < fair["null_interval"][1]


def test_null_spread_equals_a_simulation_of_chance_splits():
    """Which of two equally large halves is called train is drawn again and again; the images stay."""
    pool, fresh, random = images(4, 120), images(5, 300), np.random.default_rng(0)
    nearest = nearest_images(fresh, pool, 1).indices[:, 0]
    shares = []
    for _ in range(4000):
        in_train = np.zeros(120, dtype=bool)
        in_train[random.permutation(120)[:60]] = True
        shares.append(in_train[nearest].mean())
    found = train_share(nearest_images(fresh, pool[:60], 1), nearest_images(fresh, pool[60:], 1), 60)
    assert found.null_spread == pytest.approx(np.std(shares), rel=0.05)


def test_duplicates_share_an_identity():
    base = images(1, 4)
    assert image_identity(image_digests(base[[0, 1, 0, 2, 1]])).tolist() == [0, 1, 0, 3, 1]
