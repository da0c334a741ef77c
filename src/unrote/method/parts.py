"""What a proxy consists of: parts whose state can be taken and put back, tensor by tensor."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from unrote.tensorfiles import Stored


class Stateful(Protocol):
    """Anything whose state can be taken and put back."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Put the state back."""


class Moments:
    """An optimizer's moments without its learning rates, which go on with each proxy's schedule."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """By number of the parameter."""
        return self._optimizer.state_dict()["state"]  # type: ignore[no-any-return]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back beside what else there is."""
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": state})


class Groups:
    """An optimizer's learning rates and other settings without its moments."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The groups."""
        return {"param_groups": self._optimizer.state_dict()["param_groups"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back beside what else there is."""
        self._optimizer.load_state_dict(self._optimizer.state_dict() | state)


def take(parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """Their states, in their own memory."""
    return {name: part.state_dict() for name, part in parts.items()}


def put_back(parts: Mapping[str, Stateful], states: Stored) -> None:
    """Put states back into their memory, as they are read: no state is whole beside the one that it replaces."""
    for name, part in parts.items():
        part.load_state_dict(states[name].into(part.state_dict()))


def check_whole(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse models and optimizers that hold a part of the weights only: there is no whole state to swap or average."""
    kinds = {kind.__name__ for part in model.modules() for kind in type(part).__mro__}
    split = sorted(kinds & {"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"})
    split += [name for name in (kind.__name__ for kind in type(optimizer).__mro__) if name.startswith("DeepSpeed")]
    if split:
        raise ValueError(
            f"ShardEnsemble can't swap and average the weights of a {split[0]}, which holds a part of them in each "
            "process: use DistributedDataParallel, or one process, or the gate alone (LossGate works under both)"
        )
