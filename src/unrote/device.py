"""Where to compute."""

import os

import torch

from unrote.errors import InputError, first_line


def pick_device(device: str | None) -> torch.device:
    """The named device, or the best there is. Raises InputError if it is not there.

    Of processes that a launcher started on one machine, each gets a CUDA device of its own if there are enough.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {device}: {first_line(error)}") from None
    return torch.device(device)
