"""The scan finds what was planted, and no more."""

import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import unrote
from browser import Browser
from forking import Command
from unrote.cli import cli
from unrote.config import load_config
from unrote.data import in_memory_store
from unrote.data.namelist import name_lines, read_names
from unrote.data.store import image_digests
from unrote.errors import InputError
from unrote.scanning.duplicates import clusters, duplicate_pairs, joined, near_clusters, pair_correlations
from unrote.scanning.hashing import MIRRORED, near_pairs, perceptual_hashes
from unrote.scanning.scan import scan
from unrote.training.images import training_images

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


def test_copies_of_many_kinds_are_found():
    images, random = blobs(120), np.random.default_rng(0)
    padded = np.pad(images[:20], ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    copies = {
        "shift": padded[:, 3:35, 1:33],
        "flip and shift": padded[:, 0:32, 4:36][:, :, ::-1],
        "noise": np.clip(images[:20] + random.normal(0, 8, images[:20].shape), 0, 255).astype(np.uint8),
        "jpeg": np.stack([jpeg(image, 40) for image in images[:20]]),
        "bright": np.clip(images[:20] * 1.2, 0, 255).astype(np.uint8),
        "dark": (images[:20] * 0.8).astype(np.uint8),
    }
    labels = near_clusters(in_memory_store(np.concatenate([images, *copies.values()]), source="x"))
    for position, kind in enumerate(copies):
        start = 120 + 20 * position
        assert (labels[start : start + 20] == np.arange(20)).mean() >= 0.95, kind
    np.testing.assert_array_equal(labels[:120], np.arange(120))


def test_judgement_is_its_definition():
    """Correlation over flips and shifts, in float64 and by loops."""
    images, shift = blobs(12), 1
    images[6:] = np.roll(images[:6], 1, axis=2)[:, :, ::-1] * 0.8 + 20
    pairs = np.array([[i, i + 6] for i in range(6)] + [[0, 1], [2, 3]])
    found = pair_correlations(images, pairs, shift)
    for (a, b), value in zip(pairs.tolist(), found, strict=True):
        left, right = images[a] / 255.0, images[b] / 255.0
        best = 0.0
        for mirrored in (right, right[:, ::-1]):
            for down in range(3):
                for along in range(3):
                    x, y = left[1:31, 1:31], mirrored[down : down + 30, along : along + 30]
                    x, y = x - x.mean((0, 1)), y - y.mean((0, 1))
                    best = max(best, float((x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())))
        assert (value == pytest.approx(best, abs=1e-4)) if best > 0.94 else np.isnan(value)


def test_joining_pairs_is_connected_components():
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    random = np.random.default_rng(0)
    for _ in range(50):
        count = int(random.integers(1, 60))
        pairs = random.integers(0, count, (int(random.integers(0, 70)), 2))
        matrix = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (count, count))
        _, components = connected_components(matrix, directed=False)
        least = [int(np.flatnonzero(components == one)[0]) for one in components]
        assert joined(np.arange(count), pairs).tolist() == least


def test_two_training_images_are_never_joined_by_a_held_out_one_alone():
    """A chain: opposite fine patterns on either side of the held-out image, which the two do not share."""
    middle = 60 + blobs(1, 3)[0] * 0.5
    deviation = (middle - middle.mean((0, 1))).std()
    pattern = 0.5 * deviation * (1 - 2 * (np.indices((32, 32)).sum(0) % 2))[..., None]
    images = np.stack([middle + pattern, middle - pattern, middle]).round().astype(np.uint8)
    between = pair_correlations(images, np.array([[0, 1], [0, 2], [1, 2]]), 0)
    assert np.isnan(between).tolist() == [True, False, False]
    pairs, _ = duplicate_pairs(images, image_digests(images), shift=0, own=2)
    assert clusters(pairs, 3).tolist() == [0, 0, 0] and clusters(pairs[(pairs < 2).all(1)], 2).tolist() == [0, 1]


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 8, 8, 3), np.uint8),
        np.zeros((5, 1, 1, 1), np.uint8),
        np.arange(90, dtype=np.uint8).reshape(3, 2, 5, 3),
        np.full((40, 16, 16, 3), 9, np.uint8),
        np.arange(40, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 16, 16, 1), np.uint8),
        blobs(3)[:, :20, :31, :1],
    ],
)
def test_odd_sets_give_a_report(images, tmp_path):
    report = scan(in_memory_store(images, source="odd"))
    report.save(tmp_path)
    assert np.isfinite(report.risk["risk"]).all() and (tmp_path / "scan.html").exists()
    assert report.summary["found"]["exact_duplicates"] == len(images) - len({image.tobytes() for image in images})
    near = report.summary["found"]["near_duplicates"]
    assert near == 0 or images.shape[1] < 4


def test_a_large_group_of_look_alikes_is_one_cluster():
    random = np.random.default_rng(0)
    alike = np.clip(blobs(1)[0] + random.normal(0, 4, (1500, 32, 32, 3)), 0, 255).astype(np.uint8)
    labels = near_clusters(in_memory_store(np.concatenate([alike, blobs(100, 7)]), source="x"))
    assert (labels[:1500] == 0).all() and len(np.unique(labels)) == 101


def test_names_that_no_line_can_hold_come_back(tmp_path):
    names = ["a\nb", '"q"', "  lead", "x\u2028y", "plain", "", "\ufeffbom", "carriage\r", "back\\slash", '"', "=1"]
    store = in_memory_store(blobs(len(names)), source="x", names=names)
    report = scan(store)
    report.save(tmp_path)
    assert read_names(tmp_path / "keep.txt") == [names[index] for index in report.keep]
    config = load_config(overrides={"data.source": "x", "data.include": str(tmp_path / "keep.txt")})
    assert list(training_images(config, store).names) == [names[index] for index in report.keep]
    (tmp_path / "by hand.txt").write_bytes(b'\xef\xbb\xbfplain\r\n\r\n"\r\n')
    assert read_names(tmp_path / "by hand.txt") == ["plain", '"']
    assert name_lines(["plain", "a b"]) == "plain\na b\n"


def test_wrong_use_is_refused(tmp_path):
    store = in_memory_store(blobs(3), source="x")
    with pytest.raises(InputError, match="max_shift"):
        scan(store, max_shift=-1)
    with pytest.raises(InputError, match="finished run"):
        unrote.scan(store, run=tmp_path)
    with pytest.raises(InputError, match="differ in size"):
        scan(store, in_memory_store(blobs(2)[:, :16], source="y"))
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(cli, ["scan", "emoji", "--out", str(tmp_path / "file")])
    assert result.exit_code == 2 and "is a file" in result.output


def test_the_list_of_a_scan_trains_resumes_and_is_watched(tmp_path):
    """As a user would; the first training in a process of its own."""
    for index, image in enumerate([*blobs(10), *blobs(2)]):
        Image.fromarray(image).resize((8, 8)).save(tmp_path / f"{index:02}.png")
    out, keep = tmp_path / "run", tmp_path / "found" / "keep.txt"
    look = ["scan", str(tmp_path), "--resolution", "8", "--out"]
    found = CliRunner().invoke(cli, [*look, str(keep.parent), "--json"], catch_exceptions=False)
    assert json.loads(found.stdout)["counts"]["keep"] == 10 == len(keep.read_text().splitlines())
    train = ["train", "--data", str(tmp_path), "--resolution", "8", "--method", "agc", "--out", str(out),
             "--epochs", "2", "--batch-size", "5", "--set", f"data.include={keep}", "--device", "cpu",
             "--set", "model.block_out_channels=[32, 32]", "--set", "training.mixed_precision=no"]  # fmt: skip
    assert Command(["-m", "unrote", *train]).finish().returncode == 0
    assert json.loads((out / "data.json").read_text())["count"] == 10
    assert CliRunner().invoke(cli, train, catch_exceptions=False).exit_code == 0  # goes on from its end
    listed = keep.read_text()
    keep.write_text("".join(listed.splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match="not those the run was started on"):
        CliRunner().invoke(cli, train, catch_exceptions=False)
    keep.write_text(listed)
    with pytest.raises(InputError, match="not trained on exactly"):
        CliRunner().invoke(cli, [*look, str(tmp_path / "again"), "--run", str(out)], catch_exceptions=False)


def test_the_page_in_a_browser(planted, tmp_path):
    page = planted.save(tmp_path / "found")
    with Browser(tmp_path) as browser:
        browser.open(page)
        assert browser.run("document.title") == f"Scan of {EVIL}"
        assert browser.run("document.querySelectorAll('li.pair[data-pair]').length") == 5
        assert EVIL in browser.run("document.querySelector('li.pair .name').textContent")
        assert browser.run("[...document.querySelectorAll('main script')].length") == 0
        browser.run("document.querySelector('.pair .images').click()")
        assert browser.run("document.querySelector('dialog').open")
        assert all(address.startswith(("file:", "data:")) for address in browser.requests) and not browser.complaints
