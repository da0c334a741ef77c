"""ShardEnsemble against K explicit models, each with its own optimizer, moving average and bank: bit for bit equal."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from unrote.method.bank import LossBank
from unrote.method.ensemble import Redistribution, Shard, ShardEnsemble
from unrote.method.gate import LossGate
from unrote.method.ledger import Ledger
from unrote.method.shards import redistribute, split_shards
from unrote.tensorfiles import load_state, save_state
from unrote.training.ema import EMA

SAMPLES, SHARDS, TIMESTEPS, BATCH = 22, 3, 3, 7
DATA = torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(0))
MSR = Redistribution(fraction=0.5)


def make_model():
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 5))


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def make_schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))


@dataclasses.dataclass
class Trainer:
    """One model with everything that trains it: the whole of a user's program, but for the ensemble."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    ema: EMA
    gate: LossGate
    steps: int = 0

    @classmethod
    def make(cls, ledger):
        model = make_model()
        optimizer = make_optimizer(model)
        gate = LossGate(TIMESTEPS, 0.95, bank=LossBank(TIMESTEPS, warm_start=True), ledger=ledger)
        return cls(model, optimizer, make_schedule(optimizer), EMA(model, 0.9), gate)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]

    def step(self, indices, proxy):
        draw = torch.Generator().manual_seed(1000 * proxy + self.steps)
        noise = torch.randn(len(indices), 5, generator=draw)
        timesteps = torch.randint(TIMESTEPS, (len(indices),), generator=draw)
        prediction = self.model(DATA[indices] + noise)
        losses = F.mse_loss(prediction, noise, reduction="none").mean(1)
        self.gate(losses, timesteps, indices).backward()
        if self.gate.any_kept():
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.steps += 1
        self.ema.update(self.steps)


def batches_of(indices, turn):
    """Two visits of the shard, in an order that is a function of the turn."""
    draw = torch.Generator().manual_seed(turn)
    order = torch.cat([torch.randperm(len(indices), generator=draw) for _ in range(2)])
    return list(indices[order].split(BATCH))


# The reference: K models side by side, plain code.


def mean_of(states, weights):
    """Weighted mean of state dicts: fp64, in order; whole numbers are the first's."""
    result = {}
    for key, first in states[0].items():
        if first.is_floating_point():
            total = first.double() * weights[0]
            for state, weight in zip(states[1:], weights[1:], strict=True):
                total += state[key].double() * weight
            result[key] = total.to(first.dtype)
        else:
            result[key] = first.clone()
    return result


def explicit_ensemble(rounds, *, redistribution, optimizer_state):
    ledger = Ledger(SAMPLES)
    proxies = [Trainer.make(ledger) for _ in range(SHARDS)]
    shards = split_shards(SAMPLES, SHARDS, seed=5)
    weights = [len(shard) / SAMPLES for shard in shards]
    turn = 0
    for r in range(rounds):
        if optimizer_state == "reset":
            for proxy in proxies:
                proxy.optimizer.state.clear()
        halves = 2 if redistribution and r % redistribution.every == 0 else 1
        for half in range(halves):
            for k, proxy in enumerate(proxies):
                for batch in batches_of(shards[k], 10 * r + half):
                    proxy.step(batch, k)
            if half + 1 < halves:
                shards, moved = redistribute(
                    shards, ledger.skips_since_move, fraction=redistribution.fraction, seed=5, turn=turn
                )
                ledger.moved(moved)
                turn += 1
        model = mean_of([copy.deepcopy(proxy.model.state_dict()) for proxy in proxies], weights)
        ema = mean_of([copy.deepcopy(proxy.ema.state_dict()) for proxy in proxies], weights)
        for proxy in proxies:
            proxy.model.load_state_dict(model)
            proxy.ema.load_state_dict(ema)
        if optimizer_state == "average":
            parameters = [list(proxy.model.parameters()) for proxy in proxies]
            for same in zip(*parameters, strict=True):
                moments = [proxy.optimizer.state[p] for proxy, p in zip(proxies, same, strict=True)]
                mean = mean_of([copy.deepcopy(moment) for moment in moments], weights)
                for moment in moments:
                    for key, value in mean.items():
                        moment[key].copy_(value)
    return proxies, shards, ledger


def wrapped_ensemble(folder=None, *, redistribution, optimizer_state):
    ledger = Ledger(SAMPLES)
    trainer = Trainer.make(ledger)
    ensemble = ShardEnsemble(
        trainer.model,
        trainer.optimizer,
        TensorDataset(DATA),
        SHARDS,
        gate=trainer.gate,
        ema=trainer.ema,
        kept={"schedule": trainer.schedule, "steps": trainer},
        optimizer_state=optimizer_state,
        redistribution=redistribution,
        seed=5,
        folder=folder,
    )
    return trainer, ensemble


def assert_equal_state(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("optimizer_state", ["per-proxy", "reset", "average"])
@pytest.mark.parametrize("redistribution", [None, MSR, Redistribution(0.5, every=2)], ids=["iet", "msr", "msr-2"])
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_equals_k_explicit_models(where, redistribution, optimizer_state, tmp_path):
    options = {"redistribution": redistribution, "optimizer_state": optimizer_state}
    folder = tmp_path / "proxies" if where == "folder" else None
    trainer, ensemble = wrapped_ensemble(folder, **options)
    rounds = 4
    for r in range(rounds):
        for shard in ensemble.round():
            for batch in batches_of(shard.indices, 10 * r + ensemble.phase):
                trainer.step(batch, shard.proxy)
    proxies, shards, ledger = explicit_ensemble(rounds, **options)

    assert_equal_state(trainer.model.state_dict(), proxies[0].model.state_dict())
    assert_equal_state(trainer.ema.state_dict(), proxies[0].ema.state_dict())
    assert [shard.tolist() for shard in ensemble.shards] == [shard.tolist() for shard in shards]
    assert (ledger.skips > 0).any()
    assert (ledger.moves > 0).any() == (redistribution is not None)
    assert_equal_state(trainer.gate.ledger.state_dict(), ledger.state_dict())
    for k, proxy in enumerate(proxies):
        state = ensemble.slots.get(f"proxy-{k}").whole()
        assert_equal_state(state["bank"], proxy.gate.bank.state_dict())
        assert state["steps"] == {"steps": proxy.steps}
        assert state["schedule"]["last_epoch"] == proxy.schedule.last_epoch
        if optimizer_state != "average":
            moments = proxy.optimizer.state_dict()["state"]
            assert state["optimizer"]["state"].keys() == moments.keys()
            for parameter, moment in moments.items():
                assert_equal_state(state["optimizer"]["state"][parameter], moment)


@pytest.mark.parametrize("optimizer_state", ["per-proxy", "reset", "average"])
def test_learning_rate_goes_on_over_rounds_in_every_mode(optimizer_state):
    trainer, ensemble = wrapped_ensemble(redistribution=None, optimizer_state=optimizer_state)
    for _ in range(3):
        for shard in ensemble.round():
            for batch in batches_of(shard.indices, 0):
                assert trainer.optimizer.param_groups[0]["lr"] == trainer.schedule.get_last_lr()[0]
                trainer.step(batch, shard.proxy)


def test_one_shard_is_ordinary_training():
    ordinary, trainer = Trainer.make(Ledger(SAMPLES)), Trainer.make(Ledger(SAMPLES))
    ensemble = ShardEnsemble(
        trainer.model, trainer.optimizer, DATA, 1, gate=trainer.gate, ema=trainer.ema, redistribution=MSR
    )
    for r in range(3):
        for shard in ensemble.round():
            for batch in batches_of(shard.indices, r):
                trainer.step(batch, 0)
        for batch in batches_of(torch.arange(SAMPLES), r):
            ordinary.step(batch, 0)
    assert_equal_state(trainer.model.state_dict(), ordinary.model.state_dict())
    assert_equal_state(trainer.gate.ledger.state_dict(), ordinary.gate.ledger.state_dict())


@pytest.mark.parametrize("redistribution", [None, MSR])
def test_leaving_a_round_early_restores_the_aggregate(redistribution):
    trainer, ensemble = wrapped_ensemble(redistribution=redistribution, optimizer_state="per-proxy")

    def train(shard):
        for batch in batches_of(shard.indices, ensemble.phase):
            trainer.step(batch, shard.proxy)

    for shard in ensemble.round():
        train(shard)
    model, ema = copy.deepcopy(trainer.model.state_dict()), copy.deepcopy(trainer.ema.state_dict())
    last = SHARDS * ensemble.num_phases - 2
    for count, shard in enumerate(ensemble.round()):
        train(shard)
        if count == last:
            break
    assert_equal_state(trainer.model.state_dict(), model)
    assert_equal_state(trainer.ema.state_dict(), ema)
    assert sorted(torch.cat(ensemble.shards).tolist()) == list(range(SAMPLES))
    with pytest.raises(KeyError):
        for shard in ensemble.round():
            train(shard)
            raise KeyError
    assert_equal_state(trainer.model.state_dict(), model)
    seen = [(ensemble.round_index, ensemble.phase, shard.proxy) for shard in ensemble.round()]
    assert seen == [(1, phase, k) for phase in range(2 if redistribution else 1) for k in range(SHARDS)]
    assert ensemble.round_index == 2


def test_state_taken_amid_a_proxy_is_restored_in_new_objects(tmp_path):
    """Stopped after any batch, saved, loaded by a new process's objects and gone on with: as if undisturbed."""
    options = {"redistribution": MSR, "optimizer_state": "per-proxy"}
    rounds = 2

    def run(trainer, ensemble, stop_after=None, done=0):
        """Train to the end or to ``stop_after`` batches in all; ``done`` of the first shard are already done."""
        total = 0
        while ensemble.round_index < rounds:
            for shard in ensemble.round():
                for batch in batches_of(shard.indices, 10 * ensemble.round_index + ensemble.phase)[done:]:
                    trainer.step(batch, shard.proxy)
                    done, total = done + 1, total + 1
                    if total == stop_after:
                        save_state(path, parts_of(trainer, ensemble, done))
                        return
                done = 0

    def parts_of(trainer, ensemble, done):
        parts = {
            name: getattr(trainer, name).state_dict() for name in ("model", "optimizer", "schedule", "ema", "gate")
        }
        return parts | {"trainer": trainer.state_dict(), "ensemble": ensemble.state_dict(), "done": done}

    path = tmp_path / "state.safetensors"
    undisturbed, _ = wrapped = wrapped_ensemble(**options)
    run(*wrapped)
    for stop_after in (1, 3, 4, 8, 13, 14, 20, 27):
        for folder in (None, tmp_path / f"proxies-{stop_after}"):
            run(*wrapped_ensemble(folder, **options), stop_after=stop_after)
            state = load_state(path)
            trainer, ensemble = wrapped_ensemble(folder, **options)
            for name in ("model", "optimizer", "schedule", "ema", "gate"):
                getattr(trainer, name).load_state_dict(state[name])
            trainer.load_state_dict(state["trainer"])
            ensemble.load_state_dict(state["ensemble"])
            run(trainer, ensemble, done=state["done"])
            assert_equal_state(trainer.model.state_dict(), undisturbed.model.state_dict())
            assert_equal_state(trainer.ema.state_dict(), undisturbed.ema.state_dict())
            assert_equal_state(trainer.gate.ledger.state_dict(), undisturbed.gate.ledger.state_dict())


@pytest.mark.parametrize("split", ["iid", "stratified", "contiguous"])
def test_state_of_every_split_can_be_written(split, tmp_path):
    model = make_model()
    options = {"split": split, "labels": torch.arange(SAMPLES) % 2}
    ensemble = ShardEnsemble(model, make_optimizer(model), DATA, SHARDS, **options)
    save_state(tmp_path / "state.safetensors", ensemble.state_dict())
    other = ShardEnsemble(model, make_optimizer(model), DATA, SHARDS, seed=9, **options)
    other.load_state_dict(load_state(tmp_path / "state.safetensors"))
    assert [shard.tolist() for shard in other.shards] == [shard.tolist() for shard in ensemble.shards]


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_tied_weights_stay_tied(where, tmp_path):
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ensemble = ShardEnsemble(model, optimizer, DATA, 2, folder=tmp_path if where == "folder" else None)
    for shard in ensemble.round():
        model(DATA[shard.indices]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model[1].weight is model[0].weight


def test_in_somebody_elses_loop():
    """The loop of the documentation, with a loader, batches of dicts and workers' collation."""

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return SAMPLES

        def __getitem__(self, position):
            return {"pixels": DATA[position], "text": f"picture {position}"}

    torch.manual_seed(0)
    model = nn.Linear(5, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    gate = LossGate(num_timesteps=TIMESTEPS, skip_ratio=0.5, ledger=Ledger(SAMPLES))
    ensemble = ShardEnsemble(model, optimizer, Pictures(), num_shards=4, gate=gate, redistribution=Redistribution())
    for _ in range(2):
        for shard in ensemble.round():
            for batch in DataLoader(shard, 3, shuffle=True):
                noise, t = torch.randn(len(batch["index"]), 5), torch.randint(TIMESTEPS, (len(batch["index"]),))
                assert batch["text"] == [f"picture {index}" for index in batch["index"].tolist()]
                per_sample = F.mse_loss(model(batch["pixels"] + noise), noise, reduction="none").mean(1)
                gate(per_sample, t, batch["index"]).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert gate.ledger.visits.sum() == 2 * 2 * SAMPLES


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ([(10, "a"), (20, "b"), (30, "c")], (30, "c", 2)),
        ([[10], [20], [30]], (30, 2)),
        ([10, 20, 30], (30, 2)),
        ([{"x": 1}, {"x": 2}, {"x": 3}], {"x": 3, "index": 2}),
    ],
)
def test_a_shard_adds_the_position_in_the_data_set(dataset, expected):
    shard = Shard(dataset, 0, torch.tensor([0, 2]))
    assert len(shard) == 2
    assert shard[1] == expected


def test_wrong_use_is_refused():
    model, other = make_model(), make_model()
    with pytest.raises(ValueError, match=r"model\.parameters"):
        ShardEnsemble(model, make_optimizer(other), DATA, 2)
    with pytest.raises(ValueError, match="skip counts"):
        ShardEnsemble(model, make_optimizer(model), DATA, 2, redistribution=MSR)
    with pytest.raises(ValueError, match="ledger"):
        ShardEnsemble(model, make_optimizer(model), DATA, 2, gate=LossGate(TIMESTEPS, ledger=Ledger(SAMPLES - 1)))
    with pytest.raises(ValueError, match="num_shards"):
        ShardEnsemble(model, make_optimizer(model), DATA, SAMPLES + 1)
    state = ShardEnsemble(model, make_optimizer(model), DATA, 2).state_dict()
    with pytest.raises(ValueError, match="2 shards, this ensemble 3"):
        ShardEnsemble(model, make_optimizer(model), DATA, 3).load_state_dict(state)


def test_a_folder_keeps_only_current_and_pinned_files(tmp_path):
    _, ensemble = wrapped_ensemble(tmp_path, redistribution=None, optimizer_state="per-proxy")
    for _ in ensemble.round():
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ensemble.slots.files()
    pinned = ensemble.slots.files()
    ensemble.slots.pin(pinned)
    for _ in ensemble.round():
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*pinned, *ensemble.slots.files()}
    assert not set(pinned) & {name for name in ensemble.slots.files() if name.startswith("proxy")}
    ensemble.slots.pin([])
    assert sorted(path.name for path in tmp_path.iterdir()) == ensemble.slots.files()


def test_files_a_checkpoint_names_outlive_a_second_interruption(tmp_path):
    """Resumed and killed again before the next checkpoint: what the first one names must still be there, unchanged."""
    _, ensemble = wrapped_ensemble(tmp_path, redistribution=None, optimizer_state="per-proxy")
    for _ in range(2):
        for _ in ensemble.round():
            pass
    state, names = ensemble.state_dict(), ensemble.slots.files()
    content = {name: (tmp_path / name).read_bytes() for name in names}
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Linear(5, 5) if seed else make_model()
        resumed = ShardEnsemble(model, make_optimizer(model), DATA, SHARDS, folder=tmp_path)
        assert {name: (tmp_path / name).read_bytes() for name in names} == content, "by merely being built"
        resumed.load_state_dict(state)
        if not seed:
            for name in ("proxy-0", "global"):
                resumed.slots.put(name, {"changed": True})
            assert {name: (tmp_path / name).read_bytes() for name in names} == content
