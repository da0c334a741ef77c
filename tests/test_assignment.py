"""Which rank trains which proxies: all of them once, in order, and as evenly as contiguous blocks can be."""

import random
from itertools import combinations

import pytest

from unrote.method.assignment import assign


def largest(blocks, sizes):
    return max(sum(sizes[k] for k in block) for block in blocks)


def smallest_possible(sizes, world):
    """By trying every way to cut."""
    count = len(sizes)
    ways = combinations(range(1, count), world - 1)
    return min(largest(map(range, (0, *cuts), (*cuts, count)), sizes) for cuts in ways)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_cut_has_a_smaller_largest_rank(seed):
    draw = random.Random(seed)
    for _ in range(40):
        sizes = [draw.randint(1, 20) for _ in range(draw.randint(1, 9))]
        world = draw.randint(1, len(sizes))
        blocks = assign(sizes, world)
        assert [k for block in blocks for k in block] == list(range(len(sizes)))
        assert len(blocks) == world and all(blocks)
        assert largest(blocks, sizes) == smallest_possible(sizes, world)


@pytest.mark.parametrize(("count", "world"), [(10, 4), (7, 3), (100, 8), (1000, 96)])
def test_equal_shards_differ_by_one_proxy_at_most(count, world):
    lengths = {len(block) for block in assign([50] * count, world)}
    assert lengths <= {count // world, -(-count // world)}


@pytest.mark.parametrize(("sizes", "world"), [([], 1), ([3, 0], 1), ([3], 0), ([3], 2)])
def test_nothing_to_assign(sizes, world):
    with pytest.raises(ValueError, match=r"must be between|at least one shard"):
        assign(sizes, world)
