"""Which rank trains which proxies: all of them, in order, and as evenly as can be."""

import random
from itertools import combinations, product

import pytest

from unrote.method.assignment import assign, sharing, teams_of


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


@pytest.mark.parametrize("seed", range(4))
def test_more_ranks_than_proxies_form_teams_of_which_none_has_more_to_do_than_need_be(seed):
    draw = random.Random(seed)
    for _ in range(20):
        sizes = [draw.randint(1, 20) for _ in range(draw.randint(1, 4))]
        world = draw.randint(len(sizes) + 1, 8)
        blocks = assign(sizes, world)
        assert len(blocks) == world and all(len(block) == 1 for block in blocks)
        members = [len(team) for team in teams_of(blocks)]
        assert [k for k, count in enumerate(members) for _ in range(count)] == [block.start for block in blocks]
        ways = (way for way in product(range(1, world + 1), repeat=len(sizes)) if sum(way) == world)
        least = min(max(size / count for size, count in zip(sizes, way, strict=True)) for way in ways)
        assert max(size / count for size, count in zip(sizes, members, strict=True)) == least


def test_who_shares_is_said():
    assert sharing(assign([9, 9, 8], 3)) == ""
    assert sharing(assign([9, 9, 8], 5)) == "ranks 0-1 share proxy 0; ranks 2-3 share proxy 1"
    assert teams_of(assign([9, 9, 8], 2)) == [range(0, 1), range(1, 2)]


@pytest.mark.parametrize(("sizes", "world"), [([], 1), ([3, 0], 1), ([3], 0)])
def test_nothing_to_assign(sizes, world):
    with pytest.raises(ValueError, match=r"must be at least|at least one shard"):
        assign(sizes, world)
