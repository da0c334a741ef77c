"""TAA, threshold-aware augmentation: how strongly each sample is augmented, by its loss ratio (arXiv 2502.09434)."""

from typing import Literal

import torch
from torch import Tensor

Policy = Literal["band", "proximity", "all"]
RatioSource = Literal["ledger", "lookahead"]

PROXIMITY_SHARPNESS = 5.0


def augmentation_strength(ratio: Tensor, *, policy: Policy, skip_ratio: Tensor | float, beta: float = 1.5) -> Tensor:
    """Strength of the augmentation of each sample.

    ``band``: full strength below β·λ, none above. ``proximity``: ``exp(−5 |r/λ − 1|)``, strongest at the threshold.
    ``all``: full strength for every sample, known or not: the plain baseline.
    Which samples are skipped is the gate's business: a ratio below λ gets the strength that it would have if kept.

    >>> augmentation_strength(torch.tensor([0.4, 0.7, 0.8]), policy="band", skip_ratio=0.5)
    tensor([1., 1., 0.])

    Args:
        ratio: float32 [B], r; NaN or inf where nothing is known, which only ``all`` augments.
        policy: the rule.
        skip_ratio: λ > 0.
        beta: β ≥ 1, the upper end of the band in units of λ.

    Returns:
        float32 [B] in [0, 1].
    """
    if policy == "all":
        return torch.ones_like(ratio)
    if policy == "band":
        return (ratio < beta * skip_ratio).float()
    distance = (ratio / skip_ratio - 1).abs()
    return torch.where(ratio.isfinite(), torch.exp(-PROXIMITY_SHARPNESS * distance), 0.0)
