"""What an encoder is: a map from images to features that owns its preprocessing and says which weights it has."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:  # numpy takes a tenth of a second
    import numpy as np


@runtime_checkable
class Encoder(Protocol):
    """Features of images. The result for an image does not depend on the images it is given together with.

    (But for the last bits of a float32, where a library sums in another order for another number of images.)

    Attributes:
        key: short and unique in a report, usable as a CSV column prefix: ``sscd``, ``random-conv``, ``custom``.
        name: in full, with its version or variant.
        weights_sha256: hex SHA-256 of the weights, ``none`` if there are none, ``unknown`` for a user's callable.
        preprocessing: in words: how images are resized, what becomes of grey ones, how values are normalised.
        copy_detection: whether the cosine similarity of two features says how much two images look like copies.
        is_fid_inception: True only for the weights that the FID is defined with.
    """

    @property
    def key(self) -> str: ...  # noqa: D102

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def weights_sha256(self) -> str: ...  # noqa: D102

    @property
    def preprocessing(self) -> str: ...  # noqa: D102

    @property
    def copy_detection(self) -> bool: ...  # noqa: D102

    @property
    def is_fid_inception(self) -> bool: ...  # noqa: D102

    def __call__(self, images: "np.ndarray") -> "np.ndarray":
        """Features float32 [n, D], finite, of uint8 images [n, H, W, C], n > 0, C = 1 or 3."""
        ...
