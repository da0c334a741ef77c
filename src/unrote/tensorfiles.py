"""One safetensors file for a nested state: dicts, lists and tuples of tensors and plain values.

States are read and averaged in bundles of tensors, so that none need be whole in memory beside the live one.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from unrote.errors import InputError
from unrote.files import atomic_path

_SKELETON = "unrote.state"
SMALL = 1 << 20
"""Tensors are read, averaged and sent together up to so many bytes: each time costs a round trip."""

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Form = tuple[torch.dtype, torch.Size]


@dataclass(frozen=True)
class Stored:
    """A nested state that lies somewhere and is read in bundles of tensors.

    Attributes:
        skeleton: its structure in terms of JSON, with plain values and the names of tensors.
        forms: type and shape of each tensor by name, in the order in which a file has them.
        read: from names to these tensors, contiguous on the CPU and shared with nothing.
    """

    skeleton: Any
    forms: Mapping[str, Form]
    read: Callable[[Sequence[str]], dict[str, Tensor]]

    @staticmethod
    def of(state: Any) -> "Stored":
        """What lies in memory."""
        skeleton, tensors = _taken_apart(state)
        forms = {name: _form(tensor) for name, tensor in tensors.items()}
        return Stored(skeleton, forms, lambda names: {name: _copied(tensors[name]) for name in names})

    @staticmethod
    def at(path: Path) -> "Stored":
        """What :func:`save_state` wrote; reading fails if the file is gone by then.

        Not by safetensors, which maps the file, so that what was read of it stays in memory with the mapping.

        Raises:
            OSError: if there is no such file.
            InputError: if it is not whole or not ours.
        """
        try:
            skeleton, found = _header(path)
            forms = _chosen({name: form for name, (_, form) in found.items()}, skeleton)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: is no state that unrote wrote, or is damaged ({reason})") from None

        def read(names: Sequence[str]) -> dict[str, Tensor]:
            with path.open("rb") as file:
                return {name: _read(file, *found[name]) for name in names}

        return Stored(skeleton, forms, read)

    def parts(self, names: Sequence[str]) -> "Stored":
        """Of a dict, only the entries ``names``."""
        if "dict" not in self.skeleton:
            raise InputError("a state has no parts, or is damaged")
        return self._under({"dict": [[key, value] for key, value in self.skeleton["dict"] if key in names]})

    def __getitem__(self, name: str) -> "Stored":
        """Of a dict, the value of one entry."""
        return self._under(dict(self.skeleton["dict"])[name])

    def _under(self, skeleton: Any) -> "Stored":
        return replace(self, skeleton=skeleton, forms=_chosen(self.forms, skeleton))

    def description(self) -> str:
        """All but the tensors' content, as JSON; see :func:`described`."""
        return json.dumps([self.skeleton, [(n, _NAMES[dtype], shape) for n, (dtype, shape) in self.forms.items()]])

    def digest(self) -> str:
        """Hex SHA-256 of all but the tensors' content."""
        return hashlib.sha256(self.description().encode()).hexdigest()

    def bundles(self) -> list[list[str]]:
        """Names of tensors that are read at once, in order: those that are small; the two factors of an adapter."""
        found: list[list[str]] = []
        room, before = -1, None
        for name, (dtype, shape) in self.forms.items():
            room -= dtype.itemsize * shape.numel()
            owner = name.partition("/lora_")[0]
            if room < 0 and owner != before:
                found.append([])
                room = SMALL - dtype.itemsize * shape.numel()
            found[-1].append(name)
            before = owner
        return found

    @torch.no_grad()
    def into(self, live: Any) -> Any:
        """The state; where ``live`` has a tensor of the same form, that tensor, overwritten."""
        places: dict[str, tuple[Any, bool]] = {}
        _unflatten(self.skeleton, live, lambda name, *place: places.update({name: place}))
        done: dict[str, Tensor] = {}
        for names in self.bundles():
            found = self.read(names)
            done |= {name: _placed(found.pop(name), *places[name]) for name in names}
        return _unflatten(self.skeleton, live, lambda name, *_: done[name])

    def whole(self) -> Any:
        """The state, tensors on the CPU."""
        return self.into(None)


def save_state(path: Path, state: Any, *, durable: bool = True) -> str:
    """Write ``state`` atomically.

    Args:
        path: the ``.safetensors`` file.
        state: nested dicts (keys: str or int), lists and tuples of tensors, numbers, strings, bools and None.
        durable: see :func:`unrote.files.atomic_path`.

    Returns:
        Hex SHA-256 of what the file should consist of, whatever becomes of it on the disk.

    Raises:
        TypeError: for a leaf of another type.
    """
    skeleton, tensors = _taken_apart(state)
    header: dict[str, Any] = {"__metadata__": {_SKELETON: json.dumps(skeleton)}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    digest = hashlib.sha256()
    with atomic_path(path, durable=durable) as temporary, temporary.open("wb") as file:

        def write(part: Any) -> None:
            digest.update(part)
            file.write(part)

        write(len(content).to_bytes(8, "little") + content)
        for tensor in tensors.values():
            # One at a time: safetensors' own writer has them all on the CPU and contiguous at once.
            write(bytes_of(whole(tensor).cpu().contiguous()).numpy().data)
    return digest.hexdigest()


def load_state(path: Path, parts: Sequence[str] | None = None) -> Any:
    """Read what :func:`save_state` wrote, tensors on the CPU; of a dict, only the entries ``parts`` if given.

    Raises:
        OSError: if there is no such file.
        InputError: if it is not whole or not ours.
    """
    stored = Stored.at(path)
    return (stored if parts is None else stored.parts(parts)).whole()


def weights_hash(*models: Any) -> str:
    """Hex SHA-256 over the models' tensors, of each in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in (row for model in models for row in sorted(model.state_dict().items())):
        digest.update(name.encode())
        digest.update(bytes_of(tensor.detach().cpu().contiguous()).numpy().data)
    return digest.hexdigest()


def clone_state(state: Any) -> Any:
    """A copy of a nested state whose tensors lie on the CPU and are shared with nothing."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: clone_state(value) for key, value in state.items()}
    return type(state)(map(clone_state, state)) if isinstance(state, list | tuple) else state


def _header(path: Path) -> tuple[Any, dict[str, tuple[int, Form]]]:
    """The structure of the state in a file, and by name where its tensors begin and what they are."""
    length = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > length:
            raise ValueError("it is too short")
        header = json.loads(file.read(start - 8))
    skeleton, found = json.loads(header.pop("__metadata__")[_SKELETON]), {}
    for name, entry in header.items():
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if end > length - start:
            raise ValueError("it is too short")
        if any(type(n) is not int or n < 0 for n in (*shape, begin)) or end - begin != dtype.itemsize * prod(shape):
            raise ValueError("sizes do not match")
        found[name] = start + begin, (dtype, torch.Size(shape))
    return skeleton, found


def described(description: str) -> tuple[Any, dict[str, Form]]:
    """Skeleton and forms by what :meth:`Stored.description` gave."""
    skeleton, forms = json.loads(description)
    return skeleton, {name: (_DTYPES[dtype], torch.Size(shape)) for name, dtype, shape in forms}


def whole(tensor: Tensor) -> Tensor:
    """Of a ``DTensor``, of which each process of a group holds a part, the whole, which all must ask for at once."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Of a ``DTensor`` what is here, in its own memory; of any other tensor all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def join_in(state: Any) -> None:
    """Give one's parts of a nested state to another process that keeps the whole, by a file or in memory."""
    for tensor in _taken_apart(state)[1].values():
        whole(tensor)


def part_like(tensor: Tensor, live: Any) -> Tensor:
    """A ``DTensor`` laid out as ``live`` with this process's part of ``tensor``, which all processes have whole."""
    from torch.distributed.tensor import distribute_tensor  # takes long to import, and few need it

    return distribute_tensor(tensor, live.device_mesh, live.placements, src_data_rank=None)


def _form(tensor: Tensor) -> Form:
    return tensor.dtype, tensor.shape


def _copied(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    return copy.copy_(whole(tensor))


def _read(file: BinaryIO, begin: int, form: Form) -> Tensor:
    tensor = torch.empty(form[1], dtype=form[0])
    file.seek(begin)
    if file.readinto(bytes_of(tensor).numpy()) != tensor.nbytes:  # type: ignore[attr-defined]
        raise InputError(f"{file.name}: has become shorter")
    return tensor


def bytes_of(tensor: Tensor) -> Tensor:
    """uint8 [n], a contiguous tensor's own memory."""
    return tensor.view(-1).view(torch.uint8)


def _taken_apart(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """The structure of a state, and its tensors: large numbers first, so that each lies at a multiple of its size.

    All that gives parts of tensors away or gathers them goes by this order.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(state, "", tensors)
    return skeleton, dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))


def _flatten(state: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(state, Tensor):
        # The number keeps apart what a path can't: the keys 1 and "1", or "a/b" and a dict in a dict.
        unique = name if name and name not in tensors else f"{len(tensors)}{name}"
        tensors[unique] = state.detach()
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


def _chosen(forms: Mapping[str, Form], skeleton: Any) -> dict[str, Form]:
    """Of ``forms`` those that the skeleton names, in their order. Raises KeyError if one is missing."""
    names: set[str] = set()
    _unflatten(skeleton, None, lambda name, *_: names.add(name))
    if missing := names - forms.keys():
        raise KeyError(min(missing))
    return {name: form for name, form in forms.items() if name in names}


def _unflatten(skeleton: dict[str, Any], live: Any, leaf: Callable[[str, Any, bool], Any]) -> Any:
    """What the skeleton describes; ``leaf`` gives a tensor by its name, what ``live`` has there, and how it lies."""
    ((kind, content),) = skeleton.items()
    match kind:
        case "tensor" | "channels_last":
            return leaf(content, live, kind == "channels_last")
        case "dict":
            old = live if isinstance(live, dict) else {}
            return {key: _unflatten(value, old.get(key), leaf) for key, value in content}
        case "list" | "tuple":
            olds = live if isinstance(live, list | tuple) and len(live) == len(content) else [None] * len(content)
            values = [_unflatten(value, old, leaf) for value, old in zip(content, olds, strict=True)]
            return values if kind == "list" else tuple(values)
        case _:
            return content


def _placed(tensor: Tensor, live: Any, channels_last: bool) -> Tensor:
    """``tensor`` in the memory of ``live`` if that has its form, or else on its device."""
    if not isinstance(live, Tensor):
        return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor
    if _form(tensor) == _form(live) and _is_channels_last(live) == channels_last:
        if (mine := own_part(live)) is not live:
            mine.copy_(own_part(part_like(tensor, live)))
            return live
        return live.copy_(tensor)
    return _placed(tensor, None, channels_last).to(live.device)


def weighted_average(states: Iterable[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """``Σ_k w_k s_k`` over states of equal names and shapes, accumulated in float64 in the order of the states.

    Floating-point tensors are averaged and keep their type; others are the first state's. Only one state is held at a
    time, beside the sums.

    Args:
        states: K states on the CPU.
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
    return {name: total.to(sums.dtypes[name]) for name, total in sums.totals.items()}


class _Sums:
    """Sums in float64, and the types of what was added."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def add(self, state: Mapping[str, Tensor] | None, weight: float) -> None:
        """``totals += weight * state``."""
        if state is None:
            raise ValueError("there are fewer states than weights")
        if not self.dtypes:
            self.dtypes = {name: tensor.dtype for name, tensor in state.items()}
            self.totals = {name: _weighted(tensor, weight) for name, tensor in state.items()}
            return
        if state.keys() != self.totals.keys():
            raise ValueError("a state has other tensors than the first")
        for name, total in self.totals.items():
            if total.is_floating_point():
                total += _weighted(state[name], weight)


def _weighted(leaf: Tensor, weight: float) -> Tensor:
    # In place: a second tensor of float64 costs more time than the arithmetic.
    return leaf.detach().to(torch.float64, copy=True).mul_(weight) if leaf.is_floating_point() else leaf.clone()
