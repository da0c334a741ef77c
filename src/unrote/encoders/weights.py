"""Where weights lie that unrote may not ship: the cache folder, or a file or folder of the user's."""

import logging
import warnings
from pathlib import Path
from typing import Any

from unrote.data.build import cache_folder
from unrote.errors import InputError, first_line
from unrote.files import sha256_file

log = logging.getLogger("unrote")


def weights_folder() -> Path:
    """``weights`` in the cache folder (``$UNROTE_CACHE``)."""
    return cache_folder() / "weights"


def existing_file(path: Path, key: str) -> Path:
    """``path`` if there is such a file.

    Raises:
        InputError: there is none.
    """
    path = path.expanduser()
    if not path.is_file():
        raise InputError(f"{key}={path}: there is no such file")
    return path


def load_torchscript(path: Path, device: str) -> Any:
    """A TorchScript module in evaluation mode. The file is a program: it can compute anything, but unpickles nothing.

    Raises:
        InputError: not a TorchScript file.
    """
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is deprecated; the published files are not
        try:
            load: Any = torch.jit.load
            return load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise InputError(f"{path} is no TorchScript file: {first_line(error)}") from error


def verified(path: Path, sha256: str) -> Path:
    """``path`` if its content has this SHA-256. A download that has not is deleted.

    Raises:
        InputError: another content.
    """
    found = sha256_file(path)
    if found != sha256:
        path.unlink()
        raise InputError(f"{path.name} has SHA-256 {found}, not {sha256}: deleted, ask for it again")
    log.info("%s: SHA-256 %s as expected", path, sha256)
    return path
