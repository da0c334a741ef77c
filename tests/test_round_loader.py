"""A round as one stream of batches: equal to the shards one by one, safe against every way to use it wrongly."""

import gc
import logging
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from sharing import members_found
from unrote import Ledger, LossGate, Redistribution, ShardEnsemble, augment_near_threshold
from unrote.tensorfiles import Stored, clone_state

N, T, K = 14, 5, 3
DATA = torch.linspace(-1, 1, N * 4).view(N, 4)


def parts(**options):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    gate = LossGate(T, 0.9)
    return model, optimizer, gate, ShardEnsemble(model, optimizer, DATA, K, gate=gate, **options)


def train_on(batch, index, model, optimizer, gate):
    loss = (model(batch) - batch).square().mean(1)
    gate(loss, index % T, None if gate.ledger is None else index).backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model):
    return clone_state(model.state_dict())


def assert_equal(found, expected):
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("redistribution", [None, Redistribution()])
def test_a_pass_is_a_round_of_the_shards_one_by_one(redistribution):
    model, optimizer, gate, ensemble = parts(redistribution=redistribution)
    other, other_optimizer, other_gate, explicit = parts(redistribution=redistribution)
    loader = ensemble.loader(lambda shard: DataLoader(shard, 2))
    for _ in range(3):
        size = len(loader)
        assert size == sum(1 for batch in loader if train_on(batch, loader.index, model, optimizer, gate) is None)
        for shard in explicit.round():
            for batch, index in DataLoader(shard, 2):
                train_on(batch, index, other, other_optimizer, other_gate)
        assert_equal(weights(model), weights(other))
        assert_equal(gate.bank.state_dict(), other_gate.bank.state_dict())
        assert all(torch.equal(one, two) for one, two in zip(ensemble.shards, explicit.shards, strict=True))
    if redistribution is not None:
        assert_equal(gate.ledger.state_dict(), other_gate.ledger.state_dict())
        assert gate.ledger.moves.sum() > 0


def test_several_passes_over_each_shard_and_workers():
    model, optimizer, gate, ensemble = parts()
    loader = ensemble.loader(lambda shard: DataLoader(shard, 2, num_workers=1), epochs=2)
    seen = []
    for batch in loader:
        assert torch.equal(batch, DATA[loader.index])
        seen += loader.index.tolist()
        train_on(batch, loader.index, model, optimizer, gate)
    assert sorted(seen) == sorted(2 * list(range(N)))


def test_left_early_the_model_is_as_the_round_began(caplog):
    model, optimizer, gate, ensemble = parts()
    loader = ensemble.loader(lambda shard: DataLoader(shard, 2))
    for batch in loader:
        train_on(batch, loader.index, model, optimizer, gate)
    before = weights(model)
    with caplog.at_level(logging.WARNING, "unrote"):
        for number, batch in enumerate(loader):
            train_on(batch, loader.index, model, optimizer, gate)
            if number == 4:
                break
        gc.collect()
    assert_equal(weights(model), before)
    assert "round 2 was left 3 batches before its end" in caplog.text
    for batch in loader:  # and on it goes
        train_on(batch, loader.index, model, optimizer, gate)
    assert ensemble.round_index == 2


@pytest.mark.parametrize("end", ["break", "finish"])
def test_left_at_its_last_batch_a_round_is_whole(end, caplog):
    model, optimizer, gate, ensemble = parts()
    loader = ensemble.loader(lambda shard: DataLoader(shard, 2))
    batches = iter(loader) if end == "finish" else None
    for number, batch in enumerate(batches or loader, 1):
        train_on(batch, loader.index, model, optimizer, gate)
        if number == len(loader):
            break
    loader.finish()
    assert ensemble.round_index == 1
    assert_equal(weights(model), ensemble.slots.get("global")["model"].whole())
    assert not caplog.text


def test_an_error_in_the_loop_restores_too():
    model, optimizer, gate, ensemble = parts()
    before = weights(model)

    def loop():
        for batch in ensemble.loader(lambda shard: DataLoader(shard, 2)):
            train_on(batch, torch.arange(len(batch)), model, optimizer, gate)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        loop()
    gc.collect()
    assert_equal(weights(model), before)


def test_a_loop_that_fetches_ahead_is_refused():
    model, optimizer, gate, ensemble = parts()
    loader = ensemble.loader(lambda shard: DataLoader(shard, 2))
    batches = iter(loader)
    waiting = next(batches)
    with pytest.raises(ValueError, match=r"2 of 3 batches of proxy 0 .* fetches batches ahead"):
        for following in batches:
            train_on(waiting, torch.zeros(len(waiting), dtype=torch.int64), model, optimizer, gate)
            waiting = following


def test_loaders_that_are_none():
    *_, ensemble = parts()
    with pytest.raises(ValueError, match="a new DataLoader of the shard it is given, not a list"):
        ensemble.loader(lambda shard: [shard[0]])
    same = DataLoader(DATA, 2)
    with pytest.raises(ValueError, match="new DataLoader"):
        ensemble.loader(lambda shard: same)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        ensemble.loader(lambda shard: DataLoader(shard, 2), epochs=0)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class DeepSpeedOptimizerWrapper(torch.optim.Adam):
    """What accelerate calls its own, which needs DeepSpeed to be made."""


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_weights_in_parts_are_refused(process_group):
    model = nn.Linear(4, 4)
    fsdp1 = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    fsdp2 = nn.Sequential(fully_shard(nn.Linear(4, 4), mesh=process_group))
    for wrapped, optimizer, named in [
        (fsdp1, torch.optim.Adam(fsdp1.parameters()), "FullyShardedDataParallel"),
        (fsdp2, torch.optim.Adam(fsdp2.parameters()), "FSDPModule"),
        (model, DeepSpeedOptimizerWrapper(model.parameters()), "DeepSpeedOptimizerWrapper"),
    ]:
        with pytest.raises(ValueError, match=f"{named}.*gate alone"):
            ShardEnsemble(wrapped, optimizer, DATA, K)
    ensemble = ShardEnsemble(model, torch.optim.Adam(model.parameters()), DATA, K)
    fully_shard(model, mesh=process_group)
    with pytest.raises(ValueError, match="FSDPModule"):
        next(ensemble.round())


def sharded_twice(module, mesh):
    fully_shard(module, mesh=mesh)


def flattened(module, mesh, **options):
    FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("wrap", [sharded_twice, flattened, partial(flattened, use_orig_params=True)])
def test_weights_in_parts_are_seen_where_something_around_the_model_holds_them(process_group, wrap):
    """As Lightning wraps a module that holds the model, and a Trainer the model whose adapters are trained."""
    model = nn.Linear(4, 4)
    ensemble = ShardEnsemble(model, torch.optim.Adam(model.parameters()), DATA, K)
    wrap(nn.Sequential(model), process_group)
    with pytest.raises(ValueError, match=r"a FullyShardedDataParallel.*gate alone"):
        next(ensemble.round())


def test_an_optimizer_of_more_than_the_model_is_refused():
    model, other = nn.Linear(4, 4), nn.Linear(4, 2)
    both = nn.ModuleList([model, other])
    optimizer = torch.optim.Adam(both.parameters())
    with pytest.raises(ValueError, match="also trains 2 parameters that are not the model's"):
        ShardEnsemble(model, optimizer, DATA, K)
    ShardEnsemble(both, optimizer, DATA, K)


def test_workers_that_outlive_a_pass_are_refused():
    *_, ensemble = parts()
    with pytest.raises(ValueError, match="persistent_workers"):
        ensemble.loader(lambda shard: DataLoader(shard, 2, num_workers=1, persistent_workers=True))


def test_gradients_do_not_go_from_proxy_to_proxy():
    """A loop that steps at every second batch, on shards of 3, 3 and 2: as if the odd ones had never been."""
    model, optimizer, gate, ensemble = parts()
    other, other_optimizer, other_gate, explicit = parts()
    loader = ensemble.loader(lambda shard: DataLoader(shard, 2))
    for number, batch in enumerate(loader, 1):
        gate((model(batch) - batch).square().mean(1), loader.index % T).backward()
        if number % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    number = 0
    for shard in explicit.round():
        other_optimizer.zero_grad()
        for batch, index in DataLoader(shard, 2):
            other_gate((other(batch) - batch).square().mean(1), index % T).backward()
            number += 1
            if number % 2 == 0:
                other_optimizer.step()
                other_optimizer.zero_grad()
    assert_equal(weights(model), weights(other))
    assert all(parameter.grad is None for parameter in model.parameters())


def shared_batches(rank, port, out):
    """In one of two processes: refused without a sampler; with one, which samples each epoch's batches had."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    *_, gate, ensemble = parts()
    with pytest.raises(ValueError, match="each of the 2 processes would be given all batches"):
        next(iter(ensemble.loader(lambda shard: DataLoader(shard, 2))))
    *_, gate, ensemble = parts()
    loader = ensemble.loader(lambda shard: DataLoader(shard, 2, sampler=DistributedSampler(shard)), epochs=2)
    seen = []
    for batch in loader:
        gate(batch.mean(1).requires_grad_(), loader.index % T)
        seen += loader.index.tolist()
    torch.save(seen, out / f"{rank}.pt")
    dist.destroy_process_group()


def test_processes_that_share_batches_have_their_share(tmp_path):
    first, second = members_found(shared_batches, tmp_path, 2)
    # Shards of 5, 5 and 4: of an odd one a sample is seen by both.
    assert len(first) == len(second) == 2 * (3 + 3 + 2)
    assert set(first) | set(second) == set(range(N))
    assert first[:3] != first[3:6]


def test_an_average_of_somebody_else_stays_on_its_device():
    old = {"shadow": [torch.empty(2, device="meta")], "step": 3, "decay": torch.ones(1)}
    found = Stored.of({"shadow": [torch.ones(2)], "step": 4, "decay": torch.zeros(1)}).into(old)
    assert found["shadow"][0].device.type == "meta"
    assert found["step"] == 4
    assert torch.equal(found["decay"], torch.zeros(1))


def test_augment_near_threshold():
    gate = LossGate(T, 0.5, ledger=Ledger(4))
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    index = torch.arange(4)
    assert torch.equal(augment_near_threshold(gate, images, index), images), "nothing is known yet"
    t = torch.zeros(4, dtype=torch.int64)
    gate(torch.ones(4), t, index)
    for _ in range(20):
        gate(torch.tensor([1.0, 1.0, 1.0, 0.1]), t, index)
    torch.manual_seed(0)
    views = augment_near_threshold(gate, images, index, shift=0.5)
    same = [torch.equal(view, image) for view, image in zip(views, images, strict=True)]
    ratio = gate.ledger.running_ratio_of(index)
    assert same == (ratio >= 0.75).tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match=r"pixels in \[-1, 1\]"):
        augment_near_threshold(gate, images * 2, index)
    with pytest.raises(ValueError, match=r"float \[B, C, H, W\]"):
        augment_near_threshold(gate, images[0], index)
    for wrong in (LossGate(T, 0.5), LossGate(T, 0.0, ledger=Ledger(4))):
        with pytest.raises(ValueError, match="give the gate a skip_ratio and ledger"):
            augment_near_threshold(wrong, images, index)
