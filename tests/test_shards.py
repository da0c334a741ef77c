"""Shards are a partition whatever happens to them; who moves and who stays; the order in which a shard is visited."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unrote.method.shards import SampleStream, redistribute, split_shards


def assert_partition(shards, num_samples):
    assert sorted(index for shard in shards for index in shard.tolist()) == list(range(num_samples))
    for shard in shards:
        assert shard.dtype == torch.int64
        assert shard.tolist() == sorted(shard.tolist())


@st.composite
def splits(draw):
    num_samples = draw(st.integers(1, 60))
    num_shards = draw(st.integers(1, min(num_samples, 9)))
    split = draw(st.sampled_from(["iid", "stratified", "contiguous"]))
    labels = torch.tensor(draw(st.lists(st.integers(0, 4), min_size=num_samples, max_size=num_samples)))
    return num_samples, num_shards, split, labels, draw(st.integers(0, 2**31))


@settings(deadline=None)
@given(splits())
def test_every_split_is_a_partition_into_nearly_equal_parts(case):
    num_samples, num_shards, split, labels, seed = case
    shards = split_shards(num_samples, num_shards, split, seed=seed, labels=labels)
    assert len(shards) == num_shards
    assert_partition(shards, num_samples)
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    if split == "stratified":
        for label in range(5):
            counts = [int((labels[shard] == label).sum()) for shard in shards]
            assert max(counts) - min(counts) <= 1


def as_lists(shards):
    return [shard.tolist() for shard in shards]


def test_contiguous_keeps_the_order_and_the_others_go_by_the_seed():
    assert as_lists(split_shards(7, 3, "contiguous")) == [[0, 1, 2], [3, 4], [5, 6]]
    labels = torch.arange(40) % 3
    for split in ("iid", "stratified"):
        again = [as_lists(split_shards(40, 4, split, seed=seed, labels=labels)) for seed in (0, 0, 1)]
        assert again[0] == again[1] != again[2]
        assert again[0] != as_lists(split_shards(40, 4, "contiguous"))


@pytest.mark.parametrize(
    ("num_samples", "num_shards", "split"), [(3, 4, "iid"), (3, 0, "iid"), (0, 1, "iid"), (9, 3, "stratified")]
)
def test_impossible_splits_are_refused(num_samples, num_shards, split):
    with pytest.raises(ValueError, match=r"num_shards must be|needs a label"):
        split_shards(num_samples, num_shards, split)


def home_of(shards):
    return {index: k for k, shard in enumerate(shards) for index in shard.tolist()}


@settings(deadline=None, max_examples=60)
@given(
    case=splits(),
    fraction=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]),
    topology=st.sampled_from(["ring", "shuffled-ring"]),
    draws=st.lists(st.tuples(st.integers(0, 2**31), st.sampled_from([1, 2, 5])), min_size=1, max_size=12),
)
def test_a_long_sequence_of_redistributions(case, fraction, topology, draws):
    num_samples, num_shards, split, labels, seed = case
    shards = split_shards(num_samples, num_shards, split, seed=seed, labels=labels)
    sizes = [len(shard) for shard in shards]
    skips = torch.zeros(num_samples, dtype=torch.int64)
    for turn, (draw, most) in enumerate(draws):
        skips += torch.randint(most, (num_samples,), generator=torch.Generator().manual_seed(draw))
        before = home_of(shards)
        old = [shard.clone() for shard in shards]
        new, moved = redistribute(shards, skips, fraction=fraction, topology=topology, seed=seed, turn=turn)

        assert_partition(new, num_samples)
        assert [len(shard) for shard in new] == sizes
        assert as_lists(shards) == as_lists(old), "the given shards are not changed"
        after = home_of(new)
        changed = [index for index in range(num_samples) if before[index] != after[index]]
        assert moved.tolist() == (changed if num_shards > 1 else [])
        # Everybody's samples go to one other shard, and these steps form one ring through all shards.
        step = {before[index]: after[index] for index in changed}
        assert all(step[before[index]] == after[index] for index in changed)
        if changed:
            shard, ring = 0, []
            while shard not in ring:
                ring.append(shard)
                shard = step[shard]
            assert len(ring) == num_shards
            if topology == "ring":
                assert ring == list(range(num_shards))
        # As many as every shard can give; the most skipped go; the never skipped stay.
        can = [min(int(fraction * len(shard)), int((skips[shard] > 0).sum())) for shard in old]
        for shard in old:
            gone = [index for index in shard.tolist() if index in set(changed)]
            stay = [index for index in shard.tolist() if index not in set(changed)]
            assert len(gone) == (min(can) if num_shards > 1 else 0)
            assert all(skips[index] > 0 for index in gone)
            if gone and stay:
                assert min(skips[gone]) >= max(skips[stay])
        skips[moved] = 0
        shards = new


def test_the_example_worked_by_hand():
    shards = [torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5, 6, 7]), torch.tensor([8, 9, 10, 11])]
    skips = torch.tensor([0, 9, 1, 8, 5, 4, 3, 2, 0, 0, 7, 6])
    new, moved = redistribute(shards, skips, fraction=0.5)
    assert as_lists(new) == [[0, 2, 10, 11], [1, 3, 6, 7], [4, 5, 8, 9]]
    assert moved.tolist() == [1, 3, 4, 5, 10, 11]


def test_ties_do_not_go_by_index():
    """Of equally skipped samples each must be as likely to move as any other, over the turns."""
    shards, skips = [torch.arange(20), torch.arange(20, 40)], torch.ones(40, dtype=torch.int64)
    counts = torch.zeros(40)
    turns = 400
    for turn in range(turns):
        counts[redistribute(shards, skips, fraction=0.25, seed=3, turn=turn)[1]] += 1
    expected, deviation = turns * 0.25, (turns * 0.25 * 0.75) ** 0.5
    assert (counts - expected).abs().max() < 4.5 * deviation


def test_a_redistribution_is_a_function_of_seed_and_turn():
    shards, skips = split_shards(30, 3), torch.ones(30, dtype=torch.int64)

    def moved(seed, turn):
        return redistribute(shards, skips, fraction=0.5, topology="shuffled-ring", seed=seed, turn=turn)[1].tolist()

    assert moved(0, 0) == moved(0, 0)
    assert len({tuple(moved(*key)) for key in [(0, 0), (0, 1), (1, 0)]}) == 3


def test_shuffled_ring_is_drawn_anew_each_turn():
    shards, skips = split_shards(20, 5, "contiguous"), torch.ones(20, dtype=torch.int64)
    takers = set()
    for turn in range(60):
        new, _ = redistribute(shards, skips, fraction=1.0, topology="shuffled-ring", turn=turn)
        takers.add(home_of(new)[0])
    assert takers == {1, 2, 3, 4}


@settings(deadline=None)
@given(
    size=st.integers(1, 23),
    counts=st.lists(st.integers(1, 31), min_size=1, max_size=20),
    seed=st.integers(0, 9),
    proxy=st.integers(0, 3),
)
def test_a_stream_visits_each_sample_once_an_epoch_however_it_is_cut(size, counts, seed, proxy):
    shard = torch.randperm(100, generator=torch.Generator().manual_seed(size))[:size].sort().values
    stream, position, seen = SampleStream(seed, proxy), 0, []
    for count in counts:
        batch = stream.take(shard, position, count)
        assert len(batch) == count
        seen += batch.tolist()
        position += count
    assert seen == SampleStream(seed, proxy).take(shard, 0, position).tolist()
    for start in range(0, position - size + 1, size):
        assert sorted(seen[start : start + size]) == shard.tolist()
    middle = position // 2
    assert (
        SampleStream(seed, proxy).take(shard, middle, position - middle or 1).tolist()[: position - middle]
        == (seen[middle:])
    ), "a function of the position, not of what was taken before"


def test_streams_differ_between_epochs_proxies_and_seeds():
    shard = torch.arange(50)
    orders = [
        SampleStream(seed, proxy).take(shard, 50 * epoch, 50).tolist()
        for seed, proxy, epoch in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_a_stream_follows_a_shard_that_is_redistributed():
    stream, before, after = SampleStream(0, 0), torch.arange(0, 10), torch.arange(5, 15)
    assert sorted(stream.take(before, 0, 10).tolist()) == before.tolist()
    assert sorted(stream.take(after, 10, 10).tolist()) == after.tolist()
