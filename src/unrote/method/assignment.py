"""Which rank trains which proxies: contiguous blocks in order of k, so that they can be averaged rank after rank.

With more ranks than proxies it is the ranks that are dealt out: consecutive ones are the team of one proxy.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise


def assign(sizes: Sequence[int], world: int) -> list[range]:
    """Assign proxies 0..K-1 to ranks, balanced by how many samples each has to train on.

    Every rank gets a contiguous block, the blocks follow one another in the order of k, and no assignment of that kind
    has a smaller largest rank. With W > K several ranks have the same proxy, and share each of its batches.

    >>> assign([25, 25, 25, 25], 3)
    [range(0, 1), range(1, 3), range(3, 4)]
    >>> assign([50, 25], 3)
    [range(0, 1), range(0, 1), range(1, 2)]

    Args:
        sizes: samples in each of the K shards, each at least 1.
        world: W, the number of ranks, at least 1.

    Returns:
        The proxies of each rank; W ranges, none empty.

    Raises:
        ValueError: if there is no shard or an empty one, or no rank.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError("there must be at least one shard, and none may be empty")
    if world < 1:
        raise ValueError(f"world must be at least 1, not {world}")
    return _blocks(sizes, world) if world <= len(sizes) else _teams(sizes, world)


def teams_of(blocks: Sequence[range]) -> list[range]:
    """The ranks that have the same proxies, for each block of proxies; the first of them leads.

    >>> teams_of([range(0, 1), range(0, 1), range(1, 2)])
    [range(0, 2), range(2, 3)]
    """
    firsts = [rank for rank, block in enumerate(blocks) if rank == 0 or blocks[rank - 1] != block]
    return [range(first, end) for first, end in pairwise([*firsts, len(blocks)])]


def sharing(blocks: Sequence[range]) -> str:
    """Which ranks share a proxy, and which one; empty if none do.

    >>> sharing(assign([50, 25], 3))
    'ranks 0-1 share proxy 0'
    """
    several = [team for team in teams_of(blocks) if len(team) > 1]
    return "; ".join(f"ranks {team[0]}-{team[-1]} share proxy {blocks[team[0]][0]}" for team in several)


def _teams(sizes: Sequence[int], world: int) -> list[range]:
    """One rank for each proxy, and each further one where most samples fall to a rank: the fewest that can be."""
    members = [1] * len(sizes)
    for _ in range(world - len(sizes)):
        members[max(range(len(sizes)), key=lambda k: Fraction(sizes[k], members[k]))] += 1
    return [range(k, k + 1) for k, count in enumerate(members) for _ in range(count)]


def _blocks(sizes: Sequence[int], world: int) -> list[range]:
    count = len(sizes)
    capacity, enough = max(sizes), sum(sizes)
    while capacity < enough:
        middle = (capacity + enough) // 2
        if _fewest_blocks(sizes, middle)[0] <= world:
            enough = middle
        else:
            capacity = middle + 1
    fewest, before = _fewest_blocks(sizes, capacity), [0, *accumulate(sizes)]
    blocks, first = [], 0
    for ranks_left in range(world, 0, -1):
        fair = (before[count] - before[first]) / ranks_left
        # Where a block may end: it fits, and what is left fits the ranks that are left and leaves none of them idle.
        ends = [
            end
            for end in range(first + 1, count - ranks_left + 2)
            if before[end] - before[first] <= capacity and fewest[end] <= ranks_left - 1
        ]
        end = min(ends, key=lambda end: (abs(before[end] - before[first] - fair), -end))
        blocks.append(range(first, end))
        first = end
    return blocks


def _fewest_blocks(sizes: Sequence[int], capacity: int) -> list[int]:
    """How many blocks of at most ``capacity`` the proxies from each k on need; the last entry, for none, is 0."""
    fewest, end, held = [0] * (len(sizes) + 1), len(sizes), 0
    for first in range(len(sizes) - 1, -1, -1):
        held += sizes[first]
        while held > capacity:
            end -= 1
            held -= sizes[end]
        fewest[first] = 1 + fewest[end]
    return fewest
