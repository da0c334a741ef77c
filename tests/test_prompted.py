"""Generated images beside the image whose caption they were made from: planted truth, from the folder to the report."""

import json

import numpy as np
import pytest
from PIL import Image

from unrote.auditing import audit
from unrote.auditing.prompted import read_origins
from unrote.data import in_memory_store
from unrote.errors import InputError
from unrote.measures import audit as audit_data

RANDOM = np.random.default_rng(0)
TRAIN = RANDOM.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
NAMES = [f"photos/{index}.png" for index in range(60)]
FRESH = RANDOM.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)


class Means:
    """A space of copy detection: the mean of each quarter of an image."""

    key, name, weights_sha256, preprocessing = "means", "means", "0" * 64, "none"
    copy_detection, is_fid_inception = True, False

    def __call__(self, images):
        quarters = images.reshape(len(images), 2, 4, 2, 4, 3).astype(np.float32).mean((2, 4))
        return quarters.reshape(len(images), -1) - 127


def generated(noise=3):
    """10 near-copies of the caption's image, 5 of another training image, 12 fresh ones, 3 without a caption."""
    near = np.concatenate([TRAIN[:10], TRAIN[20:25], FRESH, TRAIN[:3]]).astype(int)
    near += np.random.default_rng(1).integers(-noise, noise + 1, near.shape)
    origins = [*NAMES[:15], *NAMES[30:42], None, None, "photos/elsewhere.png"]
    return np.clip(near, 0, 255).astype(np.uint8), origins


@pytest.fixture(scope="module")
def report():
    images, origins = generated()
    train = in_memory_store(TRAIN, source="train", names=NAMES)
    return audit(in_memory_store(images, source="g"), train, origins=origins, encoders=[Means()], max_shift=0)


def test_share_whose_nearest_is_the_prompts_image(report):
    prompted = report.summary["prompted"]
    assert prompted["paired"] == 27 and prompted["images"] == 27
    for view in ("plain", "orbit", "means"):
        column = {"plain": "train_index", "orbit": "orbit_train_index", "means": "means_train_index"}[view]
        same = report.pairs[column][:27] == report.pairs["prompt_train_index"][:27]
        assert prompted["nearest"][view]["count"] == same.sum() and same[:10].all() and not same[10:15].any()
    assert prompted["nearest"]["plain"]["total"] == 27 and prompted["nearest"]["plain"]["count"] <= 12
    copied = prompted["copied"]
    assert (copied["count"], copied["total"], copied["distinct"]) == (10, 27, 10)
    json.dumps(report.summary, allow_nan=False)


def test_shuffled_is_the_mean_over_all_permutations(report):
    nearest, own = report.pairs["train_index"][:27], report.pairs["prompt_train_index"][:27]
    expected = np.mean([(nearest == np.roll(own, shift)).mean() for shift in range(27)])
    assert report.summary["prompted"]["nearest"]["plain"]["shuffled"] == pytest.approx(expected)


def test_columns_against_plain_formulas(report):
    images, _ = generated()
    pairs = report.pairs
    assert pairs["prompt_train_index"].tolist() == [*range(15), *range(30, 42), -1, -1, -1]
    assert pairs["prompt_train_name"].tolist() == [*NAMES[:15], *NAMES[30:42], "", "", ""]
    flat, known = images.reshape(30, -1) / 255.0, TRAIN.reshape(60, -1) / 255.0
    distances = np.linalg.norm(flat[:, None] - known[None], axis=2)
    own = distances[np.arange(27), pairs["prompt_train_index"][:27]]
    np.testing.assert_allclose(pairs["prompt_distance"][:27], own, rtol=1e-6)
    mean = np.sort(distances, axis=1)[:27, :50].mean(1)
    np.testing.assert_allclose(pairs["prompt_ratio_l2"][:27], own / mean, rtol=1e-5)
    np.testing.assert_allclose(pairs["prompt_ratio_l2"][:10], pairs["ratio_l2"][:10], rtol=1e-5)
    assert (pairs["prompt_ratio_l2"][10:15] > pairs["ratio_l2"][10:15]).all()
    features, originals = Means()(images), Means()(TRAIN)
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (features, originals)]
    cosines = (units[0][:27] * units[1][pairs["prompt_train_index"][:27]]).sum(1)
    np.testing.assert_allclose(pairs["means_prompt_similarity"][:27], cosines, rtol=1e-5)
    for column in ("prompt_distance", "prompt_ratio_l2", "means_prompt_similarity"):
        assert np.isnan(pairs[column][27:]).all()
    similarity = report.summary["prompted"]["similarity"]["means"]
    assert similarity["mean"]["value"] == pytest.approx(cosines.mean())
    assert similarity["quantiles"]["0.95"] == pytest.approx(np.quantile(cosines, 0.95))


def test_the_result_says_it_in_words_and_files_hold_it(report, tmp_path):
    sentence = "captions of 27 training images: of 27 generated images"
    assert sentence in str(report) and "37.0 % are near-copies of it" in str(report)
    report.save(tmp_path)
    assert sentence in (tmp_path / "summary.md").read_text()
    header, first = (tmp_path / "pairs.csv").read_text().splitlines()[:2]
    assert dict(zip(header.split(","), first.split(","), strict=True))["prompt_train_name"] == "photos/0.png"


def test_a_duplicate_of_the_prompts_image_counts_as_it():
    train = np.concatenate([TRAIN[:20], TRAIN[:5]])  # the last five are the first five again
    names = [f"{index}" for index in range(25)]
    report = audit(
        in_memory_store(TRAIN[:5], source="g"),
        in_memory_store(train, source="t", names=names),
        origins=names[20:],
        max_shift=0,
    )
    prompted = report.summary["prompted"]
    assert prompted["nearest"]["plain"]["count"] == prompted["copied"]["count"] == 5
    assert (report.pairs["prompt_distance"] == 0).all() and (report.pairs["prompt_ratio_l2"] == 0).all()


def test_without_origins_there_is_nothing(caplog):
    store = in_memory_store(TRAIN, source="t", names=NAMES)
    few = in_memory_store(FRESH[:3], source="g")
    report = audit(few, store, max_shift=0)
    assert report.summary["prompted"] is None and "prompt_train_index" not in report.pairs
    unknown = audit(few, store, max_shift=0, origins=["nowhere.png", None, None])
    assert unknown.summary["prompted"] is None and "'nowhere.png'" in caplog.text
    with pytest.raises(InputError, match="2 names for 3"):
        audit(few, store, max_shift=0, origins=["x", "y"])


@pytest.mark.parametrize("packed", [False, True])
def test_origins_are_read_from_what_sampling_wrote(tmp_path, packed):
    images, origins = generated()
    folder, photos = tmp_path / "samples", tmp_path / "train"
    (photos / "photos").mkdir(parents=True)
    for name, image in zip(NAMES, TRAIN, strict=True):
        Image.fromarray(image).save(photos / name)
    folder.mkdir()
    rows = [
        {"file": f"{index:06d}.png"} | ({} if origin is None else {"origin": origin})
        for index, origin in enumerate(origins)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if packed:
        np.savez(tmp_path / "set.npz", images=images)
        (tmp_path / "set.samples.jsonl").write_text(lines)
        where = tmp_path / "set.npz"
    else:
        for row, image in zip(rows, images, strict=True):
            Image.fromarray(image).save(folder / row["file"])
        (folder / "samples.jsonl").write_text(lines)
        (folder / "000001.png").write_bytes(b"broken")  # an image that is left out moves no other's origin
        where = folder
    report = audit_data(where, photos, max_shift=0)
    prompted = report.summary["prompted"]
    assert prompted["copied"]["count"] == prompted["paired"] - 17 == (10 if packed else 9)
    names = dict(zip(report.pairs["name"], report.pairs["prompt_train_name"], strict=True))
    assert names["000002" if packed else "000002.png"] == "photos/2.png"
    assert read_origins(tmp_path / "other", ["a"]) is None and read_origins(TRAIN, ["a"]) is None


@pytest.mark.parametrize("content", ["{", "[1]", '{"name": "a.png"}', '{"file": 3}'])
def test_somebody_elses_file_of_that_name_is_passed_over(tmp_path, caplog, content):
    (tmp_path / "samples.jsonl").write_text(content + "\n")
    assert read_origins(tmp_path, ["a.png"]) is None and "was not written by unrote" in caplog.text
