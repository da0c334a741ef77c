"""Which rank trains which proxies: contiguous blocks in order of k, so that they can be averaged rank after rank."""

from collections.abc import Sequence
from itertools import accumulate


def assign(sizes: Sequence[int], world: int) -> list[range]:
    """Assign proxies 0..K-1 to ranks, balanced by how many samples each has to train on.

    Every rank gets a contiguous block, the blocks follow one another in the order of k, and no assignment of that kind
    has a smaller largest rank.

    >>> assign([25, 25, 25, 25], 3)
    [range(0, 1), range(1, 3), range(3, 4)]

    Args:
        sizes: samples in each of the K shards, each at least 1.
        world: W, the number of ranks, 1..K.

    Returns:
        The proxies of each rank; W ranges, none empty.

    Raises:
        ValueError: if there is no shard or an empty one, no rank, or more ranks than shards.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError("there must be at least one shard, and none may be empty")
    if not 1 <= world <= len(sizes):
        raise ValueError(f"world must be between 1 and the number of shards, {len(sizes)}, not {world}")
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
