"""A user's own function as an encoder."""

from collections.abc import Callable
from typing import Any

import numpy as np

from unrote.errors import InputError


class CustomEncoder:
    """Any callable from uint8 images [n, H, W, C] to features [n, D]: an array or a tensor.

    What the function does is not known, so its features are kept in memory only, unless it has an attribute
    ``cache_key``: a text that changes whenever its results would.
    """

    key = "custom"
    weights_sha256 = "unknown"
    preprocessing = "the callable's own"
    copy_detection = True
    is_fid_inception = False

    def __init__(self, function: Callable[[np.ndarray], Any]) -> None:
        self.function = function
        self.name = str(getattr(function, "__qualname__", type(function).__qualname__))
        self.cache_key: str | None = getattr(function, "cache_key", None)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features float32 [n, D] of uint8 images [n, H, W, C].

        Raises:
            InputError: the function returned anything else.
        """
        result = self.function(images)
        if hasattr(result, "detach"):
            result = result.detach().cpu().float()
        try:
            array = np.asarray(result, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"encoder {self.name} returned no array of numbers: {error}") from error
        return checked(array, len(images), self.name)


def checked(features: np.ndarray, count: int, name: str) -> np.ndarray:
    """``features`` if they are finite, [count, D].

    Raises:
        InputError: they are not.
    """
    if features.ndim != 2 or len(features) != count or features.shape[1] == 0:
        raise InputError(f"encoder {name} must return one row of features per image, [{count}, D]: it returned shape "
                         f"{list(features.shape)}")  # fmt: skip
    bad = np.flatnonzero(~np.isfinite(features).all(1))
    if len(bad):
        raise InputError(
            f"encoder {name} returned NaN or infinity for {len(bad):,} of {count:,} images, first {bad[0]}"
        )
    return features
