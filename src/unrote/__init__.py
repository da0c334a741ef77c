"""Train diffusion models that do not learn their data by rote, and prove it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unrote.api import train
    from unrote.auditing import AuditReport
    from unrote.data import ImageStore, open_images
    from unrote.detection.prompts import prompt_scores
    from unrote.errors import InputError
    from unrote.measures import audit, membership, scan
    from unrote.method.bank import LossBank
    from unrote.method.ensemble import Redistribution, ShardEnsemble
    from unrote.method.gate import LossGate
    from unrote.method.ledger import Ledger
    from unrote.method.loader import RoundLoader
    from unrote.publishing import push_run
    from unrote.sampling import sample
    from unrote.training.near_threshold import augment_near_threshold
    from unrote.training.run import Run

_HOMES = {
    "AuditReport": "unrote.auditing",
    "ImageStore": "unrote.data",
    "InputError": "unrote.errors",
    "Ledger": "unrote.method.ledger",
    "LossBank": "unrote.method.bank",
    "LossGate": "unrote.method.gate",
    "Redistribution": "unrote.method.ensemble",
    "RoundLoader": "unrote.method.loader",
    "Run": "unrote.training.run",
    "ShardEnsemble": "unrote.method.ensemble",
    "audit": "unrote.measures",
    "augment_near_threshold": "unrote.training.near_threshold",
    "membership": "unrote.measures",
    "open_images": "unrote.data",
    "prompt_scores": "unrote.detection.prompts",
    "push_run": "unrote.publishing",
    "sample": "unrote.sampling",
    "scan": "unrote.measures",
    "train": "unrote.api",
}

__all__ = [
    "AuditReport",
    "ImageStore",
    "InputError",
    "Ledger",
    "LossBank",
    "LossGate",
    "Redistribution",
    "RoundLoader",
    "Run",
    "ShardEnsemble",
    "audit",
    "augment_near_threshold",
    "membership",
    "open_images",
    "prompt_scores",
    "push_run",
    "sample",
    "scan",
    "train",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that ``unrote --help`` loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'unrote' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
