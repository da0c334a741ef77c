"""What ``training.mixed_precision: auto`` comes to on the device that trains."""

import logging
import platform

import torch

from unrote.config import Config
from unrote.training.run import Run

logger = logging.getLogger("unrote")


def settled(config: Config, run: Run, device: torch.device) -> Config:
    """The configuration with its precision settled: ``auto`` is bf16 where the device multiplies it in hardware.

    A run that was begun goes on in its own precision, also on another device.
    """
    asked = config.training.mixed_precision
    if asked == "bf16" and device.type == "cpu" and not multiplies_bf16(device):
        logger.warning(
            "training.mixed_precision: this CPU has no instructions for bf16, which takes many times as long as no; "
            "auto uses bf16 only where it is faster"
        )
    if asked != "auto":
        return config
    chosen = "bf16" if multiplies_bf16(device) else "no"
    if (run.path / "config.yaml").exists():
        chosen = run.config.training.mixed_precision
    training = config.training.model_copy(update={"mixed_precision": chosen})
    return config.model_copy(update={"training": training})


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16. Without them it takes a CPU many times as long as float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
