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


def drop_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Forget what was accumulated. Not by ``zero_grad``, which accelerate's optimizers put off amid an accumulation."""
    for parameter in _parameters(optimizer):
        parameter.grad = None


def check_parameters(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse models and optimizers between which something can't be swapped and averaged, or is not.

    Raises:
        ValueError: if one of them holds a part of the weights only (FSDP, DeepSpeed), so that there is no whole state;
            or if the optimizer trains none of the model's parameters, or others too.
    """
    kinds = {kind.__name__ for part in model.modules() for kind in type(part).__mro__}
    split = sorted(kinds & {"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"})
    split += [name for name in (kind.__name__ for kind in type(optimizer).__mro__) if name.startswith("DeepSpeed")]
    # What is wrapped may be around the model, and then is seen in its weights only.
    split += [name for p in (*model.parameters(), *_parameters(optimizer)) if (name := _part_of(p))]
    if split:
        raise ValueError(
            f"ShardEnsemble can't swap and average the weights of a {split[0]}, which holds a part of them in each "
            "process: use DistributedDataParallel, or one process, or the gate alone (LossGate works under both)"
        )
    own, trained = ({id(p) for p in some} for some in (model.parameters(), _parameters(optimizer)))
    if not trained & own:
        raise ValueError(
            "the optimizer holds no parameter of this model: build it from model.parameters(). If it was, a "
            "FullyShardedDataParallel around the model has taken them away: use the gate alone under it"
        )
    if trained - own:
        raise ValueError(
            f"the optimizer also trains {len(trained - own)} parameters that are not the model's, and so would go from "
            "proxy to proxy without being averaged: pass a model that holds them all, such as a torch.nn.ModuleList"
        )


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _part_of(weight: torch.Tensor) -> str | None:
    if any(hasattr(weight, name) for name in ("device_mesh", "_is_flat_param", "_fsdp_flattened")):
        return "FullyShardedDataParallel"
    return "DeepSpeedEngine" if hasattr(weight, "ds_id") else None
