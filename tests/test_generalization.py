"""C_T against scipy's Mann-Whitney test, the likelihood gap against scipy, AuthPct against loops; copies planted."""

import numpy as np
import pytest
import scipy.stats
import torch

from unrote.auditing.authenticity import Search, authentic, nearest_other
from unrote.auditing.generalization import (
    LEAST_VARIANCE,
    Cells,
    c_t,
    fit_variances,
    likelihood_gap,
    log_likelihood,
    mann_whitney,
    measure_c_t,
)

SEARCH = Search()


def normal(seed: int, count: int, dimensions: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32)


def nearest(queries: np.ndarray, references: np.ndarray) -> np.ndarray:
    return np.array([((references.astype(float) - query) ** 2).sum(1).min() for query in queries])


def z_score(first: np.ndarray, second: np.ndarray) -> float:
    n, m = len(first), len(second)
    return (scipy.stats.mannwhitneyu(first, second).statistic - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12)


@pytest.mark.parametrize("ties", [False, True])
def test_z_equals_scipy(ties):
    random = np.random.default_rng(0)
    first, second = random.normal(0.4, 1, 80), random.normal(size=50)
    if ties:
        first, second = first.round(), second.round()
    assert mann_whitney(first, second)[0] == pytest.approx(z_score(first, second))


def test_c_t_is_the_weighted_mean_of_cells_with_enough_images():
    random = np.random.default_rng(1)
    generated, unseen = random.exponential(size=300), random.exponential(size=200)
    cells, unseen_cells = random.integers(0, 3, 300), random.integers(0, 3, 200)
    cells[:15], unseen_cells[:60] = 3, 3  # too few generated images to say anything
    expected, weight = 0.0, 0
    for cell in range(3):
        inside = unseen[unseen_cells == cell]
        expected += len(inside) * z_score(generated[cells == cell], inside)
        weight += len(inside)
    found = c_t(generated, unseen, cells, unseen_cells)
    assert found["cells"] == 3 and found["covered"] == pytest.approx(weight / 200)
    assert found["value"] == pytest.approx(expected / weight)
    assert c_t(generated[:10], unseen, cells[:10], unseen_cells) is None


def test_spread_of_z_is_the_spread_of_repetitions():
    random = np.random.default_rng(2)
    pairs = [(random.normal(0.5, 1, 60), random.normal(size=90)) for _ in range(2000)]
    scores, spreads = np.array([mann_whitney(*pair) for pair in pairs]).T
    assert spreads.mean() == pytest.approx(scores.std(), rel=0.05)


def test_cells_are_seeded_separate_clusters_and_do_not_depend_on_blocks(monkeypatch):
    centres = np.array([[0, 0], [9, 0], [0, 9]])
    which = np.random.default_rng(3).integers(0, 3, 400)
    points = (centres[which] + normal(4, 400, 2)).astype(np.float32)
    cells = Cells.of(points, 3, seed=0)
    found = cells.of_each(points)
    assert len(set(zip(which.tolist(), found.tolist(), strict=True))) == 3
    assert (Cells.of(points, 3, seed=0).centres == cells.centres).all()
    monkeypatch.setattr("unrote.auditing.rows.BLOCK", 7)
    assert (cells.of_each(points) == found).all()
    assert len(Cells.of(np.ones((50, 2), np.float32), 5, seed=0).centres) == 1


def c_t_of(generated: np.ndarray, train: np.ndarray, unseen: np.ndarray) -> float:
    distances = nearest(generated, train), nearest(unseen, train)
    return measure_c_t(generated, train, unseen, distances, seed=0)["value"]


def test_c_t_falls_with_copies_and_not_with_a_fresh_sample():
    train, unseen, fresh = normal(5, 800), normal(6, 400), normal(7, 400)
    assert abs(c_t_of(fresh, train, unseen)) < 2
    copying = fresh.copy()
    copying[:200] = train[:200] + 0.01
    assert c_t_of(copying, train, unseen) < -5
    assert c_t_of(fresh * 3, train, unseen) > 5


def test_likelihood_equals_scipy():
    points, centres, variances = normal(8, 12, 3), normal(9, 5, 3), np.array([0.1, 0.5, 1, 2, 3])
    squared = ((points[:, None].astype(float) - centres) ** 2).sum(-1)
    density = [
        np.mean([scipy.stats.multivariate_normal(c, v).pdf(x) for c, v in zip(centres, variances, strict=True)])
        for x in points
    ]
    np.testing.assert_allclose(log_likelihood(squared, variances, 3), np.log(density), rtol=1e-9)


def test_fitted_variances_are_a_maximum_that_gradient_ascent_also_finds():
    points, centres = normal(10, 200, 3), normal(11, 8, 3)
    squared = ((points[:, None].astype(float) - centres) ** 2).sum(-1)
    fitted = fit_variances(squared, 3)
    logarithms = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logarithms], lr=0.05)
    for _ in range(2000):
        optimizer.zero_grad()
        densities = -torch.from_numpy(squared) / (2 * logarithms.exp()) - 1.5 * logarithms
        loss = -densities.logsumexp(1).mean()
        loss.backward()
        optimizer.step()
    ours = log_likelihood(squared, fitted, 3).mean()
    theirs = log_likelihood(squared, logarithms.detach().exp().numpy(), 3).mean()
    assert ours == pytest.approx(theirs, abs=2e-3)


def test_variance_of_a_copy_has_a_floor():
    squared = np.array([[0.0, 4.0], [9.0, 4.0], [9.0, 5.0]])
    variances = fit_variances(squared, 2)
    assert variances[0] == LEAST_VARIANCE and np.isfinite(log_likelihood(squared, variances, 2)).all()


def test_likelihood_gap_falls_with_copies_and_not_with_a_fresh_sample():
    train, holdout, fresh = normal(12, 600), normal(13, 500), normal(14, 500)
    plain = likelihood_gap(fresh, train, holdout, seed=0)
    low, high = plain["excess"]["interval"]
    assert low < 0 < high and plain["num_real"] == 500
    assert plain["gap"]["value"] == pytest.approx(plain["train"] - plain["holdout"])
    copying = fresh.copy()
    copying[:250] = train[:250] + 0.01
    copied = likelihood_gap(copying, train, holdout, seed=0)
    assert copied["excess"]["interval"][1] < 0 and copied["gap"]["value"] < copied["control"]["value"] - 50
    assert likelihood_gap(fresh[:5], train, holdout, seed=0) is None


def clusters(count: int) -> np.ndarray:
    identity = np.arange(count)
    identity[40:100] = 40  # more than are looked at before the cluster is left out
    identity[101] = 100
    return identity


def test_nearest_other_equals_a_loop_with_clusters_larger_than_what_is_searched_for():
    train, identity = normal(15, 150, 4), clusters(150)
    train[40:100] = train[40] + normal(16, 60, 4) * 1e-3
    train[101] = train[100]
    queries = np.array([0, 45, 99, 100, 101, 149, 45])
    squared, indices = nearest_other(train, identity, queries, SEARCH)
    for query, value, index in zip(queries, squared, indices, strict=True):
        distances = ((train.astype(float) - train[query]) ** 2).sum(1)
        distances[identity == identity[query]] = np.inf
        assert index == distances.argmin() and value == pytest.approx(distances.min())


def test_authenticity_equals_a_loop():
    train, generated, identity = normal(17, 150, 3), normal(18, 80, 3), clusters(150)
    train[40:100] = train[40]
    train[101] = train[100]
    generated[0], generated[1], generated[2] = train[45], train[101], train[7] + 1e-4
    distances = ((generated[:, None].astype(float) - train) ** 2).sum(-1)
    expected = []
    for row in distances:
        y = row.argmin()
        others = ((train.astype(float) - train[y]) ** 2).sum(1)[identity != identity[y]]
        expected.append(row.min() > others.min())
    found = authentic(distances.min(1), distances.argmin(1), train, identity, SEARCH)
    assert found.tolist() == expected and not found[:3].any() and 0.2 < found.mean() < 0.8
