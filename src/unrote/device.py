"""Where to compute."""

import torch

from unrote.errors import InputError, first_line


def pick_device(device: str | None) -> torch.device:
    """The named device, or the best there is. Raises InputError if it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {device}: {first_line(error)}") from None
    return torch.device(device)
