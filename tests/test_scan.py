"""The scan finds what was planted, and no more."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import unrote
from unrote.api import training_images
from unrote.config import load_config
from unrote.data import in_memory_store
from unrote.errors import InputError
from unrote.scanning.duplicates import clusters
from unrote.scanning.hashing import MIRRORED, near_pairs, perceptual_hashes
from unrote.scanning.scan import scan

EVIL = "<script>document.title='pwned'</script>"


def jpeg(image, quality=60):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def blobs(count, seed=0):
    """Smooth random pictures, which no two share."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((32, 32), Image.Resampling.BICUBIC)) for one in coarse])


@pytest.fixture(scope="module")
def planted():
    images = list(blobs(300))
    images += [images[0], images[1][:, ::-1], jpeg(images[2]), np.roll(images[3], 2, 1), np.full_like(images[0], 7)]
    names = [f"{index} {EVIL}" for index in range(len(images))]
    holdout = np.concatenate([blobs(50, 1), images[5][None]])
    return scan(in_memory_store(np.stack(images), source=EVIL, names=names), in_memory_store(holdout, source="other"))


def test_everything_planted_is_found_and_nothing_else(planted):
    groups = {tuple(group) for group in planted.groups()}
    assert groups == {(0, 300), (1, 301), (2, 302), (3, 303), (5, 305 + 50)}
    found = planted.summary["found"]
    assert (found["exact_duplicates"], found["near_duplicates"], found["leaks"], found["constant"]) == (1, 3, 1, 1)
    assert set(range(305)) - set(planted.keep.tolist()) == {300, 301, 302, 303, 304, 5}


def test_risk_is_its_formula(planted):
    copies, isolation = planted.risk["copies"], planted.risk["isolation"]
    np.testing.assert_allclose(planted.risk["risk"], np.log2(copies) + np.log2(isolation), rtol=1e-6)
    assert copies[0] == 2 and copies[10] == 1 and np.median(isolation) == pytest.approx(1, rel=0.01)


def test_a_mirrored_image_has_the_mirrored_hash():
    images = blobs(40)
    np.testing.assert_array_equal(perceptual_hashes(images[:, :, ::-1]), perceptual_hashes(images) ^ MIRRORED)


def test_near_pairs_has_all_within_five_bits():
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**63, 200, dtype=np.uint64)
    close = (
        hashes[:50] ^ np.uint64(1 << 5) ^ np.uint64(1 << 22) ^ np.uint64(1 << 60) ^ np.uint64(1 << 59) ^ np.uint64(1)
    )
    both = np.concatenate([hashes, close])
    bits = np.array([[bin(int(a ^ b)).count("1") for b in both] for a in both])
    mirrored = np.array([[bin(int(a ^ b ^ MIRRORED)).count("1") for b in both] for a in both])
    expected = {(i, j) for i in range(250) for j in range(i + 1, 250) if min(bits[i, j], mirrored[i, j]) <= 5}
    found = np.concatenate(list(near_pairs(both[None], 5)))
    assert {tuple(pair) for pair in found.tolist()} == expected and len(expected) >= 50


def test_clusters_join():
    assert clusters(np.array([[1, 3], [3, 4], [0, 2]]), 6).tolist() == [0, 1, 0, 1, 1, 5]


def test_files_and_training_on_what_is_kept(planted, tmp_path):
    page = planted.save(tmp_path)
    text = page.read_text()
    assert EVIL not in text and "http://" not in text and len(text) < 15_000_000
    assert len((tmp_path / "risk.csv").read_text().splitlines()) == 306
    assert json.loads((tmp_path / "clusters.json").read_text())["clusters"][0]["size"] == 2
    config = load_config(overrides={"data.source": "x", "data.include": str(tmp_path / "keep.txt")})
    kept = training_images(config, planted.images)
    assert list(kept.names) == [planted.images.names[index] for index in planted.keep]
    assert kept.fingerprint != planted.images.fingerprint


def test_a_list_that_does_not_fit_is_refused(planted, tmp_path):
    (tmp_path / "list.txt").write_text("nobody\n")
    config = load_config(overrides={"data.source": "x", "data.include": str(tmp_path / "list.txt")})
    with pytest.raises(InputError, match=r"data\.include.*'nobody'"):
        training_images(config, planted.images)


def test_ledger_moves_the_ranking():
    store = in_memory_store(blobs(30), source="x")
    ledger = {"visits": np.full(30, 10), "skips": np.zeros(30, int), "mean_ratio": np.ones(30, np.float32)}
    ledger["skips"][7], ledger["mean_ratio"][7] = 9, 0.1
    assert scan(store, ledger=ledger).risk["risk"].argmax() == 7
    with pytest.raises(InputError, match="ledger"):
        scan(store.subset(range(5)), ledger=ledger)


def test_python_surface_on_a_folder_of_mixed_sizes(tmp_path):
    for index, image in enumerate(blobs(4)):
        Image.fromarray(image).resize((40 + 8 * index, 50)).save(tmp_path / f"{index}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    report = unrote.scan(tmp_path)
    assert report.summary["found"]["unreadable"] == 1 and report.images.images.shape == (4, 64, 64, 3)
