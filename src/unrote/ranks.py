"""The processes that share a piece of work, as ``torchrun`` or ``accelerate launch`` started them."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from unrote.errors import InputError, first_line
from unrote.training.reachable import TIMEOUT, meeting_place, patience


class PeerLostError(InputError):
    """Another process of the job is gone, or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work. One alone unless ``here(distributed=True)``."""

    rank: int = 0
    world: int = 1

    @staticmethod
    def here(*, distributed: bool) -> "Ranks":
        """The default process group of ``torch.distributed``, or one process.

        Raises:
            InputError: there is no process group.
        """
        if distributed and not dist.is_initialized():
            raise InputError("distributed work needs torch.distributed.init_process_group first (use torchrun)")
        return Ranks(dist.get_rank(), dist.get_world_size()) if distributed else Ranks()

    def span(self, total: int) -> range:
        """The share of ``total`` rows that is this process's: contiguous, so that it is read in order."""
        return range(total * self.rank // self.world, total * (self.rank + 1) // self.world)

    def bar(self, label: str | None, unit: str, passes: int, total: int) -> "tqdm[Any]":
        """A progress bar on stderr over this process's rows; quiet without a label, a terminal, or rank 0."""
        quiet = True if label is None or self.rank else None
        return tqdm(total=passes * len(self.span(total)), desc=label, unit=unit, leave=False, disable=quiet)

    def shares(self, state: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """Every process's ``state``, in the order of ranks; shapes and dtypes are the same everywhere."""
        device = "cuda" if self.world > 1 and dist.get_backend() == "nccl" else "cpu"
        state = {name: np.array(array) for name, array in state.items()}  # the caller may merge while this goes on
        self.barrier()
        for source in range(self.world):
            if self.world == 1:
                yield state
                continue
            received: dict[str, np.ndarray] = {}
            for name, array in state.items():
                tensor = torch.from_numpy(array.copy()).to(device)
                with _together():
                    dist.broadcast(tensor, source)
                received[name] = tensor.cpu().numpy()
            yield received

    def of_first(self, array: np.ndarray) -> np.ndarray:
        """Rank 0's ``array``; shape and dtype are the same everywhere."""
        return next(self.shares({"array": array}))["array"]

    def agree(self, settings: dict[str, Any]) -> None:
        """Check that every process was given the same JSON-able ``settings``.

        Raises:
            InputError: naming the ranks that differ from rank 0; in all processes.
        """
        digest = np.frombuffer(hashlib.sha256(json.dumps(settings).encode()).digest(), dtype=np.uint8)
        first, *others = (share["digest"].tobytes() for share in self.shares({"digest": digest}))
        differing = [str(rank) for rank, other in enumerate(others, 1) if other != first]
        if differing:
            raise InputError(
                f"rank {', '.join(differing)}: was given other settings or another model than rank 0. Start every "
                "process with the same command, and keep models and images where all nodes see the same files"
            )

    def barrier(self) -> None:
        """Wait until every process is here.

        Raises:
            PeerLostError: naming the first that did not come in time, where ``gloo`` connects them.
        """
        if self.world > 1:
            with _together():
                if dist.get_backend() == "gloo":
                    # The first one says who is missing; the others wait as long as their group does.
                    dist.monitored_barrier(timeout=timedelta(seconds=patience()))
                else:
                    dist.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """This process among those that one launcher started: joins their group, and leaves it at the end.

    A process that no launcher started is alone; a group that the caller has initialized is used as it is.

    Args:
        device: where this process computes; ``nccl`` connects CUDA devices, ``gloo`` everything else.

    Whoever waits for the others gives up after ``UNROTE_PEER_TIMEOUT`` seconds, as in training.

    Raises:
        InputError: the launcher's environment is not complete, or the other processes cannot be reached.
    """
    given = dist.is_available() and dist.is_initialized()
    if given or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks.here(distributed=given)
        return
    limit = patience()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, rank, size = meeting_place(limit)
        options: dict[str, Any] = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=2 * limit)}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, **options)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but its processes do not find one another "
            f"({first_line(error)}): start them with torchrun or accelerate launch"
        ) from None
    try:
        yield Ranks.here(distributed=True)
    finally:
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    """Raises PeerLostError where a group says that one of its processes is gone, or took too long."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(
            f"another process of this job has stopped, and its own message says why, or gave no answer in time "
            f"({first_line(error)}): raise {TIMEOUT} if it is only slow. The same command goes on from here"
        ) from error
