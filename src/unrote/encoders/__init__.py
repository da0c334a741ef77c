"""Feature spaces: what an image becomes before images or sets of images are compared.

:func:`load_encoder` makes an encoder from a name, :func:`features` runs it over a set once and keeps the result. This
module imports neither torch nor a library of models until an encoder is asked for.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unrote.encoders.base import Encoder
from unrote.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from unrote.neighbours.streaming import Rows

__all__ = ["ENCODERS", "Encoder", "features", "load_encoder"]

ENCODERS = {
    "random-conv": "random-conv",
    "pixels": "pixels",
    "sscd": "sscd[=FILE|=download]",
    "inception": "inception[=FILE]",
    "dinov2": "dinov2[=FOLDER|=HUB_ID]",
    "clip": "clip[=FOLDER|=HUB_ID]",
    "transformers": "transformers=FOLDER|HUB_ID",
}
"""What :func:`load_encoder` takes, by name."""


def load_encoder(what: "str | Encoder | Callable[[np.ndarray], Any]", *, device: str = "cpu") -> Encoder:
    """The encoder of a name, with its weights loaded.

    Args:
        what: ``random-conv``, ``pixels``, ``sscd[=FILE|=download]``, ``inception[=FILE]``, ``dinov2[=WHERE]``,
            ``clip[=WHERE]``, ``transformers=WHERE`` (WHERE: a folder or a Hub id), an :class:`Encoder`, or a function
            from uint8 images [n, H, W, C] to features [n, D].
        device: where torch models run. The int8 SSCD always runs on the CPU.

    Raises:
        InputError: no such encoder, or its weights or its library are not here; the message says what to place where.
    """
    if not isinstance(what, str):
        return _given(what)
    name, equals, where = what.partition("=")
    if name not in ENCODERS:
        from unrote.config import nearest

        known = ", ".join(ENCODERS.values())
        raise InputError(f"there is no encoder {name!r}{nearest(name, ENCODERS)}; there are {known}")
    takes_nothing, needs_something = name in ("random-conv", "pixels"), name == "transformers"
    if (equals and (takes_nothing or not where)) or (needs_something and not where):
        raise InputError(f"encoder {what!r}: write {ENCODERS[name]}")
    try:
        return _made(name, where, device)
    except ModuleNotFoundError as error:
        missing = f"needs the Python package {error.name}: pip install {error.name}"
        raise InputError(f"encoder {name} {missing if error.name else f'cannot be used here: {error}'}") from error


def _given(what: "Encoder | Callable[[np.ndarray], Any]") -> Encoder:
    if isinstance(what, type) or not callable(what):
        raise InputError(f"{what!r} is no encoder: give a name, an encoder object or a function of images")
    if isinstance(what, Encoder):
        return what
    from unrote.encoders.custom import CustomEncoder

    return CustomEncoder(what)


def _made(name: str, where: str, device: str) -> Encoder:
    """Each import is here because it costs seconds, or fails without an optional library."""
    if name == "random-conv":
        from unrote.encoders.random_conv import RandomConvEncoder

        return RandomConvEncoder(device)
    if name == "pixels":
        from unrote.encoders.pixels import PixelsEncoder

        return PixelsEncoder()
    if name == "sscd":
        from unrote.encoders.sscd import sscd_encoder

        return sscd_encoder(where, device)
    if name == "inception":
        from unrote.encoders.inception import InceptionEncoder

        return InceptionEncoder(where, device)
    from unrote.encoders.vision_models import VisionModel

    return VisionModel(name, where, device)


def features(
    encoder: Encoder,
    images: "Rows",
    *,
    digest: str | None = None,
    cache: Path | None = None,
    progress: str | None = None,
    distributed: bool = False,
) -> "np.ndarray":
    """Features float32 [N, D] of all images, cached or extracted now: see :func:`unrote.encoders.cache.features`."""
    from unrote.encoders import cache as caching

    return caching.features(encoder, images, digest=digest, cache=cache, progress=progress, distributed=distributed)
