"""TAA in a training loop of one's own: augmented views of the images that are about to be memorized."""

from typing import Any

from torch import Tensor

from unrote.config.sections import OpsConfig
from unrote.data.augmentations import augment
from unrote.method.augment import Policy, augmentation_strength
from unrote.method.gate import LossGate


def augment_near_threshold(
    gate: LossGate, images: Tensor, indices: Tensor, *, policy: Policy = "band", beta: float = 1.5, **ops: Any
) -> Tensor:
    """Images whose loss ratio, by the gate's ledger, is near the skip threshold, as augmented views; others untouched.

    To be called before noise is added (threshold-aware augmentation, arXiv 2502.09434). Random numbers are torch's own.

    Args:
        gate: with a ledger; its skip ratio is λ.
        images: float [B, C, H, W] in [-1, 1]; pixels, not latents.
        indices: int64 [B], the samples' positions in the data set.
        policy: see :func:`unrote.method.augment.augmentation_strength`.
        beta: β, the upper end of the band in units of λ.
        ops: what an augmentation may do, as :func:`unrote.data.augmentations.augment` takes it; by default a flip, half
            of the time, and a shift by up to 1/16 of the side. A flip is wrong for digits and text.

    Returns:
        float [B, C, H, W] in [-1, 1].

    Raises:
        ValueError: if the gate has no ledger or never skips, or the images are not as said. Ranges are checked on the
            CPU only.
    """
    if gate.ledger is None or not gate.skip_ratio:
        raise ValueError("augmentation goes by loss ratios: give the gate a skip_ratio and ledger=Ledger(len(dataset))")
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images must be float [B, C, H, W], not {images.dtype} {list(images.shape)}")
    if images.device.type == "cpu" and images.numel() and not -1.001 <= images.min() <= images.max() <= 1.001:
        raise ValueError("images must be pixels in [-1, 1]: augment before they are encoded or scaled otherwise")
    gate.ledger.to(images.device)
    ratio = gate.ledger.running_ratio_of(indices.to(images.device))
    strength = augmentation_strength(ratio, policy=policy, skip_ratio=gate.skip_ratio, beta=beta)
    views, _ = augment(images, strength.to(images.dtype), None, **(ops or OpsConfig().model_dump()))
    return views
