"""One safetensors file for a nested state: dicts, lists and tuples of tensors and plain values."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from unrote.errors import InputError
from unrote.files import atomic_path

_SKELETON = "unrote.state"


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


def state_to_bytes(state: Any) -> bytes:
    """What :func:`save_state` would write, to be sent to another process."""
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(state, "", tensors)
    _unshare_(tensors)
    content: bytes = save(tensors, metadata={_SKELETON: json.dumps(skeleton)})
    return content


def state_from_bytes(content: bytes) -> Any:
    """The state that :func:`state_to_bytes` was given, tensors on the CPU."""
    # The reader of whole files in memory hands back tensors only; the header is JSON after its length in 8 bytes.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return _unflatten(json.loads(header["__metadata__"][_SKELETON]), load(content).__getitem__)


def weights_hash(*models: Any) -> str:
    """Hex SHA-256 over the models' tensors, of each in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in (row for model in models for row in sorted(model.state_dict().items())):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def clone_state(state: Any) -> Any:
    """A copy of a nested state whose tensors lie on the CPU and are shared with nothing."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: clone_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(clone_state(value) for value in state)
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
    """``Σ_k w_k s_k`` over nested states of equal structure, accumulated in float64.

    Floating-point tensors are averaged and keep their type; everything else is the first state's.

    Args:
        states: an iterable of K states; only one is held at a time.
        weights: K weights that sum to 1.
    """
    first: Any = None
    sums: list[Tensor] = []
    for state, weight in zip(states, weights, strict=True):
        leaves = [leaf for leaf in _leaves(state) if leaf.is_floating_point()]
        if first is None:
            first = clone_state(state)
            sums = [_weighted(leaf, weight) for leaf in leaves]
        else:
            for total, leaf in zip(sums, leaves, strict=True):
                total += _weighted(leaf, weight)
    averaged = [leaf for leaf in _leaves(first) if leaf.is_floating_point()]
    for leaf, total in zip(averaged, sums, strict=True):
        leaf.copy_(total)
    return first


def _weighted(leaf: Tensor, weight: float) -> Tensor:
    # In place: a second tensor of float64 costs more time than the arithmetic.
    return leaf.to(torch.float64, copy=True).mul_(weight)


def _leaves(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [leaf for child in children for leaf in _leaves(child)]
