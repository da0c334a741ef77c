"""Non-leaking augmentation: the denoiser is told what was done to a sample (Karras et al. 2022, §5, Appendix F.2)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from diffusers import UNet2DModel
from torch import Tensor, nn


class ToldOfAugmentation(nn.Module):
    """What stands in a UNet for its class embedding: the embedding of the class, if any, plus W a.

    W has no bias and clean images have a = 0, so that without it a model denoises clean images exactly as with it. It
    starts at 0: training starts as it would without labels.

    Args:
        classes: the class embedding; None for a model without classes.
        num_labels: n.
        width: of the time embedding, to which this is added.
    """

    def __init__(self, classes: nn.Module | None, num_labels: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.augmentation = nn.Linear(num_labels, width, bias=False)
        nn.init.zeros_(self.augmentation.weight)

    def forward(self, told: Mapping[str, Tensor]) -> Tensor:
        """The embedding [B, width] of ``augmentation`` (a, float32 [B, n]) and ``classes`` (int64 [B])."""
        embedded: Tensor = self.augmentation(told["augmentation"])
        return embedded if self.classes is None else embedded + self.classes(told["classes"])


def tell_of_augmentation(unet: UNet2DModel, num_labels: int) -> None:
    """Let ``unet`` take a mapping for :class:`ToldOfAugmentation` as its ``class_labels``."""
    width = unet.time_embedding.linear_2.out_features
    unet.class_embedding = ToldOfAugmentation(unet.class_embedding, num_labels, width)


@contextmanager
def without_augmentation(unet: UNet2DModel) -> Iterator[None]:
    """Inside the block ``unet`` is the plain model that is not told, with the same weights, as it is to be saved."""
    told = unet.class_embedding
    if isinstance(told, ToldOfAugmentation):
        unet.class_embedding = told.classes
    try:
        yield
    finally:
        unet.class_embedding = told
