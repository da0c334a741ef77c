"""Bundles of tensors on their way from process to process by gloo. Both sides know their names, types and shapes."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unrote.tensorfiles import Form, bytes_of

MESSAGE = 1 << 28
"""The most bytes that are sent at once."""


def send(tensors: Mapping[str, Tensor], receiver: int) -> None:
    """Send tensors on the CPU to one process, which calls :func:`receive`."""
    for message in _messages(_packed(tensors)):
        dist.send(message, receiver)


def receive(forms: Mapping[str, Form], sender: int) -> dict[str, Tensor]:
    """The tensors that one process sends."""
    content = _room(forms)
    for message in _messages(content):
        dist.recv(message, sender)
    return _unpacked(content, forms)


def broadcast(
    tensors: Mapping[str, Tensor] | None, forms: Mapping[str, Form], source: int = 0, group: Any = None
) -> dict[str, Tensor]:
    """The tensors of the process ``source`` in all processes (of a ``group``); the others bring None."""
    content = _room(forms) if tensors is None else _packed(tensors)
    for message in _messages(content):
        dist.broadcast(message, source, group)
    return _unpacked(content, forms) if tensors is None else dict(tensors)


def _packed(tensors: Mapping[str, Tensor]) -> Tensor:
    contents = [bytes_of(tensor.contiguous()) for tensor in tensors.values()]
    return torch.cat(contents) if len(contents) > 1 else contents[0]


def _room(forms: Mapping[str, Form]) -> Tensor:
    return torch.empty(sum(_size(form) for form in forms.values()), dtype=torch.uint8)


def _unpacked(content: Tensor, forms: Mapping[str, Form]) -> dict[str, Tensor]:
    parts = torch.split(content, [_size(form) for form in forms.values()])
    if len(parts) > 1:
        # A number must begin at a multiple of its size.
        parts = tuple(part.clone() for part in parts)
    named = zip(forms.items(), parts, strict=True)
    return {name: part.view(dtype).view(shape) for (name, (dtype, shape)), part in named}


def _size(form: Form) -> int:
    dtype, shape = form
    return dtype.itemsize * shape.numel()


def _messages(content: Tensor) -> Iterator[Tensor]:
    return (content[start : start + MESSAGE] for start in range(0, len(content), MESSAGE))
