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


def test_orbit_starts_with_the_identity_and_has_every_view_once():
    views = orbit(flip=True, max_shift=2, height=8, width=8)
    assert views[0] == IDENTITY and len(views) == len(set(views)) == 50
    assert orbit(flip=False, max_shift=0, height=8, width=8) == (IDENTITY,)
    assert [view.label for view in views[:3]] == ["identity", "flip", "shift (-1, +0)"]


def test_a_shift_larger_than_the_image_is_refused():
    with pytest.raises(InputError, match="max_shift is 4"):
        orbit(flip=True, max_shift=4, height=4, width=9)
