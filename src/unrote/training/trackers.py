"""Where the log also goes: TensorBoard, Weights & Biases, trackio."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from unrote.config import Config
from unrote.errors import InputError


class Tracker(Protocol):
    """A place for scalars."""

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Send one line of the log."""

    def close(self) -> None:
        """Flush."""


class NoTracker:
    """Goes nowhere."""

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run folder; what lies beyond the step resumed from is dropped."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Send one line of the log."""
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class ModuleTracker:
    """wandb and trackio, whose modules have the same ``init``, ``log`` and ``finish``."""

    def __init__(self, module: Any, folder: Path, config: Config) -> None:
        self._module = module
        module.init(project="unrote", name=folder.name, config=config.model_dump(mode="json"), resume="allow")

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Send one line of the log."""
        self._module.log(dict(record), step=step)

    def close(self) -> None:
        """Flush."""
        self._module.finish()


def make_tracker(report_to: str, folder: Path, config: Config, step: int) -> Tracker:
    """The tracker that ``training.report_to`` names.

    Raises:
        InputError: if its package is not installed, naming the extra to install.
    """
    try:
        match report_to:
            case "tensorboard":
                return TensorBoard(folder, step)
            case "wandb":
                import wandb

                return ModuleTracker(wandb, folder, config)
            case "trackio":
                import trackio

                return ModuleTracker(trackio, folder, config)
    except ImportError:
        raise InputError(
            f"training.report_to: {report_to} is not installed; run: pip install 'unrote[{report_to}]'"
        ) from None
    return NoTracker()
