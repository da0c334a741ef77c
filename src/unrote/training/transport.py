"""States on their way from process to process by gloo: as bytes, in pieces."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unrote.tensorfiles import state_from_bytes, state_to_bytes

CHUNK = 1 << 28
"""Bytes sent at once."""


def send(state: Any, receiver: int) -> None:
    """Send a state to one process, which calls :func:`receive`."""
    content = _as_tensor(state_to_bytes(state))
    dist.send(torch.tensor([len(content)]), receiver)
    for part in _chunks(content):
        dist.send(part, receiver)


def receive(sender: int) -> Any:
    """The state that one process sends."""
    length = torch.zeros(1, dtype=torch.int64)
    dist.recv(length, sender)
    content = torch.empty(int(length), dtype=torch.uint8)
    for part in _chunks(content):
        dist.recv(part, sender)
    return state_from_bytes(content.numpy().tobytes())


def broadcast(state: Any, *, first: bool) -> Any:
    """The state of the first process, in all of them; the others bring none."""
    content = _as_tensor(state_to_bytes(state)) if first else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([len(content)])
    dist.broadcast(length, 0)
    if not first:
        content = torch.empty(int(length), dtype=torch.uint8)
    for part in _chunks(content):
        dist.broadcast(part, 0)
    return state if first else state_from_bytes(content.numpy().tobytes())


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _chunks(content: Tensor) -> list[Tensor]:
    return [content[start : start + CHUNK] for start in range(0, len(content), CHUNK)]
