"""Neighbours against brute force in 64-bit integers and fp64, on random and adversarial images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from unrote.errors import InputError
from unrote.neighbours.images import nearest_images
from unrote.neighbours.orbit import IDENTITY, Transform, orbit
from unrote.neighbours.passes import Passes
from unrote.neighbours.reduction import Reduction


def images(seed: int, count: int, shape: tuple[int, ...] = (8, 8, 3), levels: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, levels, (count, *shape), dtype=np.uint8)


def brute_force(queries, references, num, transforms=(IDENTITY,)):
    """All squared distances as int64, the least over the orbit, sorted by (distance, index)."""
    every = []
    for view in transforms:
        moved = view.apply(references).reshape(len(references), -1).astype(np.int64)
        flat = queries.reshape(len(queries), -1).astype(np.int64)
        every.append(((flat[:, None] - moved[None]) ** 2).sum(2))
    least, which = np.min(every, axis=0), np.argmin(every, axis=0)
    order = np.argsort(least, axis=1, kind="stable")[:, :num]
    return np.take_along_axis(least, order, 1), order, np.take_along_axis(which, order, 1)


def assert_same(found, expected):
    for actual, wanted in zip((found.squared, found.indices, found.transforms), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("shape", [(8, 8, 3), (5, 9, 1), (32, 32, 3)])
def test_neighbours_equal_brute_force(shape):
    queries, references = images(1, 17, shape), images(2, 90, shape)
    assert_same(nearest_images(queries, references, 50), brute_force(queries, references, 50))


def test_distances_equal_fp64_of_pixels_in_unit_range():
    queries, references = images(1, 9), images(2, 60)
    found = nearest_images(queries, references, 50)
    difference = queries[:, None] / 255.0 - references[None] / 255.0
    expected = np.sort(np.sqrt((difference**2).sum((2, 3, 4))), axis=1)[:, :50]
    np.testing.assert_allclose(found.distances, expected, rtol=1e-12)


def adversarial(kind: str) -> tuple[np.ndarray, np.ndarray]:
    if kind == "all equal":
        return np.full((3, 8, 8, 3), 7, np.uint8), np.full((70, 8, 8, 3), 7, np.uint8)
    if kind == "copies and duplicates":
        references = np.repeat(images(3, 20), 4, axis=0)
        return references[[5, 40, 79]].copy(), references
    if kind == "one level apart":
        base = np.repeat(images(4, 1), 80, axis=0)
        base.reshape(80, -1)[np.arange(80), np.arange(80)] ^= 1
        return base[:5].copy(), base
    if kind == "black and white":
        return np.zeros((2, 8, 8, 3), np.uint8), np.full((60, 8, 8, 3), 255, np.uint8)
    if kind == "many ties":
        return images(5, 10, (4, 4, 1), levels=2), images(6, 200, (4, 4, 1), levels=2)
    return images(7, 4), images(8, 3)  # fewer references than neighbours asked for


@pytest.mark.parametrize(
    "kind", ["all equal", "copies and duplicates", "one level apart", "black and white", "many ties", "few references"]
)
@pytest.mark.parametrize("with_orbit", [False, True])
def test_adversarial_images(kind, with_orbit):
    queries, references = adversarial(kind)
    views = (
        orbit(flip=True, max_shift=1, height=queries.shape[1], width=queries.shape[2]) if with_orbit else (IDENTITY,)
    )
    assert_same(nearest_images(queries, references, 50, transforms=views), brute_force(queries, references, 50, views))


@pytest.mark.parametrize(
    "kind", ["random", "all equal", "copies and duplicates", "one level apart", "black and white", "many ties"]
)
@pytest.mark.parametrize("way", ["reduced", "float32"])
def test_images_that_are_searched_as_features_are_found_the_same(kind, way, monkeypatch, tmp_path):
    """As processors without 8-bit products search many images."""
    monkeypatch.setattr("unrote.neighbours.images.int8_is_exact", lambda _: False)
    monkeypatch.setattr(Reduction, "pays", lambda *_: True)
    monkeypatch.setattr(Passes, "fastest", lambda _: way)
    queries, references = (images(1, 17), images(2, 900)) if kind == "random" else adversarial(kind)
    np.save(tmp_path / "references.npy", references)
    found = nearest_images(queries, np.load(tmp_path / "references.npy", mmap_mode="r"), 50)
    assert_same(found, brute_force(queries, references, 50))


def test_extreme_pixels_over_many_values_stay_exact():
    """The longest dot products at the largest magnitudes: -128 · -128, and a result above 2³¹ in pixel levels."""
    black, white = np.zeros((1, 128, 128, 3), np.uint8), np.full((1, 128, 128, 3), 255, np.uint8)
    nearly = white.copy()
    nearly[0, 0, 0, 0] = 254
    found = nearest_images(black, np.concatenate([white, nearly, black]), 3)
    values = 128 * 128 * 3
    assert found.squared.tolist() == [[0, values * 255**2 - (255**2 - 254**2), values * 255**2]]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 50), st.integers(1 << 14, 1 << 20), st.integers(0, 2**31))
def test_block_sizes_change_nothing(num_queries, num_references, num, memory, seed):
    queries, references = images(seed, num_queries, levels=4), images(seed + 1, num_references, levels=4)
    views = orbit(flip=True, max_shift=1, height=8, width=8)
    whole = nearest_images(queries, references, num, transforms=views)
    assert_same(
        nearest_images(queries, references, num, transforms=views, memory_bytes=memory),
        (whole.squared, whole.indices, whole.transforms),
    )
    assert_same(whole, brute_force(queries, references, num, views))


def test_low_precision_matrix_products_change_nothing():
    queries, references = images(1, 20, (32, 32, 3)), images(2, 70, (32, 32, 3))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = nearest_images(queries, references, 50)
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same(found, brute_force(queries, references, 50))


def test_no_queries():
    found = nearest_images(images(1, 0), images(2, 5), 3)
    assert found.squared.shape == found.indices.shape == found.transforms.shape == (0, 3)


@pytest.mark.parametrize("down", [-2, 0, 1])
@pytest.mark.parametrize("right", [-1, 0, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_transforms_are_flip_then_reflection_padding_then_crop(down, right, flip):
    batch = images(9, 3, (7, 6, 3))
    pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).float()
    pixels = pixels.flip(3) if flip else pixels
    padded = F.pad(pixels, (2, 2, 2, 2), mode="reflect")
    cropped = padded[:, :, 2 - down : 2 - down + 7, 2 - right : 2 - right + 6]
    view = Transform(flip, down, right)
    if flip:  # a view moves first and mirrors then: the same set of views, with the other sign of right
        padded = F.pad(torch.from_numpy(batch).permute(0, 3, 1, 2).float(), (2, 2, 2, 2), mode="reflect").flip(3)
        cropped = padded[:, :, 2 - down : 2 - down + 7, 2 - right : 2 - right + 6]
    np.testing.assert_array_equal(view.apply(batch), cropped.permute(0, 2, 3, 1).numpy().astype(np.uint8))


def bilinear(image: np.ndarray, scale: float) -> np.ndarray:
    """An independent zoom about the centre: padding by reflection, then interpolation of each axis in float64."""
    height, width = image.shape[:2]
    pad = max(height, width) - 1
    padded = np.pad(
        image.astype(np.float64), ((min(pad, height - 1),) * 2, (min(pad, width - 1),) * 2, (0, 0)), "reflect"
    )
    for axis, size in enumerate((height, width)):
        positions = (np.arange(size) - (size - 1) / 2) / scale + (size - 1) / 2 + size - 1
        known = np.arange(padded.shape[axis])
        padded = np.apply_along_axis(lambda line, p=positions, k=known: np.interp(p, k, line), axis, padded)
    return padded


@pytest.mark.parametrize("scale", [0.5, 0.9, 1.0625, 1.1, 2.0])
@pytest.mark.parametrize("shape", [(8, 8, 3), (7, 12, 1), (1, 5, 3)])
def test_scales_are_bilinear_zooms_about_the_centre(scale, shape):
    batch = images(9, 4, shape)
    zoomed = Transform(scale=scale).apply(batch)
    expected = np.stack([bilinear(image, scale) for image in batch])
    assert zoomed.dtype == np.uint8 and np.abs(zoomed - expected).max() <= 0.5 + 2 * 255 * 2.0**-12


def test_brightness_is_a_rounded_factor_cut_at_white():
    batch = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    for factor in (0.85, 1.15):
        expected = [min(round(level * factor), 255) for level in range(256)]
        assert Transform(brightness=factor).apply(batch).reshape(-1).tolist() == expected


def test_views_do_not_depend_on_the_batch():
    batch = images(9, 300, (32, 32, 3))
    view = Transform(flip=True, down=1, scale=0.9, brightness=1.15)
    whole = view.apply(batch)
    np.testing.assert_array_equal(whole[[7, 299]], np.concatenate([view.apply(batch[i : i + 1]) for i in (7, 299)]))


def test_copies_that_were_zoomed_or_brightened_are_found_at_distance_zero():
    references = images(1, 60, (16, 16, 3))
    views = orbit(flip=True, max_shift=2, height=16, width=16)
    chosen = [view for view in views if view.scale != 1 or view.brightness != 1]
    queries = np.concatenate([view.apply(references[i : i + 1]) for i, view in enumerate(chosen)])
    found = nearest_images(queries, references, 50, transforms=views)
    assert found.squared[:, 0].tolist() == [0] * 8
    assert found.indices[:, 0].tolist() == list(range(8))
    assert [views[view] for view in found.transforms[:, 0]] == chosen
    assert_same(found, brute_force(queries, references, 50, views))


def test_orbit_starts_with_the_identity_and_has_every_view_once():
    views = orbit(flip=True, max_shift=2, height=8, width=8)
    assert views[0] == IDENTITY and len(views) == len(set(views)) == 58
    assert orbit(flip=False, max_shift=0, scales=(), brightness=(), height=8, width=8) == (IDENTITY,)
    assert orbit(flip=False, max_shift=0, scales=(1.0,), brightness=(1.0, 1.0), height=8, width=8) == (IDENTITY,)
    labels = [view.label for view in views]
    assert labels[:3] == ["identity", "flip", "shift (-1, +0)"]
    assert labels[50:] == [
        "brightness 1.15",
        "flip + brightness 1.15",
        "brightness 0.85",
        "flip + brightness 0.85",
        "scale 1.1",
        "flip + scale 1.1",
        "scale 0.9",
        "flip + scale 0.9",
    ]


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"scales": (0.4,)}, "scales has 0.4"),
        ({"brightness": (0.0,)}, "brightness has 0"),
        ({"scales": (np.nan,)}, "nan"),
    ],
)
def test_factors_out_of_range_are_refused(factors, message):
    with pytest.raises(InputError, match=message):
        orbit(flip=True, max_shift=1, height=8, width=8, **factors)


def test_a_shift_that_leaves_nothing_to_compare_is_refused():
    for shift in (2, -1):
        with pytest.raises(InputError, match=f"max_shift is {shift}.*0 to 1 pixels"):
            orbit(flip=True, max_shift=shift, height=4, width=9)


@pytest.mark.parametrize("transforms", [(IDENTITY,), (Transform(flip=True, right=1),), "orbit"])
def test_a_margin_leaves_the_border_out(transforms):
    random = np.random.default_rng(5)
    queries, references = (random.integers(0, 256, (n, 7, 9, 3), dtype=np.uint8) for n in (6, 40))
    if transforms == "orbit":
        transforms = orbit(flip=True, max_shift=2, height=7, width=9)
    found = nearest_images(queries, references, 10, transforms=transforms, margin=2)
    inside = (slice(None), slice(2, -2), slice(2, -2))
    views = np.stack([view.apply(references)[inside] for view in transforms]).astype(np.int64)
    every = ((queries[inside][:, None, None].astype(np.int64) - views[None]) ** 2).sum((3, 4, 5))
    least = every.min(1)
    order = np.argsort(least, axis=1, kind="stable")[:, :10]
    assert (found.indices == order).all()
    assert (found.squared == np.take_along_axis(least, order, 1)).all()
    assert (found.transforms == np.take_along_axis(every.argmin(1), order, 1)).all()


@pytest.mark.parametrize("fill", ["black", "edge", "wrap"])
def test_a_shifted_copy_is_at_distance_zero_whatever_fills_its_border(fill):
    references = np.random.default_rng(6).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    copy = np.roll(references[:5], (2, -1), axis=(1, 2))
    if fill != "wrap":
        copy[:, :2] = 0 if fill == "black" else copy[:, 2:3]
        copy[:, :, -1:] = 0 if fill == "black" else copy[:, :, -2:-1]
    views = orbit(flip=True, max_shift=2, height=12, width=12)
    found = nearest_images(copy, references, 3, transforms=views, margin=2)
    assert (found.squared[:, 0] == 0).all() and (found.indices[:, 0] == np.arange(5)).all()
    assert {views[i].label for i in found.transforms[:, 0]} == {"shift (+2, -1)"}
