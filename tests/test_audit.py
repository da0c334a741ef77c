"""The whole audit on planted truth: copies are found, noise and unseen images are not."""

import json

import numpy as np
import pytest

from unrote.auditing import audit
from unrote.auditing.memorization import THRESHOLDS, at_threshold
from unrote.auditing.searching import References, find
from unrote.data import in_memory_store, open_images
from unrote.errors import InputError
from unrote.neighbours.orbit import IDENTITY, Transform


def emoji() -> tuple[np.ndarray, np.ndarray]:
    """300 training and 300 held-out images, no two (nearly) alike: skin tones and flags would be natural copies."""
    rows = []
    for split in ("emoji", "emoji:holdout"):
        store = open_images(split, resolution=None)
        plain = [i for i, text in enumerate(store.captions or []) if "skin" not in text and "flag" not in text]
        rows.append(np.asarray(store.images[np.array(plain[:300])]))
    return rows[0], rows[1]


@pytest.fixture(scope="module")
def planted():
    """20 exact, 20 flipped, 20 shifted copies of distinct training images, 20 noise images, 20 held-out images."""
    train, holdout = emoji()
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    generated = np.concatenate(
        [
            train[:20],
            Transform(flip=True).apply(train[20:40]),
            Transform(down=2, right=-1).apply(train[40:60]),
            noise,
            holdout[280:],
        ]
    )
    stores = [in_memory_store(part, source=name) for part, name in ((generated, "samples"), (train, "train"))]
    return audit(*stores, in_memory_store(holdout[:280], source="held-out"), name="planted")


def test_planted_copies_are_found_and_nothing_else(planted):
    pairs = planted.pairs
    assert (pairs["orbit_distance"][:60] == 0).all() and (pairs["orbit_ratio_squared_l2"][:60] == 0).all()
    assert (pairs["orbit_distance"][60:] > 0).all()
    assert (pairs["orbit_ratio_squared_l2"][60:80] > 0.6).all(), "noise is no copy"
    assert (pairs["orbit_ratio_squared_l2"][80:] < 0.33).mean() <= 0.2, "unseen real images are mostly no copies"
    assert (pairs["distance"][:20] == 0).all() and (pairs["train_index"][:20] == np.arange(20)).all()


def test_the_transform_is_named(planted):
    copies = planted.pairs["orbit_transform"]
    assert (copies[:20] == "identity").all()
    symmetric = {"identity", "flip"}  # a mirror-symmetric image is its own flip
    assert set(copies[20:40]) <= symmetric | {name for name in copies[20:40] if "shift" in name}
    assert (copies[40:60] == "shift (+2, -1)").mean() > 0.5


def test_summary_counts(planted):
    summary = planted.summary
    orbit, plain = summary["memorization"]["orbit"]["squared-l2"], summary["memorization"]["plain"]["squared-l2"]
    assert at_threshold(orbit["mq"], 0.33)["count"] >= 60 > at_threshold(plain["mq"], 0.15)["count"] >= 20
    assert summary["exact_copies"]["orbit"] | {"interval": None} == {
        "count": 60, "total": 100, "fraction": 0.6, "interval": None, "distinct": 60,
    }  # fmt: skip
    assert summary["exact_copies"]["plain"]["count"] >= 20
    assert [row["threshold"] for row in plain["mq"]] == list(THRESHOLDS)
    assert summary["counts"] == {
        "generated": 100, "train": 300, "holdout": 280, "control": 280, "leaks": 1, "train_duplicates": 0,
    }  # fmt: skip
    assert summary["verdict"]["level"] == "heavy" and summary["settings"]["num_neighbors"] == 50


def test_counts_equal_the_pairs(planted):
    """Every count in the summary can be recounted from the per-image columns."""
    for view, prefix in (("plain", ""), ("orbit", "orbit_")):
        for definition, column in (("l2", "ratio_l2"), ("squared-l2", "ratio_squared_l2")):
            ratios = planted.pairs[prefix + column]
            for row in planted.summary["memorization"][view][definition]["mq"]:
                assert row["count"] == (ratios < row["threshold"]).sum()
    wins = planted.pairs["control_nearer_to"]
    share = planted.summary["train_share"]["plain"]
    assert share["count"] == (wins == "train").sum() + 0.5 * (wins == "tie").sum()


def test_saved_files_hold_the_summary_and_all_pairs(planted, tmp_path):
    page = planted.save(tmp_path)
    assert page == tmp_path / "report.html" and page.exists()
    assert json.loads((tmp_path / "report.json").read_text()) == planted.summary
    assert len((tmp_path / "pairs.csv").read_text().splitlines()) == 101
    assert planted.summary["verdict"]["title"] in (tmp_path / "summary.md").read_text()


def test_unseen_images_are_no_copies():
    train, holdout = emoji()
    report = audit(
        in_memory_store(holdout[:150], source="unseen"),
        in_memory_store(train, source="train"),
        in_memory_store(holdout[150:], source="held-out"),
    )
    assert report.summary["verdict"]["level"] == "none", str(report)
    share = report.summary["train_share"]["plain"]
    assert share["null_interval"][0] <= share["fraction"] <= share["null_interval"][1]
    assert "No copying found" in str(report)


def test_identity_only_orbit_equals_plain():
    train, holdout = emoji()
    sets = [in_memory_store(part, source="x") for part in (holdout[:20], train[:60], holdout[20:50])]
    report = audit(*sets, flip=False, max_shift=0, scales=(), brightness=())
    plain, orbit = report.summary["memorization"]["plain"], report.summary["memorization"]["orbit"]
    assert plain == orbit and report.summary["settings"]["num_transforms"] == 1


def test_one_image_a_side():
    image = in_memory_store(np.full((1, 8, 8, 3), 9, np.uint8), source="one")
    other = in_memory_store(np.zeros((1, 8, 8, 3), np.uint8), source="other")
    copy, fresh = audit(image, image), audit(other, image)
    assert copy.pairs["ratio_l2"].tolist() == [0.0] and fresh.pairs["ratio_l2"].tolist() == [1.0]
    assert copy.summary["verdict"]["level"] != "none" and fresh.summary["verdict"]["level"] == "none"
    assert copy.summary["settings"]["num_neighbors"] == 1
    assert any("n = 1 neighbours" in note for note in copy.summary["certainty"])


def small(count: int, shape=(8, 8, 3), source: str = "set"):
    random = np.random.default_rng(count)
    return in_memory_store(random.integers(0, 256, (count, *shape), dtype=np.uint8), source=source)


def test_unusable_sets_are_refused_with_the_way_out():
    with pytest.raises(InputError, match=r"generated images \(big\) are 16×16 with 3 channels.*--resolution"):
        audit(small(3, (16, 16, 3), "big"), small(5))
    with pytest.raises(InputError, match=r"holdout images .* 8×8 with 1 channel,"):
        audit(small(3), small(5), small(4, (8, 8, 1)))
    with pytest.raises(InputError, match=r"generated set .* has no images"):
        audit(small(0), small(5))
    with pytest.raises(InputError, match="num_neighbors is 0"):
        audit(small(3), small(5), num_neighbors=0)
    with pytest.raises(InputError, match="max_shift is 9"):
        audit(small(3), small(5), max_shift=9)
    with pytest.raises(InputError, match="ledger column 'visits' has 4 entries for 5"):
        audit(small(3), small(5), ledger={"visits": np.zeros(4, np.int64)})


def ledger_for(count: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "visits": np.full(count, 100),
        "skips": random.integers(0, 5, count),
        "moves": random.integers(0, 3, count),
        "augmented": random.integers(0, 9, count),
        "mean_ratio": np.full(count, np.nan, np.float32),
    }


def test_ledger_joins_the_copied_images():
    train = small(60)
    ledger = ledger_for(60)
    ledger["skips"][:4] = 80
    ledger["mean_ratio"][:4] = 0.25
    copies = in_memory_store(np.asarray(train.images)[[0, 1, 2, 3, 3]], source="copies")
    report = audit(copies, train, ledger=ledger, max_shift=0)
    joined = report.summary["ledger"]
    assert joined["copied"] == {"images": 4, "skip_rate": 0.8, "mean_ratio": 0.25}
    assert joined["others"]["images"] == 56 and joined["others"]["mean_ratio"] is None
    assert sorted(joined["most_skipped"][:4]) == [0, 1, 2, 3] and joined["visits"] == 6000
    json.dumps(report.summary, allow_nan=False)


def test_all_training_images_identical():
    same = in_memory_store(np.full((60, 8, 8, 3), 50, np.uint8), source="same")
    report = audit(
        in_memory_store(np.concatenate([np.asarray(same.images[:2]), np.asarray(small(3).images)]), source="g"), same
    )
    assert report.pairs["ratio_l2"].tolist() == pytest.approx([0, 0, 1, 1, 1])
    assert report.summary["counts"]["train_duplicates"] == 59
    assert report.summary["exact_copies"]["plain"]["distinct"] == 1
    assert report.summary["duplicates"] == {"method": "near", "clusters": 1, "images": 60, "largest": 60}
    assert any("exact duplicates" in note for note in report.summary["certainty"])
    json.dumps(report.summary, allow_nan=False)


def test_a_copy_of_a_repeated_image_is_found_when_its_cluster_counts_once():
    """60 equal images give an inexact copy 50 equally near neighbours: a ratio of 1, though it is a copy."""
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    train = np.concatenate([images, np.repeat(images[:1], 59, axis=0)])
    copy = np.clip(images[:1].astype(int) + random.integers(-3, 4, images[:1].shape), 0, 255).astype(np.uint8)
    report = audit(in_memory_store(copy, source="g"), in_memory_store(train, source="t"), max_shift=0)
    assert report.pairs["ratio_squared_l2"][0] > 0.99 and report.pairs["ratio_distinct"][0] < 0.05
    table = report.summary["memorization"]["plain"]["squared-l2"]
    assert at_threshold(table["mq"], 0.33)["count"] == 0
    assert at_threshold(table["distinct_aware"]["mq"], 0.33)["count"] == 1
    (found,) = report.summary["extracted"]["images"]
    assert found | {"ratio": 0} == {"cluster": 0, "name": "000000", "members": 60, "times": 1, "ratio": 0, "exact": 0}
    assert report.summary["extracted"]["distinct"] == 1 and report.summary["verdict"]["level"] != "none"


@pytest.mark.parametrize("num", [1, 3, 7])
def test_both_readings_of_a_search_equal_brute_force(num):
    random = np.random.default_rng(num)
    base = random.integers(0, 256, (12, 4, 4, 1), dtype=np.uint8)
    train = base[random.integers(0, 12, 40)]
    train[::5] ^= 1  # near-duplicates that are not exact
    clusters = np.array([np.flatnonzero((train >> 1 == image >> 1).all((1, 2, 3)))[0] for image in train])
    queries = random.integers(0, 256, (9, 4, 4, 1), dtype=np.uint8)
    queries[:3] = train[[0, 7, 20]]
    stores = in_memory_store(queries, source="q"), in_memory_store(train, source="t")
    found = find(stores[0], References(stores[1], clusters), num, (IDENTITY,))
    squared = ((queries[:, None].astype(int) - train[None].astype(int)) ** 2).sum((2, 3, 4))
    for row, distances in enumerate(squared):
        order = np.lexsort((np.arange(40), distances))
        assert found.plain.indices[row].tolist() == order[:num].tolist()
        nearest = order[0]
        firsts = [i for i in order if clusters[i] == i and clusters[i] != clusters[nearest]]
        assert found.distinct.indices[row].tolist() == [nearest, *firsts[: num - 1]]
        assert found.distinct.squared[row].tolist() == distances[found.distinct.indices[row]].tolist()


def test_calibrated_threshold_keeps_its_rate(planted):
    for view in ("plain", "orbit"):
        for definition in ("l2", "squared-l2"):
            calibrated = planted.summary["memorization"][view][definition]["calibrated"]
            unseen = planted.curves[view, definition, "unseen"]
            count = calibrated["num_holdout"]
            assert count == len(unseen) - planted.summary["counts"]["leaks"]
            assert (unseen < calibrated["threshold"]).sum() == calibrated["unseen"]["count"]
            assert calibrated["unseen"]["count"] <= 0.01 * count + planted.summary["counts"]["leaks"]
            below = planted.pairs[("orbit_" if view == "orbit" else "") + "ratio_" + definition.replace("-", "_")]
            assert calibrated["below"]["count"] == (below < calibrated["threshold"]).sum() >= 20


def test_held_out_duplicates_of_training_images_are_counted_and_set_no_threshold(caplog):
    train, holdout = emoji()
    leaky = np.concatenate([holdout[:200], train[:30], np.roll(train[30:40], 1, axis=2)])
    sets = (holdout[200:230], train, leaky)
    reports = [
        audit(*(in_memory_store(part, source="x") for part in sets), near_duplicates=near) for near in (True, False)
    ]
    assert [report.summary["counts"]["leaks"] for report in reports] == [40, 30]
    near, exact = (report.summary["memorization"]["orbit"]["squared-l2"]["calibrated"] for report in reports)
    assert near["threshold"] > 0.05 and near["unseen"]["count"] >= 40
    assert exact["threshold"] == 0, "shifted copies among the held-out images leave no room"
    for report in reports:
        assert any("held-out images are duplicates" in note for note in report.summary["certainty"])
    assert "30 of the 240 held-out images are training images" in caplog.text
    copies = (in_memory_store(part, source="x") for part in (train[:5], train, train[:60]))
    with pytest.raises(InputError, match="--holdout x: all of its images are training images"):
        audit(*copies)


def test_what_is_found_of_held_out_images_is_kept_and_changes_nothing(planted, tmp_path, monkeypatch):
    """The second audit of the same sets, of other samples, does not search for them; what is damaged is found again."""
    from unrote.auditing import searching

    train, holdout = planted.train, in_memory_store(emoji()[1][:280], source="held-out")
    samples = planted.generated.subset(np.arange(40))
    searched, whole = [], searching.nearest_images

    def counted(queries, *arguments, **options):
        searched.append(len(queries))
        return whole(queries, *arguments, **options)

    monkeypatch.setattr(searching, "nearest_images", counted)

    def again(**options):
        searched.clear()
        report = audit(samples, train, holdout, cache=tmp_path, **options)
        return {**report.summary}, report.curves, searched.count(280)

    summary, curves, first = again()
    kept = sorted(tmp_path.glob("search-*.npz"))
    assert len(kept) == 2 and first == 4, "plain, and over the orbit; first images and their duplicates"
    for damage in (None, b"", kept[0].read_bytes()[:-100]):
        if damage is not None:
            kept[0].write_bytes(damage)
        found, same, times = again()
        assert (found, times) == (summary, 0 if damage is None else 2)
        for key, ratios in curves.items():
            np.testing.assert_array_equal(same[key], ratios)
    assert again(num_neighbors=20)[2] == 4
    assert again(max_shift=1)[2] == 2, "plain neighbours know no shift"
