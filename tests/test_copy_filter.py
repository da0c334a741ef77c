"""The copy filter: copies are made again at bounded cost, and image i stays a function of model, seed and i."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from memorizing import COUNT, pictures, save
from unrote.auditing import audit
from unrote.auditing.extracted import near_copies
from unrote.cli import cli
from unrote.data import open_images
from unrote.errors import InputError
from unrote.guards.copy_filter import CopyFilter
from unrote.guards.index import FeatureIndex, PixelIndex, calibrate, is_copy
from unrote.guards.spec import parse_guard
from unrote.sampling import sample

FEW = {"steps": 10, "batch_size": 16}
GUARD = "copy-filter:tries=3"


def rows_of(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def pixels_in(folder):
    return {int(path.stem): np.asarray(Image.open(path)) for path in folder.glob("*.png")}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for index, image in expected.items():
        np.testing.assert_array_equal(found[index], image)


@pytest.fixture(scope="module")
def plain(memorizing, tmp_path_factory):
    return sample(memorizing, 40, out=tmp_path_factory.mktemp("plain") / "samples", **FEW)


@pytest.fixture(scope="module")
def filtered(memorizing, tmp_path_factory):
    return sample(memorizing, 40, out=tmp_path_factory.mktemp("filtered") / "samples", guards=[GUARD], **FEW)


def copied(folder):
    """Which samples the audit, which knows nothing of guards, counts as near-copies."""
    report = audit(open_images(folder, resolution=None), pictures(COUNT))
    return near_copies(report.pairs)


def test_it_removes_copies_and_says_what_it_did(plain, filtered):
    before, after = copied(plain), copied(filtered)
    assert before.mean() > 0.25
    assert after.sum() < before.sum() / 2
    rows = rows_of(filtered)
    np.testing.assert_array_equal([row["copy"] for row in rows], after)
    for row, was_copy in zip(rows, before, strict=True):
        assert (row["tries"] > 1) == was_copy
        assert row["tries"] == 3 or not row["copy"]
        assert 0 <= row["attempt"] < row["tries"]
        assert row["nearest"] in pictures(COUNT).names


def test_what_is_no_copy_is_left_as_it_was(plain, filtered):
    before, after = pixels_in(plain), pixels_in(filtered)
    rows = rows_of(filtered)
    untouched = {row["index"] for row in rows if row["attempt"] == 0}
    assert 0 < len(untouched) < 40
    assert {index for index in after if (after[index] == before[index]).all()} == untouched


def test_number_of_images_order_and_interruptions_do_not_matter(memorizing, filtered, tmp_path):
    expected, rows = pixels_in(filtered), rows_of(filtered)
    folder = tmp_path / "again"
    for num in (5, 40):
        sample(memorizing, num, out=folder, guards=[GUARD], **FEW)
        assert rows_of(folder) == rows[:num]
    for index in (0, 20, 39):
        (folder / f"{index:06d}.png").unlink()
    sample(memorizing, 40, out=folder, guards=[GUARD], **FEW)
    assert_same(pixels_in(folder), expected)
    assert rows_of(folder) == rows


def test_another_batch_size_makes_the_same_images_but_for_rounding(memorizing, filtered, tmp_path):
    folder = sample(memorizing, 8, out=tmp_path / "one", guards=[GUARD], steps=10, batch_size=1)
    found, expected = pixels_in(folder), pixels_in(filtered)
    assert max(np.abs(found[i].astype(int) - expected[i].astype(int)).max() for i in range(8)) <= 1
    assert [row["tries"] for row in rows_of(folder)] == [row["tries"] for row in rows_of(filtered)[:8]]


def test_a_packed_file_has_the_same_images_and_notes(memorizing, filtered, tmp_path):
    target = sample(memorizing, 6, out=tmp_path / "few.npz", guards=[GUARD], **FEW)
    images = np.load(target)["images"]
    np.testing.assert_array_equal(images, np.stack([pixels_in(filtered)[i] for i in range(6)]))
    lines = (tmp_path / "few.samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows_of(filtered)[:6]


def test_a_folder_made_with_other_guards_is_refused(memorizing, filtered, plain):
    with pytest.raises(InputError, match="guards"):
        sample(memorizing, 2, out=filtered, **FEW)
    with pytest.raises(InputError, match="guards"):
        sample(memorizing, 2, out=filtered, guards=["copy-filter:tries=5"], **FEW)
    with pytest.raises(InputError, match="guards"):
        sample(memorizing, 2, out=plain, guards=[GUARD], **FEW)


class Scripted:
    """Attempt k of image i is the training image, changed by what the script says: 0 is a copy, 90 is none."""

    def __init__(self, script):
        self.train, self.script, self.asked = pictures(COUNT), script, []

    def __call__(self, indices, attempt):
        self.asked.append((list(indices), attempt))
        random = [np.random.default_rng((i, attempt)) for i in indices]
        images = [self.train.images[i].astype(float) for i in indices]
        noise = [self.script[i][attempt] * r.standard_normal((8, 8, 3)) for i, r in zip(indices, random, strict=True)]
        return np.clip(np.stack(images) + noise, 0, 255).astype(np.uint8)


def test_the_least_alike_try_is_kept_and_flagged_when_all_are_copies():
    script = {0: [0, 20, 10], 1: [0, 300, 0], 2: [300, 0, 0], 3: [20, 10, 0]}
    make = Scripted(script)
    images, notes = CopyFilter(PixelIndex(make.train, threshold=0.2), tries=3)(make, [0, 1, 2, 3])
    assert make.asked == [([0, 1, 2, 3], 0), ([0, 1, 3], 1), ([0, 3], 2)]
    assert [(note["attempt"], note["tries"], note["copy"]) for note in notes] == [
        (1, 3, True),
        (1, 2, False),
        (0, 1, False),
        (0, 3, True),
    ]
    for row, attempt in enumerate((1, 1, 0, 0)):
        np.testing.assert_array_equal(images[row], make([row], attempt)[0])
    assert [notes[row]["nearest"] for row in (0, 3)] == ["000000", "000003"]


def test_copies_that_are_mirrored_shifted_or_brighter_are_copies_too():
    train = pictures(COUNT)
    moved = train.images[:].copy()
    moved[0:4] = moved[0:4, :, ::-1]
    moved[4:8, :, 1:] = moved[4:8, :, :-1]
    moved[8:12] = np.minimum(np.rint(moved[8:12] * 1.15), 255)
    index = PixelIndex(train)
    values, nearest = index(moved)
    assert is_copy(index, values).all()
    np.testing.assert_array_equal(nearest, np.arange(COUNT))
    others, _ = index(pictures(64, seed=1).images)
    assert is_copy(index, others).mean() < 0.2


def test_the_calibrated_threshold_is_kept_by_images_that_were_not_trained_on():
    train, holdout = pictures(COUNT), pictures(200, seed=1)
    index = PixelIndex(train)
    calibrate(index, holdout, 0.05)
    values, _ = index(holdout.images)
    assert is_copy(index, values).sum() == 10
    assert not is_copy(index, np.array([index.threshold]))[0], "strictly below"
    with pytest.raises(InputError, match="200 held-out images or more"):
        calibrate(index, pictures(100, seed=1), 0.005)


class Descriptors:
    """Pixels without their mean as an encoder of copy detection."""

    key, name, weights_sha256, preprocessing = "toy", "toy", "none", "none"
    copy_detection, is_fid_inception = True, False

    def __call__(self, images):
        flat = np.asarray(images, dtype=np.float32).reshape(len(images), -1)
        return flat - flat.mean(1, keepdims=True)


def test_features_of_copy_detection_judge_by_cosine():
    train, holdout = pictures(COUNT), pictures(100, seed=1)
    index = FeatureIndex(train, Descriptors(), threshold=0.9)
    values, nearest = index(np.concatenate([train.images[:3], holdout.images[:3]]))
    descriptors = Descriptors()(train.images)
    asked = Descriptors()(np.concatenate([train.images[:3], holdout.images[:3]]))
    cosines = (asked @ descriptors.T) / np.outer(np.linalg.norm(asked, axis=1), np.linalg.norm(descriptors, axis=1))
    np.testing.assert_allclose(values, cosines.max(1), atol=1e-6)
    np.testing.assert_array_equal(nearest, cosines.argmax(1))
    assert is_copy(index, values).tolist() == [True] * 3 + [False] * 3
    calibrate(index, holdout, 0.1)
    assert is_copy(index, index(holdout.images)[0]).sum() == 10


def test_a_guard_is_read_with_paths_that_have_commas_and_colons():
    spec = parse_guard("copy-filter:train=a,b:c=d,tries=7,threshold=0.25,holdout=emoji:holdout")
    assert spec.values == {"train": "a,b:c=d", "tries": 7, "threshold": 0.25, "holdout": "emoji:holdout"}


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ("copyfilter", "did you mean 'copy-filter'"),
        ("copy-filter:trys=3", "did you mean 'tries'"),
        ("copy-filter:tries=many", "not a whole number"),
        ("copy-filter:tries=", "write tries=VALUE"),
        ("copy-filter:tries=2,tries=3", "given twice"),
        ("copy-filter:tries=0", "at least 1"),
        ("copy-filter:threshold=2", "lies in"),
        ("copy-filter:rate=0.1", "add holdout=DATA"),
        ("copy-filter:encoder=sscd", "no usual threshold"),
        ("copy-filter:threshold=0.3,holdout=x", "choose one"),
        ("copy-filter:train=nowhere/at-all", "nowhere/at-all"),
    ],
)
def test_wrong_guards_are_named_with_the_way_out(memorizing, tmp_path, guard, message):
    with pytest.raises(InputError, match=message):
        sample(memorizing, 2, out=tmp_path / "samples", guards=[guard], **FEW)
    assert not (tmp_path / "samples").exists()


def test_a_pipeline_must_be_told_its_training_images(memorizing, filtered, tmp_path):
    with pytest.raises(InputError, match="add train=DATA"):
        sample(memorizing.model_folder, 2, out=tmp_path / "samples", guards=[GUARD], **FEW)
    data = save(tmp_path, pictures(COUNT))
    command = ["sample", str(memorizing.model_folder), "--num", "6", "--steps", "10", "--batch-size", "16"]
    command += ["--out", str(tmp_path / "samples"), "--guard", f"copy-filter:train={data},tries=3", "--device", "cpu"]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0
    found = {index: image for index, image in pixels_in(filtered).items() if index < 6}
    assert_same(pixels_in(tmp_path / "samples"), found)


def test_a_filter_works_around_any_function_that_makes_images(memorizing):
    """The example of docs/guards.md: a plain diffusers pipeline."""
    import torch
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(memorizing.model_folder)
    pipeline.set_progress_bar_config(disable=True)

    def make(indices, attempt):
        noises = [torch.Generator().manual_seed(1000 * attempt + index) for index in indices]
        images = pipeline(len(noises), generator=noises, num_inference_steps=10, output_type="np").images
        return (images * 255).round().astype(np.uint8)

    index = PixelIndex(pictures(COUNT))
    images, notes = CopyFilter(index, tries=3)(make, range(12))
    before = is_copy(index, index(make(range(12), 0))[0])
    assert sum(note["copy"] for note in notes) < before.sum()
    assert images.shape == (12, 8, 8, 3)
