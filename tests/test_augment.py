"""TAA: strengths by their formulas, and augmentations that do what they say and nothing at strength 0."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from unrote.data.augmentations import LABELS, coin, mirror
from unrote.data.augmentations import augment as augment_and_tell
from unrote.method.augment import augmentation_strength

EVERYTHING = {
    "flip": True,
    "shift": 0.3,
    "rotate": 25.0,
    "scale": 0.2,
    "brightness": 0.3,
    "contrast": 0.4,
    "saturation": 0.5,
    "cutout": 0.4,
}
ONE_EACH = [{name: value} for name, value in EVERYTHING.items()]


def augment(*arguments, **operations):
    """The views alone."""
    return augment_and_tell(*arguments, **operations)[0]


def draw_of(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=8, channels=3, height=12, width=12, seed=0):
    return torch.rand(count, channels, height, width, generator=draw_of(seed)) * 2 - 1


@settings(deadline=None)
@given(
    ratios=st.lists(st.one_of(st.floats(0, 5, width=32), st.sampled_from([math.nan, math.inf])), min_size=1),
    skip_ratio=st.sampled_from([0.25, 0.5, 1.0]),
    beta=st.sampled_from([1.0, 1.5, 3.0]),
)
def test_strengths_by_formula(ratios, skip_ratio, beta):
    options = {"skip_ratio": skip_ratio, "beta": beta}
    band = augmentation_strength(torch.tensor(ratios), policy="band", **options)
    near = augmentation_strength(torch.tensor(ratios), policy="proximity", **options)
    for ratio, in_band, proximity in zip(ratios, band.tolist(), near.tolist(), strict=True):
        if math.isfinite(ratio):
            assert in_band == (1.0 if ratio < beta * skip_ratio else 0.0)
            assert proximity == pytest.approx(math.exp(-5 * abs(ratio / skip_ratio - 1)), rel=1e-4)
        else:
            assert (in_band, proximity) == (0.0, 0.0)
    assert augmentation_strength(torch.tensor(ratios), policy="all", **options).tolist() == [1.0] * len(ratios)


@pytest.mark.parametrize("operations", [EVERYTHING, *ONE_EACH], ids=["all", *EVERYTHING])
@pytest.mark.parametrize("channels", [1, 3])
def test_strength_zero_is_the_identity_and_full_strength_stays_in_range(operations, channels):
    images = pictures(16, channels)
    images[0] = 1.0
    strength = torch.tensor([0.0, 1.0] * 8)
    before = images.clone()
    views = augment(images, strength, draw_of(), **operations)
    assert torch.equal(images, before), "the given images are not changed"
    assert views.shape == images.shape
    assert views.dtype == torch.float32
    assert torch.equal(views[::2], images[::2])
    assert views.min() >= -1
    assert views.max() <= 1
    changed = (views != images).flatten(1).any(1)
    assert changed.any() == (set(operations) != {"saturation"} or channels == 3)


@pytest.mark.parametrize("operations", [EVERYTHING, *ONE_EACH], ids=["all", *EVERYTHING])
def test_a_view_depends_on_its_own_image_and_strength_only(operations):
    images, strength = pictures(), torch.linspace(0.2, 1, 8)
    views = augment(images, strength, draw_of(), **operations)
    others = pictures(seed=1)
    others[3], other_strength = images[3], torch.rand(8, generator=draw_of(2))
    other_strength[3] = strength[3]
    assert torch.equal(augment(others, other_strength, draw_of(), **operations)[3], views[3])


def test_the_draw_decides_and_nothing_else():
    images, strength = pictures(), torch.ones(8)
    torch.manual_seed(0)
    first = augment(images, strength, draw_of(5), **EVERYTHING)
    torch.manual_seed(1)
    assert torch.equal(augment(images, strength, draw_of(5), **EVERYTHING), first)
    assert not torch.equal(augment(images, strength, draw_of(6), **EVERYTHING), first)


def shifted(image, down, right):
    """Shift by reflection, the way one writes it with torch's own padding."""
    height, width = image.shape[-2:]
    pad_y, pad_x = height - 1, width - 1
    padded = F.pad(image[None], (pad_x, pad_x, pad_y, pad_y), mode="reflect")[0]
    return padded[:, pad_y - down : pad_y - down + height, pad_x - right : pad_x - right + width]


@pytest.mark.parametrize(("height", "width"), [(8, 8), (6, 10)])
@pytest.mark.parametrize("flip", [False, True])
def test_a_shift_is_reflect_padding_and_a_crop_in_whole_pixels(height, width, flip):
    share, images = 0.34, pictures(400, 3, height, width)
    views = augment(images, torch.ones(400), draw_of(), shift=share, flip=flip)
    reach_y, reach_x = round(share * height), round(share * width)
    found = []
    for image, view in zip(images, views, strict=True):
        candidates = {
            (down, right, mirrored): shifted(image, down, right).flip(-1) if mirrored else shifted(image, down, right)
            for down in range(-reach_y, reach_y + 1)
            for right in range(-reach_x, reach_x + 1)
            for mirrored in ({False, flip})
        }
        found += [move for move, candidate in candidates.items() if torch.equal(candidate, view)]
    assert len(found) == 400, "each view is exactly one of the shifts in reach"
    assert {down for down, _, _ in found} == set(range(-reach_y, reach_y + 1))
    assert {right for _, right, _ in found} == set(range(-reach_x, reach_x + 1))
    assert 160 < sum(mirrored for _, _, mirrored in found) < 240 if flip else not any(m for _, _, m in found)


def test_half_the_strength_shifts_half_as_far_and_flips_half_as_often():
    images = pictures(600, 1, 16, 16)
    flipped = augment(images, torch.full((600,), 0.5), draw_of(), flip=True)
    mirrored = sum(torch.equal(view, image.flip(-1)) for view, image in zip(flipped, images, strict=True))
    assert 110 < mirrored < 190
    ramp = torch.linspace(-1, 1, 33)[:32].expand(600, 1, 32, 32)
    views = augment(ramp, torch.full((600,), 0.5), draw_of(), shift=0.25)
    steps = ((ramp - views)[:, 0, 16, 16] / (2 / 32)).round()
    assert steps.abs().max() == 4


def test_random_flip_mirrors_half():
    images = pictures(400)
    views = mirror(images, coin(len(images), draw_of()))
    mirrored = [torch.equal(view, image.flip(-1)) for view, image in zip(views, images, strict=True)]
    same = [torch.equal(view, image) for view, image in zip(views, images, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 160 < sum(mirrored) < 240


def blob(height, width, y, x):
    """A smooth spot, whose centre of mass can be measured to a fraction of a pixel."""
    rows, columns = torch.arange(height).view(-1, 1), torch.arange(width)
    return (torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 8.0) * 2 - 1).view(1, 1, height, width)


def centre(image):
    mass = (image[0] + 1) / 2
    rows, columns = torch.arange(mass.shape[0]), torch.arange(mass.shape[1])
    return float((mass.sum(1) * rows).sum() / mass.sum()), float((mass.sum(0) * columns).sum() / mass.sum())


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96)])
def test_a_rotation_keeps_distances_and_angles_below_its_largest(height, width):
    """Also of an image that is not square: a spot stays as far from the middle as it was, and as round."""
    y, x = (height - 1) / 2, (width - 1) / 2
    start = blob(height, width, y, x + 10)
    views = augment(start.expand(60, -1, -1, -1), torch.ones(60), draw_of(), rotate=50.0)
    angles = []
    for view in views:
        down, right = centre(view)
        assert math.hypot(down - y, right - x) == pytest.approx(10, abs=0.1)
        assert float(((view + 1) / 2).sum()) == pytest.approx(float(((start + 1) / 2).sum()), rel=0.01)
        angles.append(math.degrees(math.atan2(down - y, right - x)))
    assert 45 < max(angles) <= 50.5
    assert -50.5 <= min(angles) < -45


def test_a_change_of_size_moves_a_spot_in_proportion():
    start = blob(64, 64, 31.5, 31.5 + 16)
    views = augment(start.expand(60, -1, -1, -1), torch.ones(60), draw_of(), scale=0.25)
    sizes = torch.tensor([(centre(view)[1] - 31.5) / 16 for view in views])
    areas = torch.tensor([float((view + 1).sum() / (start + 1).sum()) for view in views])
    torch.testing.assert_close(areas, sizes**2, rtol=0.02, atol=0)
    assert 0.74 < sizes.min() < 0.8
    assert 1.2 < sizes.max() < 1.26


def test_brightness_adds_one_number_to_an_image():
    images = pictures(200) / 3
    views = augment(images, torch.ones(200), draw_of(), brightness=0.2)
    change = (views - images).flatten(1)
    assert (change.amax(1) - change.amin(1)).max() < 1e-6
    assert 0.38 < change.abs().max() <= 0.4, "a fifth of the range from -1 to 1"


def test_contrast_scales_around_the_mean_of_the_image():
    images = pictures(200) / 2
    views = augment(images, torch.ones(200), draw_of(), contrast=0.5)
    torch.testing.assert_close(views.mean((1, 2, 3)), images.mean((1, 2, 3)), rtol=0, atol=1e-6)
    factor = views.std((1, 2, 3)) / images.std((1, 2, 3))
    mean = images.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(views, mean + (images - mean) * factor.view(-1, 1, 1, 1), rtol=0, atol=1e-5)
    assert 0.5 <= factor.min() < 0.55
    assert 1.45 < factor.max() <= 1.5


def test_saturation_scales_around_the_grey_of_each_pixel():
    images = pictures(200) / 2
    views = augment(images, torch.ones(200), draw_of(), saturation=0.5)
    grey = images.mean(1, keepdim=True)
    torch.testing.assert_close(views.mean(1, keepdim=True), grey, rtol=0, atol=1e-6)
    factor = ((views - grey).flatten(1).norm(dim=1) / (images - grey).flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    torch.testing.assert_close(views, grey + (images - grey) * factor, rtol=0, atol=1e-5)
    assert 0.5 <= factor.min() < 0.55
    assert 1.45 < factor.max() <= 1.5


def test_cutout_greys_one_square_and_leaves_the_rest():
    images = torch.full((100, 3, 32, 32), 0.7)
    views = augment(images, torch.ones(100), draw_of(), cutout=0.25)
    for view in views:
        hole = view == 0
        assert torch.equal(hole[0], hole[1])
        assert torch.equal(hole[0], hole[2])
        assert (view[~hole] == 0.7).all()
        rows, columns = hole[0].any(1).nonzero(), hole[0].any(0).nonzero()
        height, width = int(rows.max() - rows.min() + 1), int(columns.max() - columns.min() + 1)
        assert int(hole[0].sum()) == height * width
        assert max(height, width) <= 8
    assert (views == 0).flatten(1).sum(1).max() == 3 * 8 * 8


def test_one_pixel_high_images_can_be_shifted():
    images = pictures(4, 3, 1, 7)
    assert augment(images, torch.ones(4), draw_of(), shift=0.5, flip=True).shape == images.shape


# The labels say what was done: the view follows from the image and them.


def column(labels, name):
    return labels[:, LABELS.index(name)]


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_labels_are_zero_for_the_untouched_and_fill_their_range(strength):
    images = pictures(300)
    _, labels = augment_and_tell(images, torch.full((300,), strength), draw_of(), **EVERYTHING)
    assert labels.shape == (300, len(LABELS))
    if not strength:
        assert not labels.any()
        return
    assert (labels.amax(0) > 0.9).all()
    assert labels.abs().max() <= 1.2, "a shift in whole pixels may be rounded beyond its largest share"
    signed = [name for name in LABELS if name not in ("flip", "cutout")]
    assert all(column(labels, name).min() < -0.9 for name in signed)


@pytest.mark.parametrize("name", EVERYTHING)
def test_only_what_was_done_is_told(name):
    _, labels = augment_and_tell(pictures(64), torch.ones(64), draw_of(), **{name: EVERYTHING[name]})
    told = {label for label in LABELS if column(labels, label).any()}
    assert told == {"shift": {"shift_y", "shift_x"}, "cutout": {"cutout", "cutout_y", "cutout_x"}}.get(name, {name})


def test_flip_and_shift_follow_from_the_labels():
    images, share = pictures(100, 3, 8, 10), 0.3
    views, labels = augment_and_tell(images, torch.rand(100, generator=draw_of(3)), draw_of(), flip=True, shift=share)
    for image, view, row in zip(images, views, labels, strict=True):
        flip, down, right = row[:3].tolist()
        expected = shifted(image, round(down * share * 8), round(right * share * 10))
        assert torch.equal(view, expected.flip(-1) if flip else expected)


def test_colours_follow_from_the_labels():
    images, strength = pictures(50) / 4, torch.rand(50, generator=draw_of(3))
    for name, centre_of in [
        ("brightness", None),
        ("contrast", lambda image: image.mean()),
        ("saturation", lambda image: image.mean(0, keepdim=True)),
    ]:
        views, labels = augment_and_tell(images, strength, draw_of(), **{name: 0.4})
        for image, view, amount in zip(images, views, column(labels, name), strict=True):
            if centre_of is None:
                expected = image + 0.8 * amount
            else:
                expected = centre_of(image) + (1 + 0.4 * amount) * (image - centre_of(image))
            torch.testing.assert_close(view, expected)


def test_rotation_and_size_follow_from_the_labels():
    start = blob(64, 64, 31.5, 31.5 + 10)
    views, labels = augment_and_tell(start.expand(40, -1, -1, -1), torch.ones(40), draw_of(), rotate=40.0, scale=0.2)
    for view, turn, size in zip(
        views, column(labels, "rotate").tolist(), column(labels, "scale").tolist(), strict=True
    ):
        down, right = centre(view)
        assert math.hypot(down - 31.5, right - 31.5) == pytest.approx(10 * (1 + 0.2 * size), abs=0.15)
        assert math.degrees(math.atan2(down - 31.5, right - 31.5)) == pytest.approx(-40 * turn, abs=1)


def test_the_square_that_is_cut_out_follows_from_the_labels():
    views, labels = augment_and_tell(torch.full((30, 3, 16, 16), 0.7), torch.ones(30), draw_of(), cutout=0.25)
    position = (torch.arange(16) + 0.5) / 16 * 2 - 1
    for view, y, x in zip(views, column(labels, "cutout_y"), column(labels, "cutout_x"), strict=True):
        inside = ((position - y).abs() < 0.25).view(-1, 1) & ((position - x).abs() < 0.25)
        assert torch.equal(view[0] == 0, inside)
