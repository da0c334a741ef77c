"""IET, iterative ensemble training, with MSR between half-rounds (arXiv 2407.15328 §3.1; arXiv 2502.09434)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from unrote.method.gate import LossGate
from unrote.method.ledger import Ledger
from unrote.method.loader import RoundLoader, Shard
from unrote.method.outer import OuterOptimizer
from unrote.method.parts import Groups, Moments, Stateful, check_parameters, drop_gradients, put_back, take
from unrote.method.peers import Alone, Average, Peers
from unrote.method.shards import Split, Topology, redistribute, split_shards
from unrote.method.slots import FolderSlots, MemorySlots, Slots
from unrote.tensorfiles import clone_state, weighted_average

OptimizerState = Literal["per-proxy", "reset", "average"]
COMMON = ("global", "initial", "velocity")
"""States that belong to all proxies."""


@dataclass(frozen=True)
class Redistribution:
    """MSR: see :func:`unrote.method.shards.redistribute`; ``every`` is how many rounds lie between two."""

    fraction: float = 0.25
    topology: Topology = "ring"
    every: int = 1


class ShardEnsemble:
    """Trains K proxies in turn in one model and averages them: ``θ̄ ← Σ_k (|D_k|/N) θ_k``.

    The model, optimizer and data set stay the caller's. While a shard is being iterated, its proxy is live in
    ``model``; when :meth:`round` ends, ``model`` is the aggregate. Each proxy keeps its optimizer state, its memory
    bank and whatever is in ``kept`` across rounds; with ``folder`` only one proxy's state is in memory.

    With ``redistribution`` a round is two half-rounds, and :meth:`round` yields every proxy twice: train half the local
    epochs each time.

    >>> import torch
    >>> model = torch.nn.Linear(2, 2)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> ensemble = ShardEnsemble(model, optimizer, torch.randn(10, 2), num_shards=3)
    >>> [(shard.proxy, len(shard)) for shard in ensemble.round()]
    [(0, 4), (1, 3), (2, 3)]

    Args:
        model: the module to train.
        optimizer: over parameters of ``model``.
        dataset: a map-style data set; only its length is used here.
        num_shards: K; 1 is ordinary training.
        gate: bank and adaptive λ become per-proxy; its ledger tells redistribution what was skipped.
        ema: the moving average of the weights, averaged as the weights are.
        kept: further per-proxy state, e.g. ``{"lr_scheduler": scheduler}``.
        split: see :func:`unrote.method.shards.split_shards`.
        labels: int64 [N], for the stratified split.
        left_out: int64 [M], positions that are in no shard.
        optimizer_state: ``per-proxy`` keeps it, ``reset`` starts each round afresh, ``average`` averages the moments.
        redistribution: MSR; needs a gate, which is given a ledger if it has none.
        seed: of the split and of the redistribution.
        outer: how far a round moves the aggregate of the weights; by default to the proxies' average. Moving averages
            (``ema``) and moments are averaged as they are.
        folder: keep proxies that are not live in files there, not in memory.
        average: of the proxies' tensors under weights that sum to 1, instead of the mean of every number; called for
            some of them at a time, see :data:`unrote.method.peers.Average`.
        peers: the processes among which the proxies are dealt out. The result does not depend on how many they are.

    Raises:
        ValueError: if the optimizer holds no parameter of the model, or others too; either is of a kind that holds
            weights in parts (FSDP, DeepSpeed); redistribution has no gate to go by; or the ledger is for another number
            of samples.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: Any,
        num_shards: int,
        *,
        gate: LossGate | None = None,
        ema: Stateful | None = None,
        kept: Mapping[str, Stateful] | None = None,
        split: Split = "iid",
        labels: Tensor | None = None,
        left_out: Tensor | None = None,
        optimizer_state: OptimizerState = "per-proxy",
        redistribution: Redistribution | None = None,
        outer: OuterOptimizer | None = None,
        seed: int = 0,
        folder: Path | None = None,
        average: Average = weighted_average,
        peers: Peers | None = None,
    ) -> None:
        self._peers = peers or Alone()
        if not self._peers.parted:
            check_parameters(model, optimizer)
        if gate is not None and gate.ledger is not None and gate.ledger.num_samples != len(dataset):
            raise ValueError(f"the ledger is for {gate.ledger.num_samples} samples, the data set has {len(dataset)}")
        self.dataset = dataset
        self.num_shards = num_shards
        self.shards = split_shards(len(dataset), num_shards, split, seed=seed, labels=labels, left_out=left_out)
        self.round_index = 0
        self.phase = 0
        self.proxy = 0
        self._turns = 0
        self._live = False
        self._ended: set[int] = set()
        self._rows: dict[str, Tensor] = {}
        self._mine = self._peers.mine([len(shard) for shard in self.shards])
        # Of processes that share a proxy one holds it, and answers for it; the others have it in memory.
        self._held = self._mine if self._peers.leads else range(0)
        self.gate = gate
        self._model, self._optimizer = model, optimizer
        self._shared_batches = False
        self.redistribution = redistribution
        self._optimizer_state = optimizer_state
        self._outer = outer
        self._seed = seed
        self._average = average
        self._averaged: dict[str, Stateful] = {"model": model} | ({} if ema is None else {"ema": ema})
        self._kept: dict[str, Stateful] = dict(kept or {}) | ({} if gate is None else gate.of_proxy())
        self._moments = Moments(optimizer)
        if optimizer_state == "average":
            self._averaged["moments"], self._kept["groups"] = self._moments, Groups(optimizer)
        else:
            self._kept["optimizer"] = optimizer
        names = [f"{kind}-{k}" for kind in ("proxy", "live") for k in self._held]
        names += COMMON if self._peers.rank == 0 else []
        self._files = MemorySlots() if folder is None else FolderSlots(folder, names)
        self._slots = self._peers.shared(self._files if self._held else MemorySlots())
        # What belongs to all is kept by the first process; the others have it in memory.
        self._common = self._peers.shared(self._files if self._peers.rank == 0 else MemorySlots())
        if num_shards > 1:
            self._common.put("global", take(self._averaged))
            self._common.put("initial", take(self._kept))

    @property
    def redistribution(self) -> Redistribution | None:
        """MSR, or None. Setting it, between rounds, gives the gate a ledger if it has none.

        Raises:
            ValueError: when set, if there is no gate to go by.
        """
        return self._redistribution

    @redistribution.setter
    def redistribution(self, value: Redistribution | None) -> None:
        if value is not None and self.gate is None:
            raise ValueError("redistribution goes by skip counts: pass gate=LossGate(...)")
        if value is not None and self.gate is not None and self.gate.ledger is None:
            self.gate.ledger = Ledger(len(self.dataset))
        self._redistribution = value

    @property
    def num_phases(self) -> int:
        """Parts of the current round: 2 half-rounds where samples are redistributed between them, else 1."""
        msr = self._redistribution
        return 2 if msr is not None and self.num_shards > 1 and self.round_index % msr.every == 0 else 1

    @property
    def part(self) -> float:
        """How much of the round is over when its current part is, in (0, 1]."""
        return (self.phase + 1) / self.num_phases

    @property
    def mine(self) -> range:
        """The proxies that this process trains."""
        return self._mine

    @property
    def live(self) -> int | None:
        """The proxy that is having its turn, None between turns."""
        return self.proxy if self._live else None

    @property
    def slots(self) -> MemorySlots | FolderSlots:
        """Where this process keeps the proxies that it holds while they are not live."""
        return self._files

    def round(self) -> Iterator[Shard]:
        """Yield each of this process's proxies' shards while that proxy is live, then redistribute or aggregate.

        Leaving early restores the model to the aggregate that the round began with; the shards stay a partition.

        Raises:
            ValueError: if the model has been wrapped since by what holds weights in parts, or has others.
        """
        if not self._peers.parted:
            check_parameters(self._model, self._optimizer)
        complete = False
        try:
            while self.phase < self.num_phases:
                for k in (k for k in self._mine if k not in self._ended):
                    self.proxy = k
                    if not self._live:
                        self._activate()
                    # After the last one's turn comes the first one's, or the average, which begins with it.
                    self._slots.expect(f"proxy-{k + 1 if k + 1 in self._mine else self._mine.start}")
                    yield Shard(self.dataset, k, self.shards[k])
                    self._retire()
                self._peers.wait()
                self._share_ledger()
                self._ended, self.proxy, self.phase = set(), 0, self.phase + 1
                if self.phase < self.num_phases:
                    self._redistribute()
            self._aggregate()
            complete = True
        finally:
            if not complete:
                self._abandon()

    def rewind(self) -> None:
        """Put the live proxy, and its samples in the ledger, back to where they were when its turn began.

        Its turn begins with the round or, where samples have been redistributed since, with the half-round.
        """
        assert self._live and self.num_shards > 1
        self._slots.drop(f"live-{self.proxy}")
        if self.gate is not None and self.gate.ledger is not None:
            self.gate.ledger.put_rows(self.shards[self.proxy], self._rows)
        self._activate()

    def loader(self, make: Callable[[Dataset[Any]], Any], epochs: int = 1) -> RoundLoader:
        """What a training loop iterates in place of its data loader: each pass is a round, see :class:`RoundLoader`.

        Where several processes share the batches (DistributedDataParallel), skips are summed over them before samples
        are redistributed, so that all have the same shards.

        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> model = torch.nn.Linear(2, 2)
        >>> ensemble = ShardEnsemble(model, torch.optim.AdamW(model.parameters()), torch.randn(10, 2), num_shards=2)
        >>> batches = ensemble.loader(lambda shard: DataLoader(shard, batch_size=3))
        >>> [len(batch) for batch in batches], len(batches), ensemble.round_index
        ([3, 2, 3, 2], 4, 1)

        Args:
            make: from a shard to a ``DataLoader`` of it; called once for each proxy.
            epochs: passes over a shard before the next proxy's turn.
        """
        self._shared_batches = True
        return RoundLoader(self, make, epochs)

    def _activate(self) -> None:
        """Make proxy k live: θ̄ at the start of a round, its own weights in a second half-round or amid its turn."""
        name = f"live-{self.proxy}"
        if self.num_shards > 1 and name in self._slots:
            begun = self._slots.get(name)
            put_back(self._averaged | self._kept, begun)
            self._rows = begun["rows"].whole()
            if not self._held and not self._peers.parted:
                self._slots.drop(name)  # it was for going on, and takes memory
        else:
            self._begin()
        self._live = True

    def _begin(self) -> None:
        if self.num_shards > 1:
            name = f"proxy-{self.proxy}"
            if self.phase == 0:
                own = name in self._slots
                put_back(self._kept, self._slots.get(name) if own else self._common.get("initial"))
                put_back(self._averaged, self._common.get("global"))
            else:
                put_back(self._averaged | self._kept, self._slots.get(name))
        if self.phase == 0 and self._optimizer_state == "reset":
            self._moments.load_state_dict({})
        if self.gate is not None and self.gate.ledger is not None:
            self._rows = self.gate.ledger.rows(self.shards[self.proxy])

    def _retire(self) -> None:
        if self.num_shards > 1:
            # Of an accumulation that the loop did not complete: the next proxy must not step by it.
            drop_gradients(self._optimizer)
            self._slots.put(f"proxy-{self.proxy}", take(self._averaged | self._kept))
            self._slots.drop(f"live-{self.proxy}")
        self._live = False
        self._ended.add(self.proxy)

    def _share_ledger(self) -> None:
        if self.gate is not None and self.gate.ledger is not None:
            own = [torch.empty(0, dtype=torch.int64), *(self.shards[k] for k in self._held)]
            self.gate.ledger.share(torch.cat(own), self._peers.sum)

    def _redistribute(self) -> None:
        assert self._redistribution is not None and self.gate is not None and self.gate.ledger is not None
        msr, ledger = self._redistribution, self.gate.ledger
        self.shards, moved = redistribute(
            self.shards,
            self._summed(ledger.skips_since_move),
            fraction=msr.fraction,
            topology=msr.topology,
            seed=self._seed,
            turn=self._turns,
        )
        ledger.moved(moved)
        self._turns += 1

    def _summed(self, counts: Tensor) -> Tensor:
        """Counts of all processes, where they share each proxy's batches."""
        if self._shared_batches and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            counts = counts.clone()
            dist.all_reduce(counts)
        return counts

    def _aggregate(self) -> None:
        """``θ̄ ← Σ_k (|D_k|/N) θ_k``, accumulated in float64 in the order of k."""
        if self.num_shards > 1:
            parts = list(self._averaged)
            proxies = [self._slots.get(f"proxy-{k}", parts) for k in self._mine]
            sizes = [len(shard) for shard in self.shards]
            weights = [size / sum(sizes) for size in sizes]
            with self._peers.working("averaging the proxies"):
                put_back(self._averaged, self._peers.average(proxies, weights, self._average))
            if self._outer is not None:
                self._step_out(self._outer)
            self._common.put("global", take(self._averaged))
        self.round_index, self.phase, self.proxy = self.round_index + 1, 0, 0

    def _step_out(self, outer: OuterOptimizer) -> None:
        start, average = self._common.get("global")["model"].whole(), clone_state(self._model.state_dict())
        velocity = self._common.get("velocity").whole() if "velocity" in self._common else {}
        moved, velocity = outer.step(start, average, velocity)
        self._common.put("velocity", velocity)
        self._model.load_state_dict(moved)

    def _abandon(self) -> None:
        # What is held in parts is put back by all members at once, and one that fails is alone with it.
        if self.num_shards > 1 and not self._peers.parted:
            drop_gradients(self._optimizer)
            put_back(self._averaged, self._common.get("global"))
        self.phase, self.proxy, self._live, self._ended = 0, 0, False, set()

    def state_dict(self) -> dict[str, Any]:
        """Position in the round, shards, and the proxies that are not live (the live one is the caller's model)."""
        return self._position() | {"slots": self._files.state_dict()}

    def _position(self) -> dict[str, Any]:
        position = {"round": self.round_index, "phase": self.phase, "proxy": self.proxy, "turns": self._turns}
        return position | {"live": self._live, "shards": list(self.shards)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: if it is of another number of shards.
        """
        if len(state["shards"]) != self.num_shards:
            raise ValueError(f"the state has {len(state['shards'])} shards, this ensemble {self.num_shards}")
        self.round_index, self.phase, self.proxy = state["round"], state["phase"], state["proxy"]
        self._turns, self._live = state["turns"], state["live"]
        self.shards = [shard.clone() for shard in state["shards"]]
        self._ended = set(range(self.proxy))
        self._files.load_state_dict(state["slots"])

    def save(self) -> dict[str, Any]:
        """The state of all processes' proxies, complete by itself: live ones are put into files too.

        Every process must ask for it at once. Needs ``folder``. The ledger of each process then is that of all.
        """
        holds = self._held or self._peers.parted
        if holds and (self._live or self.num_shards == 1):
            self._slots.put(f"live-{self.proxy}", take(self._averaged | self._kept) | {"rows": self._rows})
        self._share_ledger()
        own = {"ended": sorted(self._ended), "slots": self._files.state_dict()}
        everyone = self._peers.gather(own)
        slots = {name: file for one in everyone for name, file in one["slots"]["files"].items()}
        version = max(one["slots"]["version"] for one in everyone)
        ended = sorted({k for one in everyone for k in one["ended"]})
        return self._position() | {"ended": ended, "slots": {"files": slots, "version": version}}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`save` gave, of any number of processes; ``model`` and all else then are as they were."""
        self.load_state_dict(state)
        self._ended = set(state["ended"])
        self._fetch(self._common, COMMON, state)
        self._fetch(self._slots, [f"{kind}-{k}" for kind in ("proxy", "live") for k in self._mine], state)
        if self.num_shards == 1:
            live = self._slots.get("live-0")
            put_back(self._averaged | self._kept, live)
            self._rows = live["rows"].whole()
            return
        self._live = False
        put_back(self._averaged, self._common.get("global"))

    def _fetch(self, slots: Slots, names: Iterable[str], state: dict[str, Any]) -> None:
        """Have what is in files of all processes."""
        assert isinstance(self._files, FolderSlots)
        for name in (name for name in names if name in state["slots"]["files"]):
            slots.fetch(name, self._files.folder / state["slots"]["files"][name])
