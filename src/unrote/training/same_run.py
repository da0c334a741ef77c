"""That all processes mean the same run, before any of them begins."""

from unrote import __version__
from unrote.config import Config
from unrote.data.store import ImageStore
from unrote.errors import InputError
from unrote.files import temporary_path
from unrote.training.distributed import Single
from unrote.training.run import Run


def is_finished(run: Run, config: Config, images: ImageStore, peers: Single) -> bool:
    """Whether the run has ended before; first, that all processes mean the same run and share its folder.

    Raises:
        InputError: if this process was given something else than the first, or does not see the first one's folder.
    """
    if peers.size == 1:
        return run.finished
    marker = temporary_path(run.path / "shared")
    if peers.rank == 0:
        marker.touch()
    try:
        _check_same(run, config, images, peers, marker.name)
        # Nobody looks for the marker any more.
        return bool(peers.gather(run.finished)[0])
    finally:
        if peers.rank == 0:
            marker.unlink()


def _check_same(run: Run, config: Config, images: ImageStore, peers: Single, marker: str) -> None:
    same = {"version of unrote": __version__, "configuration": config.to_yaml(), "images": images.fingerprint}
    theirs, seen = peers.gather([same, marker])[0]
    for name, value in same.items():
        if theirs[name] != value:
            raise InputError(f"process {peers.rank} has another {name} than process 0: give all of them the same")
    if not (run.path / seen).exists():
        raise InputError(
            f"--out {run.path}: process {peers.rank} does not see what process 0 writes there; "
            "choose a folder on a filesystem that all machines share"
        )
