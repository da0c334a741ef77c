"""States on their way from process to process by gloo."""

from typing import Any

import torch.distributed as dist

from unrote.tensorfiles import messages_of, state_of_messages


def send(state: Any, receiver: int) -> None:
    """Send a state to one process, which calls :func:`receive`."""
    for message in messages_of(state):
        dist.send(message, receiver)


def receive(sender: int) -> Any:
    """The state that one process sends."""
    return state_of_messages(lambda message: dist.recv(message, sender))


def broadcast(state: Any, *, first: bool) -> Any:
    """The state of the first process, in all of them; the others bring none."""
    if not first:
        return state_of_messages(lambda message: dist.broadcast(message, 0))
    for message in messages_of(state):
        dist.broadcast(message, 0)
    return state
