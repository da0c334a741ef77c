"""One safetensors file for a nested state: dicts, lists and tuples of tensors and plain values."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unrote.errors import InputError
from unrote.files import atomic_path

_SKELETON = "unrote.state"
MESSAGE = 1 << 28
"""The most bytes that are sent at once."""
SMALL = 1 << 20
"""Tensors are sent together up to so many bytes: a message costs a round trip, copying them next to nothing."""


def save_state(path: Path, state: Any, *, durable: bool = True) -> None:
    """Write ``state`` atomically.

    Args:
        path: the ``.safetensors`` file.
        state: nested dicts (keys: str or int), lists and tuples of tensors, numbers, strings, bools and None.
        durable: see :func:`unrote.files.atomic_path`.

    Raises:
        TypeError: for a leaf of another type.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(state, "", tensors)
    _unshare_(tensors)
    with atomic_path(path, durable=durable) as temporary:
        save_file(tensors, temporary, metadata={_SKELETON: json.dumps(skeleton)})


def load_state(path: Path, parts: Sequence[str] | None = None) -> Any:
    """Read what :func:`save_state` wrote, tensors on the CPU; of a dict, only the entries ``parts`` if given.

    Raises:
        OSError: if there is no such file.
        InputError: if it is not whole or not ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            skeleton = json.loads(file.metadata()[_SKELETON])
            if parts is not None:
                skeleton = {"dict": [[key, value] for key, value in skeleton["dict"] if key in parts]}
            return _unflatten(skeleton, file.get_tensor)
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: is no state that unrote wrote, or is damaged ({reason})") from None


def messages_of(state: Any) -> Iterator[Tensor]:
    """``state`` as uint8 tensors to be sent one after another; large ones lie in the state's own memory."""
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(state, "", tensors)
    forms = {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()}
    description = torch.frombuffer(bytearray(json.dumps([skeleton, forms]).encode()), dtype=torch.uint8)
    yield torch.tensor([len(description)]).view(torch.uint8)
    yield description
    for group in _grouped(tensors.values()):
        content = torch.cat(group) if len(group) > 1 else group[0]
        yield from _parts(content)


def state_of_messages(receive: Callable[[Tensor], object]) -> Any:
    """The state that :func:`messages_of` was given, tensors on the CPU.

    Args:
        receive: fills a uint8 tensor with the next message; they come in order.
    """
    length = torch.zeros(8, dtype=torch.uint8)
    receive(length)
    description = torch.empty(int(length.view(torch.int64)), dtype=torch.uint8)
    receive(description)
    skeleton, forms = json.loads(description.numpy().tobytes())
    tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in forms.items()}
    for group in _grouped(tensors.values()):
        sizes = [len(content) for content in group]
        content = torch.empty(sum(sizes), dtype=torch.uint8) if len(group) > 1 else group[0]
        for part in _parts(content):
            receive(part)
        if len(group) > 1:
            for own, received in zip(group, torch.split(content, sizes), strict=True):
                own.copy_(received)
    return _unflatten(skeleton, tensors.__getitem__)


def _parts(content: Tensor) -> list[Tensor]:
    return [content[start : start + MESSAGE] for start in range(0, len(content), MESSAGE)]


def _grouped(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The bytes of contiguous CPU tensors, smallest first, those together that fit in one small message."""
    groups: list[list[Tensor]] = []
    room = 0
    for content in sorted((tensor.view(-1).view(torch.uint8) for tensor in tensors if tensor.numel()), key=len):
        room -= len(content)
        if room < 0:
            groups.append([])
            room = SMALL - len(content)
        groups[-1].append(content)
    return groups


def weights_hash(*models: Any) -> str:
    """Hex SHA-256 over the models' tensors, of each in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in (row for model in models for row in sorted(model.state_dict().items())):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def clone_state(state: Any) -> Any:
    """A copy of a nested state whose tensors lie on the CPU and are shared with nothing."""
    return _map_tensors(state, lambda tensor: tensor.detach().to("cpu", copy=True))


def _map_tensors(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a nested state with ``change`` applied to its tensors, in the order of :func:`_leaves`."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, dict):
        return {key: _map_tensors(value, change) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_map_tensors(value, change) for value in state)
    return state


def beside(old: Any, state: Any) -> Any:
    """``state`` with its tensors on the devices of those of ``old``, a state of the same structure."""
    if isinstance(old, Tensor) and isinstance(state, Tensor):
        return state.to(old.device)
    if isinstance(old, dict) and isinstance(state, dict):
        return {key: beside(old.get(key), value) for key, value in state.items()}
    if isinstance(old, list | tuple) and isinstance(state, list | tuple) and len(old) == len(state):
        return type(state)(beside(*pair) for pair in zip(old, state, strict=True))
    return state


def _flatten(state: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(state, Tensor):
        # The number keeps apart what a path can't: the keys 1 and "1", or "a/b" and a dict in a dict.
        unique = f"{len(tensors)}{name}"
        tensors[unique] = state.detach().contiguous()
        return {"channels_last" if _is_channels_last(state) else "tensor": unique}
    if isinstance(state, dict):
        # Pairs, since JSON would turn the whole-number keys of an optimizer's state into strings.
        return {"dict": [[key, _flatten(value, f"{name}/{key}", tensors)] for key, value in state.items()]}
    if isinstance(state, list | tuple):
        kind = "tuple" if isinstance(state, tuple) else "list"
        return {kind: [_flatten(value, f"{name}/{i}", tensors) for i, value in enumerate(state)]}
    if state is None or isinstance(state, bool | int | float | str):
        return {"value": state}
    raise TypeError(f"{name}: a state can't hold a {type(state).__name__}")


def _is_channels_last(tensor: Tensor) -> bool:
    # Fused optimizers walk through weights and moments side by side in memory, so both must come back as they lay.
    if tensor.ndim != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _unshare_(tensors: dict[str, Tensor]) -> None:
    """Copy tensors that lie in the memory of an earlier one, such as tied weights: safetensors refuses them."""
    seen = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:
            tensors[name] = tensor.clone()
        seen.add(storage)


def _unflatten(skeleton: dict[str, Any], get: Callable[[str], Tensor]) -> Any:
    ((kind, content),) = skeleton.items()
    match kind:
        case "tensor":
            return get(content)
        case "channels_last":
            return get(content).contiguous(memory_format=torch.channels_last)
        case "dict":
            return {key: _unflatten(value, get) for key, value in content}
        case "list":
            return [_unflatten(value, get) for value in content]
        case "tuple":
            return tuple(_unflatten(value, get) for value in content)
        case _:
            return content


def weighted_average(states: Any, weights: list[float]) -> Any:
    """``Σ_k w_k s_k`` over nested states of equal structure, accumulated in float64 in the order of the states.

    Floating-point tensors are averaged and keep their type; everything else is the first state's. Only one state is
    held at a time, beside the sums.

    Args:
        states: an iterable of K states on the CPU.
        weights: K weights that sum to 1.

    Raises:
        ValueError: there are more or fewer states than weights, or other tensors in one than in the first.
    """
    remaining, sums = iter(states), _Sums()
    for weight in weights:
        # Nothing holds a state while the next one is made, as zip would.
        sums.add(next(remaining, None), weight)
    if next(remaining, None) is not None:
        raise ValueError(f"there are more states than the {len(weights)} weights")
    return sums.rounded()


class _Sums:
    """A nested state of float64 sums."""

    def __init__(self) -> None:
        self._state: Any = None
        self._dtypes: list[torch.dtype] = []

    def add(self, state: Any, weight: float) -> None:
        """``sums += weight * state``."""
        if state is None:
            raise ValueError("there are fewer states than weights")
        if self._state is None:
            self._dtypes = [leaf.dtype for leaf in _leaves(state)]
            self._state = _map_tensors(state, lambda leaf: _weighted(leaf, weight))
            return
        for total, leaf in zip(_leaves(self._state), _leaves(state), strict=True):
            if total.is_floating_point():
                total += _weighted(leaf, weight)

    def rounded(self) -> Any:
        """The sums in the types that the states had."""
        dtypes = iter(self._dtypes)
        return _map_tensors(self._state, lambda total: total.to(next(dtypes)))


def _weighted(leaf: Tensor, weight: float) -> Tensor:
    # In place: a second tensor of float64 costs more time than the arithmetic.
    return leaf.detach().to(torch.float64, copy=True).mul_(weight) if leaf.is_floating_point() else leaf.clone()


def _leaves(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [leaf for child in children for leaf in _leaves(child)]
