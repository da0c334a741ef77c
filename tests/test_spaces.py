"""A feature space as a whole: similarity against brute force, planted copies, what the summary holds."""

import json

import numpy as np
import pytest

from unrote.auditing.authenticity import Search
from unrote.auditing.rows import Chosen, UnitRows
from unrote.auditing.similarity import Similar, above, background, calibrated, highest_absolute, most_similar
from unrote.auditing.spaces import measure_space
from unrote.errors import InputError

SEARCH = Search()


class Features:
    """An encoder that is only asked what it is."""

    key, name, weights_sha256, preprocessing = "toy", "toy/1", "0" * 64, "none"
    is_fid_inception = False

    def __init__(self, copy_detection: bool):
        self.copy_detection = copy_detection

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1).astype(np.float32)


def normal(seed: int, count: int, dimensions: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32)


def brute_force(queries: np.ndarray, references: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(queries.astype(float), axis=1)[:, None] * np.linalg.norm(references.astype(float), axis=1)
    products = queries.astype(float) @ references.T
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)


def test_similarity_equals_brute_force_and_zero_vectors_are_similar_to_nothing():
    generated, train = normal(0, 60) * 100, normal(1, 200) * 0.01
    train[5], generated[3], generated[4] = 0, 0, 3 * train[9]
    cosines = brute_force(generated, train)
    cosines[:, 5] = -np.inf  # a zero vector is nobody's nearest
    found = most_similar(generated, train, SEARCH, "")
    alive = np.arange(60) != 3
    assert (found.indices[alive] == cosines.argmax(1)[alive]).all() and found.values[3] == 0
    np.testing.assert_allclose(found.values[alive], cosines.max(1)[alive], rtol=1e-12)
    assert found.values[4] == pytest.approx(1, abs=1e-15)
    absolute = highest_absolute(found, generated, train, SEARCH)
    np.testing.assert_allclose(absolute[alive], np.abs(brute_force(generated, train)).max(1)[alive], rtol=1e-12)


def test_background_leaves_out_duplicates():
    train, identity = normal(2, 120), np.arange(120)
    train[10:60], identity[10:60] = train[10] * np.linspace(1, 2, 50)[:, None], 10
    cosines = brute_force(train, train)
    cosines[identity[:, None] == identity] = -np.inf
    found = background(train, identity, np.arange(0, 120, 2), SEARCH)
    # Scaled copies are equally similar but for the rounding of unit vectors to float32.
    np.testing.assert_allclose(found.values, cosines.max(1)[::2], atol=1e-7)
    assert (identity[found.indices] != identity[::2]).all()


@pytest.mark.parametrize(("count", "rate", "allowed"), [(100, 0.01, 1), (250, 0.01, 2), (1000, 0.05, 50), (29, 0.1, 2)])
def test_calibrated_threshold_allows_exactly_its_rate(count, rate, allowed):
    random = np.random.default_rng(3)
    unseen = Similar(random.permutation(count) / count, np.zeros(count, np.int64))
    identity = np.array([0, 0, 2])
    similar = Similar(np.array([1.0, 1.0, 0.0]), np.array([0, 1, 2]))
    found = calibrated(similar, unseen, np.zeros(count, bool), rate, identity)
    assert (unseen.values > found["threshold"]).sum() == allowed and found["num_holdout"] == count
    assert found["above"]["count"] == 2 and found["above"]["distinct"] == 1


def test_calibrated_threshold_with_ties_stays_below_its_rate_and_needs_enough_images():
    tied = Similar(np.full(300, 0.4), np.zeros(300, np.int64))
    found = calibrated(tied, tied, np.zeros(300, bool), 0.01, np.zeros(1, np.int64))
    assert found["threshold"] == 0.4 and found["above"]["count"] == 0
    few = Similar(np.linspace(0, 1, 99), np.zeros(99, np.int64))
    assert calibrated(few, few, np.zeros(99, bool), 0.01, np.zeros(1, np.int64)) is None


def test_duplicates_among_held_out_images_do_not_set_the_threshold_but_are_counted():
    unseen = Similar(np.concatenate([np.linspace(0, 0.5, 200), np.full(20, 0.99)]), np.zeros(220, np.int64))
    leaks = np.arange(220) >= 200
    similar = Similar(np.array([0.6, 0.4, 0.995]), np.zeros(3, np.int64))
    found = calibrated(similar, unseen, leaks, 0.01, np.zeros(1, np.int64))
    assert found["threshold"] == np.linspace(0, 0.5, 200)[197] and found["num_holdout"] == 200
    assert found["above"]["count"] == 2 and found["unseen"]["count"] == 22


def test_above_is_strict():
    similar = Similar(np.array([0.5, 0.6, 0.7]), np.array([0, 1, 2]))
    row = above(similar, 0.5, np.array([0, 1, 1]))
    assert (row["count"], row["total"], row["distinct"]) == (2, 3, 1)


def test_views_read_what_arrays_would_hold(tmp_path):
    rows = normal(4, 50)
    rows[3] = 0
    np.save(tmp_path / "rows.npy", rows)
    stored = np.load(tmp_path / "rows.npy", mmap_mode="r")
    indices = np.array([4, 3, 9, 9])
    assert (Chosen(stored, indices)[1:] == rows[[3, 9, 9]]).all() and Chosen(stored, indices).shape == (4, 8)
    units = UnitRows(stored, -1.0)[np.array([4, 3])]
    np.testing.assert_allclose(units[0], -rows[4] / np.linalg.norm(rows[4]), rtol=1e-6)
    assert units.dtype == np.float32 and units[1].tolist() == [10, 0, 0, 0, 0, 0, 0, 0]


def space(generated: np.ndarray, *, copy_detection: bool = True, holdout: bool = True, **options):
    train = normal(10, 600)
    others = normal(11, 400) if holdout else None
    options = {"identity": np.arange(600), "seed": 0, **options}
    return measure_space(Features(copy_detection), generated, train, others, **options)


def test_planted_copies_move_every_metric_and_a_fresh_sample_none():
    fresh = normal(12, 300)
    copying = fresh.copy()
    copying[:150] = normal(10, 600)[:150] * 1.001
    plain, copied = space(fresh).summary, space(copying).summary

    def mean(summary, name):
        return summary["similarity"][name]["mean"]["value"]

    row = copied["similarity"]["calibrated"]["above"]
    assert row["count"] >= 150 and row["distinct"] >= 150
    assert plain["similarity"]["calibrated"]["above"]["interval"][0] < 0.01
    assert mean(plain, "generated") == pytest.approx(mean(plain, "unseen"), abs=0.02)
    assert mean(copied, "generated") > mean(copied, "unseen") + 0.05
    assert copied["authenticity"]["authpct"]["interval"][1] < copied["authenticity"]["unseen"]["interval"][0]
    low, high = plain["authenticity"]["authpct"]["interval"]
    assert low < plain["authenticity"]["unseen"]["fraction"] < high
    null = plain["generalization"]["c_t"]["null_interval"]
    assert abs(plain["generalization"]["c_t"]["value"]) < 2 * null[1]
    assert copied["generalization"]["c_t"]["interval"][1] < null[0]
    gaps = [summary["generalization"]["fld"]["excess"]["interval"] for summary in (copied, plain)]
    assert gaps[0][1] < min(0, gaps[1][0])
    ratio = {
        key: s["quality"]["generated"]["mifid"]["memorization_distance"] for key, s in (("p", plain), ("c", copied))
    }
    assert ratio["c"] < 0.6 * ratio["p"]


def test_summary_is_plain_json_and_columns_are_per_image():
    found = space(normal(12, 40))
    text = json.dumps(found.summary, allow_nan=False)
    assert json.loads(text) == found.summary
    assert sorted(found.columns) == ["toy_authentic", "toy_similarity", "toy_train_index"]
    assert all(len(column) == 40 for column in found.columns.values())
    assert found.summary["similarity"]["calibrated"]["num_holdout"] == 400


def test_without_copy_detection_or_held_out_images():
    found = space(normal(12, 40), copy_detection=False, holdout=False)
    assert found.summary["similarity"] is None and found.summary["generalization"] is None
    assert found.summary["authenticity"]["unseen"] is None and list(found.columns) == ["toy_authentic"]
    json.dumps(found.summary, allow_nan=False)


def test_the_same_call_gives_the_same_numbers_whatever_the_memory():
    generated = normal(12, 50)
    first, second = space(generated), space(generated, memory_bytes=1 << 16)
    assert first.summary == second.summary
    for name, column in first.columns.items():
        np.testing.assert_array_equal(column, second.columns[name])


@pytest.mark.parametrize("train", [np.ones((20, 8), np.float32), normal(0, 1)])
def test_a_training_set_of_one_image_has_no_other(train):
    identity = np.zeros(len(train), np.int64)
    found = measure_space(Features(True), normal(1, 30), train, normal(2, 30), identity=identity, seed=0)
    assert found.summary["authenticity"] is None and found.summary["similarity"]["background"] is None
    json.dumps(found.summary, allow_nan=False)


def test_one_generated_image_and_one_held_out_image():
    found = measure_space(Features(True), normal(1, 1), normal(0, 20), normal(2, 1), identity=np.arange(20), seed=0)
    assert found.summary["generalization"] == {"c_t": None, "fld": None}
    json.dumps(found.summary, allow_nan=False)


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="toy/1: generated features have"):
        space(normal(1, 5, 7))
    with pytest.raises(InputError, match="no generated features"):
        space(normal(1, 0))
