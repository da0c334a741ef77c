"""Weights, gradients and moments of which each rank of a team holds a part, by FSDP2 (``torch.distributed.fsdp``).

What is averaged over the proxies, written or sampled from is whole, and gathered tensor by tensor for that; only the
first of a team has it then. So files are the same, and can be gone on from with any number of processes.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from unrote.method.slots import Slots
from unrote.models.adapters import Adapters
from unrote.models.denoiser import blocks_of
from unrote.models.task import Task
from unrote.tensorfiles import Form, Stored, described, join_in, part_like, whole
from unrote.training.ema import EMA
from unrote.training.team import Parted, Team
from unrote.training.transport import broadcast


def hold(task: Task, team: Team, device: torch.device) -> None:
    """Bring the denoiser to the device: the whole of it or, where the team is to hold it so, this member's part."""
    if team.mesh is not None:
        # Each block's weights are gathered, and let go again, by themselves.
        for part in (*blocks_of(task.denoiser), task.denoiser):
            # The root too: who judges without learning would keep weights that are no longer those of the proxy.
            fully_shard(part, mesh=team.mesh, reshard_after_forward=True)
        task.trained = Adapters(task.denoiser) if isinstance(task.trained, Adapters) else task.denoiser
    task.denoiser.to(device)


def load_in_parts(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer take the whole moments of weights of which it has parts."""

    def parted(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        moments = {
            number: {name: _like(value, weights[number]) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        return state | {"state": moments}

    optimizer.register_load_state_dict_pre_hook(parted)


def _like(value: Any, weight: Tensor) -> Any:
    is_whole = isinstance(value, Tensor) and value.shape == weight.shape and not hasattr(value, "device_mesh")
    return part_like(value, weight) if is_whole and hasattr(weight, "device_mesh") else value


class WholeModel:
    """The model as it is written and sampled from.

    Args:
        task: the model in training.
        ema: its averaged weights, if there are any.

    Attributes:
        first: whether this process has the whole weights; the others only join in.
    """

    first = True

    def __init__(self, task: Task, ema: EMA | None) -> None:
        self.task, self.ema = task, ema

    @contextmanager
    def weights(self, *, averaged: bool = True, sampled: bool = False) -> Iterator[None]:
        """``task.denoiser`` has the whole weights, ``averaged`` if there are such, in :attr:`first` inside the block.

        All members of its team must enter at once. Gathered weights are on the device if they are ``sampled`` from.
        """
        with self.ema.applied() if averaged and self.ema is not None else nullcontext():
            yield


class GatheredModel(WholeModel):
    """A model of which each member of a team holds a part.

    Made before :func:`hold`: it keeps the structure of the network without weights.
    """

    def __init__(self, task: Task, team: Parted, device: torch.device) -> None:
        super().__init__(task, None)
        self.first, self._device = team.leads, device
        bare = {id(p): nn.Parameter(p.detach().to("meta"), False) for p in task.denoiser.parameters()}
        self._bare: Any = copy.deepcopy(task.denoiser, bare) if self.first else None

    @contextmanager
    def weights(self, *, averaged: bool = True, sampled: bool = False) -> Iterator[None]:
        """See :meth:`WholeModel.weights`."""
        found, device = {}, self._device if sampled else torch.device("cpu")
        with super().weights(averaged=averaged), torch.no_grad():
            for name, tensor in self.task.denoiser.state_dict().items():
                gathered = whole(tensor)
                if self.first:
                    found[name] = gathered.to(device, copy=True)
        if not self.first:
            yield
            return
        own = self.task.denoiser
        self._bare.load_state_dict(found, assign=True)
        self.task.denoiser = self._bare.to(device)
        try:
            yield
        finally:
            self.task.denoiser = own
            self._bare.load_state_dict({name: t.to("meta") for name, t in found.items()}, assign=True)


def whole_model(task: Task, team: Team, device: torch.device, *, first: bool) -> WholeModel | None:
    """What the ``first`` process of a run writes and samples from, and others have a part of; None in all others."""
    if isinstance(team, Parted):
        return GatheredModel(task, team, device) if team.first == 0 else None
    return WholeModel(task, None) if first else None


class TeamSlots:
    """What the first of a team keeps, in every member: all put and get at once, and exchange tensor by tensor.

    Args:
        slots: of the first; None in the others.
        team: of this process.
    """

    def __init__(self, slots: Slots | None, team: Parted) -> None:
        self._slots, self._team = slots, team
        self._names: set[str] = set()

    def put(self, name: str, state: dict[str, Any]) -> None:
        """See :meth:`unrote.method.slots.Slots.put`."""
        with self._team.named("gathering the weights of a proxy"):
            if self._slots is None:
                join_in(state)
            else:
                self._slots.put(name, state)
        self._names.add(name)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def get(self, name: str, parts: Sequence[str] | None = None) -> Stored:
        """See :meth:`unrote.method.slots.Slots.get`; all read at once, from the first tensor to the last."""
        own = None if self._slots is None else self._slots.get(name, parts)
        with self._team.named("handing out the weights of a proxy"):
            skeleton, forms = self._told(own)

        def read(names: Sequence[str]) -> dict[str, Tensor]:
            tensors = None if own is None else own.read(names)
            with self._team.named("handing out the weights of a proxy"):
                return broadcast(tensors, {name: forms[name] for name in names}, self._team.first, self._team.group)

        return Stored(skeleton, forms, read)

    def _told(self, stored: Stored | None) -> tuple[Any, Mapping[str, Form]]:
        """What the first one's state consists of."""
        text = bytearray() if stored is None else bytearray(stored.description().encode())
        size = torch.tensor([len(text)])
        dist.broadcast(size, self._team.first, self._team.group)
        content = torch.frombuffer(text or bytearray(int(size)), dtype=torch.uint8)
        dist.broadcast(content, self._team.first, self._team.group)
        return described(content.numpy().tobytes().decode())

    def drop(self, name: str) -> None:
        """See :meth:`unrote.method.slots.Slots.drop`."""
        if self._slots is not None:
            self._slots.drop(name)
        self._names.discard(name)

    def fetch(self, name: str, path: Path) -> None:
        """See :meth:`unrote.method.slots.Slots.fetch`."""
        if self._slots is not None:
            self._slots.fetch(name, path)
        self._names.add(name)
