"""What curves attain, against cases computed by hand."""

import math

import numpy as np
import pytest
from scipy.stats import t as student

from unrote.study.curves import Curve, dominates, mean_over_seeds, ratio_over_seeds, student_t

HALF = 0.001
RISING = Curve(np.array([8.0, 4.0, 2.0]), np.array([0.009, 0.099, 0.399]), HALF)  # with the half: 0.01, 0.1, 0.4


def test_memorization_at_equal_quality_is_interpolated_in_its_logarithm():
    # Half way from 8 to 4, the geometric mean of 0.01 and 0.1.
    assert RISING.memorized_at(6.0) == pytest.approx(math.sqrt(0.01 * 0.1) - HALF)
    assert RISING.memorized_at(4.0) == pytest.approx(0.099)
    assert RISING.memorized_at(3.0) == pytest.approx(math.sqrt(0.1 * 0.4) - HALF)


def test_any_point_that_is_good_enough_counts_and_none_that_is_not():
    assert RISING.memorized_at(100.0) == pytest.approx(0.009)  # the first one is the least memorized
    assert RISING.memorized_at(1.9) is None
    back = Curve(np.array([8.0, 4.0, 6.0]), np.array([0.2, 0.3, 0.05]), HALF)
    assert back.memorized_at(6.0) == pytest.approx(0.05)
    assert (back.best_distance, back.at_best) == (4.0, 0.3)


def test_without_any_copies_there_is_nothing_to_interpolate():
    clean = Curve(np.array([8.0, 2.0]), np.array([0.0, 0.0]), HALF)
    assert clean.memorized_at(5.0) == pytest.approx(0.0, abs=1e-12)
    assert clean.distance_at(0.0) == 2.0


def test_quality_at_equal_memorization():
    # sqrt(0.01 * 0.1) is half way between the first two points.
    assert RISING.distance_at(math.sqrt(0.01 * 0.1) - HALF) == pytest.approx(6.0)
    assert RISING.distance_at(1.0) == 2.0
    assert RISING.distance_at(0.0) is None


def test_area_of_a_single_point_is_its_rectangle():
    # Distances 4 to 10 and memorization 0.2 to 0.8 are dominated, of a box of 10 x 0.8.
    point = Curve(np.array([4.0]), np.array([0.2]), HALF)
    assert point.area(10.0, 0.8) == pytest.approx(0.6 * 0.6 / 0.8, abs=2e-3)
    assert point.area(4.0, 0.8) == 0.0
    assert point.area(10.0, 0.0) == 0.0


def test_area_of_a_curve_against_the_integral():
    # From 8 down to 4, m(d) + h = 0.01 * 10^((8 - d) / 4); below 4 up to 2 it is 0.1 * 4^((4 - d) / 2).
    first = 0.8 * 4 - (0.1 - 0.01) * 4 / math.log(10) + 4 * HALF
    second = 0.8 * 2 - (0.4 - 0.1) * 2 / math.log(4) + 2 * HALF
    beyond = (0.8 - 0.009) * 2  # 8 to 10
    assert RISING.area(10.0, 0.8) == pytest.approx((first + second + beyond) / 8, rel=3e-3)


def test_students_t_is_that_of_scipy():
    for freedom in [*range(1, 31), 31, 60, 500]:
        assert student_t(freedom) == pytest.approx(student.ppf(0.975, freedom), rel=5e-5)


def test_interval_of_a_mean_by_hand():
    found = mean_over_seeds([1.0, 2.0, 3.0])
    half = 4.3027 * 1.0 / math.sqrt(3)
    assert (found.value, found.seeds) == (2.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert mean_over_seeds([0.1, 0.2, 0.6], low=0.0).low == 0.0
    assert mean_over_seeds([]) is None
    assert mean_over_seeds([5.0]).to_dict() == {"value": 5.0, "interval": None, "seeds": 1}


def test_ratio_is_paired_and_geometric():
    found = ratio_over_seeds([(1.0, 2.0), (10.0, 20.0), (3.0, 6.0)])
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert ratio_over_seeds([(2.0, 1.0), (1.0, 2.0)]).value == pytest.approx(1.0)
    assert ratio_over_seeds([(0.0, 0.009)], half=0.001).value == pytest.approx(0.1)
    assert ratio_over_seeds([(0.0, 1.0)]) is None  # it has no logarithm


def test_dominance_asks_for_every_distance_that_is_reached():
    worse = Curve(RISING.distance, RISING.memorized * 2, HALF)
    levels = [[8.0, 6.0, 4.0, 3.0, 2.0, 1.0]]
    assert dominates([RISING], [worse], levels)
    assert not dominates([worse], [RISING], levels)
    assert not dominates([RISING], [RISING], levels)
    short = Curve(np.array([8.0, 4.0]), np.array([0.0, 0.0]), HALF)
    assert not dominates([short], [RISING], levels)  # RISING reaches 2 and short does not
    assert dominates([short], [Curve(np.array([8.0, 5.0]), np.array([0.1, 0.2]), HALF)], levels)
    crossing = Curve(np.array([8.0, 2.0]), np.array([0.009, 0.9]), HALF)
    assert not dominates([crossing], [RISING], levels)
