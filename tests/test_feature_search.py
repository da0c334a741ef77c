"""Feature search against brute force in float64, the bounds it rests on, and inputs that force its guard to fire."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unrote.errors import InputError
from unrote.neighbours import cascade
from unrote.neighbours.cascade import CascadeScan
from unrote.neighbours.feature_scans import FloatScan, QuantisedScan, bounding_box
from unrote.neighbours.features import nearest_features
from unrote.neighbours.passes import WAYS, Passes
from unrote.neighbours.products import bfloat16_pays, int8_is_exact
from unrote.neighbours.reduction import Reduction

CPU = torch.device("cpu")
needs_int8 = pytest.mark.skipif(not int8_is_exact("cpu"), reason="no fast exact int8 product on this processor")


def brute_force(queries: np.ndarray, references: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    squared = np.stack([((query.astype(np.float64) - references) ** 2).sum(1) for query in queries])
    order = np.argsort(squared, axis=1, kind="stable")[:, :num]
    return np.take_along_axis(squared, order, 1), order


def assert_brute_force(found, queries, references, num):
    squared, indices = brute_force(queries, references, num)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_allclose(found.squared, squared, rtol=1e-13)


def normal(seed: int, count: int, values: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, values)).astype(np.float32)


def features(kind: str) -> tuple[np.ndarray, np.ndarray]:
    queries, references = normal(1, 70, 96), normal(2, 2500, 96)
    if kind == "far from zero":
        return queries + 5000, references + 5000
    if kind == "low-dimensional":
        basis = normal(3, 4, 96)
        return queries[:, :4] @ basis, references[:, :4] @ basis
    if kind == "unit length":
        return tuple(part / np.linalg.norm(part, axis=1, keepdims=True) for part in (queries, references))
    if kind == "8-bit":
        return tuple(np.random.default_rng(4).integers(0, 256, (n, 96)).astype(np.float32) / 255 for n in (70, 2500))
    if kind == "sparse and heavy-tailed":
        return tuple(np.maximum(part, 1.5) ** 8 for part in (queries, references))
    if kind == "tiny":
        return queries * np.float32(1e-30), references * np.float32(1e-30)
    if kind == "huge":
        return queries * np.float32(1e30), references * np.float32(1e30)
    if kind == "references out of range":
        references[::7] *= np.float32(1e12)
        references[5] = np.finfo(np.float32).max
    if kind == "one query":
        return queries[:1], references
    if kind == "fewer references than neighbours":
        return queries, references[:7]
    return queries, references


KINDS = [
    "normal",
    "far from zero",
    "low-dimensional",
    "unit length",
    "8-bit",
    "sparse and heavy-tailed",
    "tiny",
    "huge",
    "references out of range",
    "one query",
    "fewer references than neighbours",
]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_brute_force(kind):
    queries, references = features(kind)
    with np.errstate(over="ignore"):
        assert_brute_force(nearest_features(queries, references, 50), queries, references, 50)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_near_copies_do_not_drown_in_cancellation(offset):
    queries, references = normal(1, 20, 512) + np.float32(offset), normal(2, 900, 512) + np.float32(offset)
    references[10] = queries[3]
    references[20] = queries[3]
    references[30] = queries[3]
    references[30, 7] = np.nextafter(queries[3, 7], np.float32(np.inf))
    found = nearest_features(queries, references, 5)
    assert found.indices[3, :3].tolist() == [10, 20, 30]
    assert found.squared[3, :2].tolist() == [0.0, 0.0]
    assert found.distances[3, 2] == np.abs(np.float64(references[30, 7]) - queries[3, 7])
    assert_brute_force(found, queries, references, 5)


def crowded(spread: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Three queries, each in a crowd of 400 references that are all nearly equally far: more than are kept."""
    basis = normal(6, 8, 64)
    queries, references = normal(1, 70, 8) @ basis, normal(2, 3000, 8) @ basis
    directions = normal(3, 1200, 64).astype(np.float64)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    radii = 0.5 + spread * np.random.default_rng(4).random((1200, 1))
    references[:1200] = np.repeat(queries[:3], 400, axis=0) + directions * radii
    return queries, references[np.random.default_rng(5).permutation(3000)], 3


@needs_int8
def test_the_guard_fires_where_rounding_to_8_bits_cannot_tell_and_mends_it():
    queries, references, crowds = crowded(1e-3)
    assert Passes(queries, references, 50, 4096, CPU).fastest() == "int8"
    found = nearest_features(queries, references, 50)
    assert crowds <= found.searched_again < len(queries)
    assert_brute_force(found, queries, references, 50)


@needs_int8
def test_8_bits_are_enough_for_independent_numbers_as_rounding_at_random_adds_up_to_little():
    queries, references = normal(1, 70, 512), normal(2, 3000, 512)
    assert Passes(queries, references, 50, 4096, CPU).fastest() == "int8"
    found = nearest_features(queries, references, 50)
    assert found.searched_again < len(queries) / 10
    assert_brute_force(found, queries, references, 50)


def test_bfloat16_is_chosen_where_8_bits_are_too_coarse_and_changes_nothing():
    """One dimension of a hundred times the range of the others, in which all that is near is alike."""
    queries, references = normal(1, 70, 512), normal(2, 3000, 512)
    queries[:, 7] *= 0.0
    references[:, 7] *= 0.0
    queries[:2, 7], references[:2, 7] = (100.0, -100.0), (100.0, -100.0)
    if bfloat16_pays("cpu"):
        assert Passes(queries, references, 50, 4096, CPU).fastest() == "bfloat16"
    assert_brute_force(nearest_features(queries, references, 50), queries, references, 50)


def rounded_and_true(values: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances in steps of the grid of one pair after rounding by ``draws`` dithers, and before: [draws]."""
    random = np.random.default_rng(3)
    queries = random.uniform(-1, 1, (draws, values)).astype(np.float32)
    # The fractions of the differences are a half: then rounding at random moves distances most.
    references = (queries + random.choice([-1.5, 1.5], values) * np.float32(2 / 255)).astype(np.float32)
    box = np.repeat([[-1.0], [1.0]], values, axis=1).astype(np.float32)
    squared, true = np.empty(draws), np.empty(draws)
    for draw in range(draws):  # every query draws its own dither
        query, reference = queries[draw : draw + 1], references[draw : draw + 1]
        reference = np.clip(reference, -1, 1)
        scan = QuantisedScan(query, box, 1, 1, 1, 1, CPU)
        scan.add(0, reference)
        squared[draw] = float(scan.scan.unpacked()[0])
        true[draw] = ((query.astype(np.float64) - reference) ** 2).sum() * scan.factor**2
    return squared, true


def test_rounding_at_random_moves_a_distance_as_little_as_hoeffding_says():
    """|d̂² − d² − ‖ε‖²| ≤ 2cd fails with probability at most 2 exp(−2c²) for every c, and not much more rarely."""
    squared, true = rounded_and_true(512, 2000)
    cross = (squared - true - 512 / 4) / (2 * np.sqrt(true))
    assert abs(cross.mean()) < 0.05  # unbiased but for ‖ε‖²
    assert 0.4 < cross.std() < 0.55  # Hoeffding's c is in units of a half: each term has at most that deviation
    for c in (0.5, 1.0, 1.5):
        assert (np.abs(cross) > c).mean() <= 2 * np.exp(-2 * c**2)
    assert (np.abs(cross) > 1.0).any()  # a smaller c would not hold


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([100, 700]), st.sampled_from([1e-6, 1.0, 1e6]), st.booleans())
def test_a_reduction_takes_no_two_rows_farther_apart_but_for_its_slack(seed, values, outlying, spoilt):
    """Also rows that lie within its directions, where all of a distance is left and rounding shows."""
    random = np.random.default_rng(seed)
    reduction = Reduction(random.standard_normal((60, values)).astype(np.float32), CPU)
    if spoilt:
        reduction = copy.copy(reduction)
        reduction.basis = reduction.basis * 1.01
    rows = random.standard_normal((80, values)).astype(np.float32)
    rows[::2] = (reduction.basis.numpy() @ random.standard_normal((reduction.values, 40)).astype(np.float32)).T
    rows[::3] *= np.float32(outlying)
    reduced, slack = (part.double().numpy() for part in reduction(torch.from_numpy(rows)))
    squared = ((rows[:, None].astype(np.float64) - rows) ** 2).sum(2)
    bounds = ((reduced[:, None] - reduced) ** 2).sum(2) - 2 * (slack[:, None] + slack)
    assert (bounds <= squared).all() != spoilt


def cascaded(queries, references, num, slots, reduction, sample):
    """A scan of all references in blocks, with limits by a sample."""
    scan = CascadeScan(queries, bounding_box(queries), num, slots, len(references), 16, reduction)
    scan.expect(sample)
    for start in range(0, len(references), 40):
        scan.add(start, references[start : start + 40])
    return scan


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 3, 40, 300, 1100]),
    st.sampled_from([1e-20, 1e-3, 1.0, 1e15]),
    st.sampled_from([0.0, 1.0, 1e4]),
    st.sampled_from([1.0, 1e-8, 1e6, 1e18]),
    st.booleans(),
)
def test_a_cascade_drops_nothing_that_is_near(seed, values, scale, offset, wild, fitted):
    """Bounds from below hold, limits from above hold, and what is dropped is as far as said."""
    random = np.random.default_rng(seed)
    queries = ((random.standard_t(2, size=(9, values)) + offset) * scale).astype(np.float32)
    references = ((random.standard_t(2, size=(130, values)) * wild + offset) * scale).astype(np.float32)
    references[::5] = queries[random.integers(0, 9, 26)]
    references[1::5] = np.nextafter(references[::5], np.float32(np.inf))
    references[2::5] = references[2] * random.choice([1, 1 + 1e-6], 26)[:, None].astype(np.float32)
    squared = np.stack([((query.astype(np.float64) - references) ** 2).sum(1) for query in queries])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascade, "LEADING", 7)  # so that the first bound is another than the second
        patch.setattr(cascade, "DENSE", int(random.choice([1, 8, 100])))
        reduction = Reduction(references if fitted else np.ones((5, values), np.float32), CPU)
        for num, slots in ((5, 5), (5, 12), (20, 20), (130, 130)):
            for sample in (references[:0], references[::3], references[:4]):
                scan = cascaded(queries, references, num, slots, reduction, sample)
                bounds, indices = (part.numpy() for part in scan.candidates())
                distances = np.sqrt(np.take_along_axis(squared, indices, 1)) * (1 + 1e-12)
                assert ((bounds <= distances) | (bounds == np.inf)).all()
                nth = np.sort(squared, axis=1)[:, num - 1]
                assert (nth * (1 - 1e-12) <= scan._limits(slice(None)).numpy() / scan.scale / scan.scale).all()
                for query, kept in enumerate(bounds < np.inf):
                    others = np.delete(np.sqrt(squared[query]), indices[query, kept])
                    least = min(bounds[query, -1], np.sqrt(nth[query]))
                    assert (others >= least * (1 - 1e-12)).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-12, 1e-3, 1.0, 1e3]), st.sampled_from([0.0, 1e-3, 1.0]))
def test_both_bounds_let_a_pair_pass_at_its_own_distance(seed, wild, noise):
    """Rows within the leading directions, near them, and in all directions; and each bound excludes what is farther."""
    random, values = np.random.default_rng(seed), 1100
    basis = normal(7, 90, values)
    rows = random.standard_normal((160, 90)) * np.geomspace(1, 0.2, 90)
    rows[::2, 5:] = 0.0
    rows = (rows @ basis + noise * random.standard_normal((160, values)) * random.random((160, 1))).astype(np.float32)
    rows[100:] *= np.float32(wild)
    rows[100::3] = rows[:60:3] + np.float32(1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascade, "LEADING", 20)
        scan = CascadeScan(rows[:50], bounding_box(rows[:50]), 1, 1, 110, 64, Reduction(rows[:90], CPU))
    _, _, sides = scan._prepared(rows[50:])
    squared = ((rows[:50, None].astype(np.float64) - rows[50:]) ** 2).sum(2)
    excluded = []
    for stage, side in enumerate(sides):
        products = (side @ scan.sides[stage].T).T
        for share in (1.0, 0.5):
            for reference in range(110):
                limits = torch.from_numpy(squared[:, reference] * share) * scan.scale**2
                passed = products[:, reference] <= scan._allowed(stage, slice(None), limits)
                assert share < 1 or passed.all()
                excluded.append((stage, share, float((~passed).float().mean())))
    if wild == 1.0 and noise < 1.0:
        first, second = (np.mean([e for stage, share, e in excluded if (stage, share) == (k, 0.5)]) for k in (0, 1))
        assert 0.2 < first < second


ADVERSARIAL = {
    "all equal": lambda rows: rows * 0 + 3,
    "one dimension": lambda rows: rows * (np.arange(rows.shape[1]) == 7),
    "far from zero": lambda rows: rows + 1e4,
    "copies": lambda rows: rows[np.arange(len(rows)) % 40],
    "half of them copies": lambda rows: np.where(np.arange(len(rows))[:, None] % 2, rows[5], rows),
    "one far": lambda rows: np.where(np.arange(len(rows))[:, None] == 9, 1e18, rows),
    "tiny distances beside huge norms": lambda rows: np.sign(rows[5]) * 1e3 + rows * 1e-4,
    "nearest last": lambda rows: rows * np.linspace(3, 1e-3, len(rows))[:, None],
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("memory", [1 << 21, 512 << 20])
def test_a_cascade_equals_brute_force(kind, memory, monkeypatch):
    monkeypatch.setattr(Passes, "fastest", lambda _: "reduced")
    monkeypatch.setattr(cascade, "LEADING", 10)
    rows = normal(1, 900, 30) @ normal(2, 30, 400) + normal(3, 900, 400)
    rows = np.asarray(ADVERSARIAL[kind](rows), np.float32)
    queries, references = rows[::20], rows[np.arange(900) % 20 > 0]
    found = nearest_features(queries, references, 20, memory_bytes=memory)
    assert_brute_force(found, queries, references, 20)


@pytest.mark.parametrize("total", [21, 130, 700, 5000])
def test_no_reference_counts_twice_in_what_is_expected(total, monkeypatch):
    """Near the ends the sample overlaps itself: a limit by the same row twice would be too low."""
    expect, seen = CascadeScan.expect, []

    def spy(scan, sample):
        seen.append(sample)
        expect(scan, sample)

    monkeypatch.setattr(CascadeScan, "expect", spy)
    monkeypatch.setattr(Passes, "fastest", lambda _: "reduced")
    queries, references = normal(1, 50, 300), normal(2, total, 300)
    assert_brute_force(nearest_features(queries, references, 20), queries, references, 20)
    (sample,) = seen
    assert len(sample) >= min(total, 3000) and len(np.unique(sample, axis=0)) == len(sample)


@pytest.mark.parametrize("sample", ["none", "too few", "the farthest", "the nearest"])
def test_what_is_expected_changes_nothing(sample):
    queries, references = (rows[:, :4] @ normal(3, 4, 300) for rows in (normal(1, 50, 4), normal(2, 2000, 4)))
    squared, indices = brute_force(queries, references, 2000)
    order = np.argsort(squared.mean(0)) if sample == "none" else indices[0]
    chosen = {"none": order[:0], "too few": order[:9], "the farthest": order[-100:], "the nearest": order[:100]}[sample]
    scan = CascadeScan(queries, bounding_box(queries), 10, 31, 2000, 64, Reduction(references[::5], CPU))
    scan.expect(references[chosen])
    limits = scan.limits.numpy() / scan.scale**2
    assert np.isinf(limits).all() if len(chosen) < 10 else (limits >= squared[:, 9] * (1 - 1e-12)).all()
    assert sample != "the nearest" or limits[0] < squared[0, 9] * 1.01
    for start in range(0, 2000, 300):
        scan.add(start, references[start : start + 300])
    bounds, found = (part.numpy() for part in scan.candidates())
    for query in range(50):
        assert set(indices[query, :10]) <= set(found[query, bounds[query] < np.inf])


def test_cascades_of_parts_are_merged_in_any_order():
    queries, references = normal(1, 50, 12) @ normal(3, 12, 300), normal(2, 2000, 12) @ normal(3, 12, 300)
    reduction = Reduction(references[::5], CPU)

    def scan(parts, sample):
        scan = CascadeScan(queries, bounding_box(queries), 10, 31, 2000, 64, reduction)
        scan.expect(references[:sample])
        for start in parts:
            scan.add(start, references[start : start + 250])
        return scan

    whole = scan(range(0, 2000, 250), 100).candidates()
    for parts in ((0, 1000), (1000, 0)):
        first, second = (
            scan(range(start, start + 1000, 250), sample) for start, sample in zip(parts, (0, 50), strict=True)
        )
        limits = torch.minimum(first.limits, second.limits)
        first.merge(second.state())
        assert torch.equal(first.limits, limits)
        # Products of many pairs are computed another way, which rounds otherwise.
        bounds, found = first.candidates()
        near = whole[0] < torch.inf
        assert torch.allclose(bounds[near], whole[0][near], rtol=1e-3)
        for query in range(50):
            assert set(found[query, :10].tolist()) == set(whole[1][query, :10].tolist())


@pytest.mark.parametrize("values", [1, 7, 8, 9, 100, 3072])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.9])
def test_products_at_single_positions_are_summed_in_float32(values, share):
    """Long sums that cancel are off by no more than is proven, whether few positions are asked for or most."""
    left, right = normal(1, 33, values), normal(2, 21, values)
    left[:, 0], right[:, 0], left[:, -1], right[:, -1] = 256, 256, -256, 256
    flat = np.flatnonzero(np.random.default_rng(3).random(33 * 21) < share)
    found = cascade._products(*(torch.from_numpy(part) for part in (left, right, flat))).numpy()
    rows, columns = flat // 21, flat % 21
    exact, sizes = (
        (one[rows].astype(np.float64) * two[columns]).sum(1) for one, two in ((left, right), (abs(left), abs(right)))
    )
    assert found.shape == exact.shape
    assert (np.abs(found - exact) <= cascade._gamma(values) * sizes).all()


def test_a_reduced_search_warns_of_nothing_and_ignores_autocast():
    """Sparse products warn once per process that they are in beta."""
    program = (
        "import numpy as np, torch; from unrote.neighbours.features import nearest_features as search\n"
        "from unrote.neighbours.passes import Passes; Passes.fastest = lambda _: 'reduced'\n"
        "random = np.random.default_rng(0); basis = random.standard_normal((4, 300))\n"
        "rows = (random.standard_normal((3000, 4)) @ basis).astype(np.float32)\n"
        "calm = search(rows[:60], rows, 5)\n"
        "with torch.autocast('cpu', dtype=torch.bfloat16): found = search(rows[:60], rows, 5)\n"
        "assert (found.indices == calm.indices).all() and (found.indices[:, 0] == np.arange(60)).all()\n"
        "print(calm.searched_again)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_rows_are_reduced_where_that_spares_most_of_the_products():
    assert Reduction.pays(4096, 50_000, 3072) and not Reduction.pays(256, 50_000, 3072)
    assert not Reduction.pays(4096, 50_000, 128) and not Reduction.pays(4096, 1000, 3072)


@pytest.mark.skipif(int8_is_exact("cpu"), reason="8 bits come first on this processor")
def test_a_reduction_is_chosen_where_rows_vary_in_few_directions_only(monkeypatch):
    monkeypatch.setattr(Reduction, "pays", lambda *_: True)
    basis = normal(0, 12, 320)
    queries, references = normal(1, 70, 12) @ basis, normal(2, 3000, 12) @ basis
    assert Passes(queries, references, 50, 4096, CPU).fastest() == "reduced"
    assert Passes(normal(3, 70, 320), normal(4, 3000, 320), 50, 4096, CPU).fastest() != "reduced"
    assert_brute_force(nearest_features(queries, references, 50), queries, references, 50)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_equals_brute_force(kind, way, monkeypatch):
    """Also where another one would be chosen, so that the guard has more to do."""
    if way == "int8" and kind in ("tiny", "huge"):
        pytest.skip("never chosen there")
    queries, references = features(kind)
    monkeypatch.setattr(Passes, "fastest", lambda _: way)
    with np.errstate(over="ignore"):
        assert_brute_force(nearest_features(queries, references, 50), queries, references, 50)


def test_the_guard_fires_where_float32_cannot_tell_and_mends_it():
    """More equally distant references than are kept, for one query alone: 8 bits have no range then."""
    queries, references = normal(1, 1, 64), normal(2, 1500, 64)
    references[100:800] = queries[0]
    references[100:800, 3] += np.float32(0.25) * np.where(np.arange(700) % 2, 1, -1)
    found = nearest_features(queries, references, 50)
    assert found.searched_again == 1
    assert_brute_force(found, queries, references, 50)


def test_all_references_equal():
    queries, references = normal(1, 5, 16), np.ones((600, 16), np.float32)
    found = nearest_features(queries, references, 50)
    assert found.searched_again == 5
    assert found.indices.tolist() == [list(range(50))] * 5


def test_without_the_guard_neighbours_would_be_lost():
    """The guard is needed: the candidates that the fast pass kept for a crowded query miss true neighbours."""
    queries, references, _ = crowded(1e-3)
    scan = QuantisedScan(queries, bounding_box(queries), 50, 60, len(references), 64, CPU)
    scan.add(0, references)
    candidates = scan.candidates()[1].numpy()
    _, indices = brute_force(queries, references, 50)
    assert not set(indices[0]) <= set(candidates[0])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.sampled_from([1e-20, 1e-3, 1.0, 1e15]),
    st.sampled_from([0.0, 1.0, 1e4]),
    st.sampled_from([1.0, 1e-4, 1e6]),
)
def test_bounds_never_exceed_the_distance(seed, values, scale, offset, wild):
    """Of both fast passes, whatever the range, the offset and the outliers of the references."""
    random = np.random.default_rng(seed)
    queries = ((random.standard_t(2, size=(9, values)) + offset) * scale).astype(np.float32)
    references = ((random.standard_t(2, size=(130, values)) * wild + offset) * scale).astype(np.float32)
    references[::5] = queries[random.integers(0, 9, 26)]
    references[1::5] = np.nextafter(references[::5], np.float32(np.inf))
    squared = np.stack([((query.astype(np.float64) - references) ** 2).sum(1) for query in queries])
    reduction = Reduction(references, CPU)
    for scan in (
        FloatScan(queries, bounding_box(queries), 20, 130, tile=4, device=CPU),
        FloatScan(queries, bounding_box(queries), 20, 130, tile=4, device=CPU, coarse=True),
        FloatScan(queries, bounding_box(queries), 130, 130, tile=4, device=CPU),
        FloatScan(queries, bounding_box(queries), 130, 130, tile=4, device=CPU, coarse=True),
        FloatScan(queries, bounding_box(queries, references), 130, 130, tile=4, device=CPU, coarse=True),
        FloatScan(queries, bounding_box(queries), 20, 130, tile=4, device=CPU, reduction=reduction),
        FloatScan(queries, bounding_box(queries), 130, 130, tile=4, device=CPU, reduction=reduction, coarse=True),
        QuantisedScan(queries, bounding_box(queries), 130, 130, 130, 4, CPU),
    ):
        for start in range(0, 130, 40):
            scan.add(start, references[start : start + 40])
        bounds, indices = (part.numpy() for part in scan.candidates())
        distances = np.sqrt(np.take_along_axis(squared, indices, 1)) * (1 + 1e-12)
        assert ((bounds <= distances) | (bounds == np.inf)).all()
        dropped = (bounds == np.inf).sum(1)
        assert (dropped == 0).all() or isinstance(scan, QuantisedScan)  # all are kept, but what cannot be near


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 300),
    st.integers(1, 60),
    st.integers(1, 12),
    st.sampled_from([2, 3, 1000]),
    st.integers(1 << 13, 1 << 20),
    st.integers(0, 2**31),
)
def test_equals_brute_force_and_block_sizes_change_nothing(count, total, num, values, levels, memory, seed):
    """Few levels make ties everywhere, and sums that float64 holds exactly: the order is defined to the last place."""
    random = np.random.default_rng(seed)
    queries = random.integers(0, levels, (count, values)).astype(np.float32)
    references = random.integers(0, levels, (total, values)).astype(np.float32)
    whole = nearest_features(queries, references, num)
    assert_brute_force(whole, queries, references, num)
    parts = nearest_features(queries, references, num, memory_bytes=memory)
    np.testing.assert_array_equal(parts.indices, whole.indices)
    np.testing.assert_array_equal(parts.squared, whole.squared)


def test_the_result_does_not_depend_on_the_batch_of_queries_or_threads():
    queries, references = features("normal")
    whole = nearest_features(queries, references, 50)
    single = [nearest_features(queries[i : i + 1], references, 50) for i in range(5)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(2, threads))
        other = nearest_features(queries, references, 50)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(np.concatenate([found.squared for found in single]), whole.squared[:5])
    np.testing.assert_array_equal(np.concatenate([found.indices for found in single]), whole.indices[:5])
    np.testing.assert_array_equal(other.squared, whole.squared)


def test_low_precision_settings_change_nothing_and_are_kept():
    queries, references = features("normal")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = nearest_features(queries[:1], references, 50)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_brute_force(found, queries[:1], references, 50)


def test_a_memory_map_is_read_from_disk(tmp_path):
    queries, references = features("normal")
    np.save(tmp_path / "references.npy", references)
    mapped = np.load(tmp_path / "references.npy", mmap_mode="r")
    assert_brute_force(nearest_features(queries, mapped, 50), queries, references, 50)
    assert_brute_force(nearest_features(queries, mapped[100:], 50), queries, references[100:], 50)


@pytest.mark.parametrize("where", ["queries", "references"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(where, value):
    queries, references = normal(1, 5, 8), normal(2, 50, 8)
    (queries if where == "queries" else references)[3, 2] = value
    with pytest.raises(InputError, match="not finite"):
        nearest_features(queries, references, 5)


def test_other_types_are_refused():
    with pytest.raises(InputError, match="must be float32"):
        nearest_features(np.zeros((3, 4)), np.zeros((5, 4), np.float32), 2)


def test_no_queries():
    found = nearest_features(normal(1, 0, 4), normal(2, 9, 4), 3)
    assert found.squared.shape == found.indices.shape == (0, 3)
