"""One image, wherever it came from -> ``uint8 [H, W, C]``, or the reason why not."""

import errno
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]

MAX_PIXELS = 1 << 26
"""Largest width x height that is decoded (8192 x 8192); anything above is refused from its header alone."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "TGA")
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """This one image cannot be used; the message is the reason that goes into the quarantine list."""


@dataclass(frozen=True)
class DecodeSettings:
    """How an image becomes a training row.

    Attributes:
        resolution: Side in pixels of the square every image becomes; None keeps each image's own size.
        center_crop: Scale the shorter side to ``resolution`` and crop the centre; otherwise stretch to the square.
        channels: 3 (RGB) or 1 (grey).
    """

    resolution: int | None
    center_crop: bool = True
    channels: int = 3


def decode_file(path: str | os.PathLike[str], settings: DecodeSettings) -> tuple[Pixels, bool]:
    """Decode one file; see :func:`decode_stream`."""
    try:
        file = open(path, "rb")  # noqa: PTH123, SIM115 - the path may hold undecodable bytes; closed below
    except (OSError, ValueError) as error:
        raise BadImage(_reason(error)) from error
    with file:
        return decode_stream(file, settings)


def decode_stream(file: BinaryIO, settings: DecodeSettings) -> tuple[Pixels, bool]:
    """Decode one image file that is open for reading.

    Returns:
        The image as ``uint8 [H, W, C]``, and whether it is the first frame of several.

    Raises:
        BadImage: The file is unreadable, damaged, not an image or too large; the message says which.
    """
    try:
        if not file.read(1):
            raise BadImage("empty file")
        file.seek(0)
        with Image.open(file, formats=_known_formats()) as image:
            _refuse_bomb(image)
            image.load()
            return to_pixels(image, settings), _has_frames(image)
    except BadImage:
        raise
    except Exception as error:  # decoders of untrusted files raise anything; every one of them means "not usable"
        raise BadImage(_reason(error)) from error


def to_pixels(image: Any, settings: DecodeSettings) -> Pixels:
    """Convert a PIL image, NumPy array or torch tensor to ``uint8 [H, W, C]`` under ``settings``.

    Arrays are ``[H, W]`` or ``[H, W, C]`` (``[C, H, W]`` for tensors, and for arrays whose only small axis is the
    first), with C in 1, 3, 4; uint8, uint16, bool, or float in [0, 1]. Alpha is composited on white.

    Raises:
        BadImage: Unusable type, shape or range.
    """
    if not isinstance(image, Image.Image):
        array = _as_eight_bit(*_as_array(image))
        side = settings.resolution
        if array.shape[2] == settings.channels and (side is None or array.shape[:2] == (side, side)):
            return np.ascontiguousarray(array)
        image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    flat = _flatten(_upright(image), "L" if settings.channels == 1 else "RGB")
    pixels = np.asarray(_fit(flat, settings), dtype=np.uint8)
    return pixels.reshape(*pixels.shape[:2], settings.channels)


def _known_formats() -> list[str]:
    """Formats that are pure decoders (EPS, for one, would start another program) and that this Pillow has."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _refuse_bomb(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width} x {image.height} is larger than {MAX_PIXELS:,} pixels")


def _has_frames(image: Image.Image) -> bool:
    # MPO is what phones write: one photograph with previews behind it.
    return image.format != "MPO" and bool(getattr(image, "is_animated", False))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        return image
    transpose = _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
    return image if transpose is None else image.transpose(transpose)


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """To ``L`` or ``RGB``: 16 bits scaled to 8, CMYK and palettes converted, alpha composited on white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        wide = np.asarray(image).astype(np.uint16)
        image = Image.fromarray(_as_eight_bit(wide[..., None], False)[..., 0])
    elif image.mode == "F":
        image = Image.fromarray(_as_eight_bit(np.asarray(image)[..., None], False)[..., 0])
    elif image.mode == "I":
        raise BadImage("32-bit integers have no known range")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _fit(image: Image.Image, settings: DecodeSettings) -> Image.Image:
    side = settings.resolution
    if side is None or image.size == (side, side):
        return image
    if not settings.center_crop:
        return image.resize((side, side), Image.Resampling.LANCZOS)
    shorter = min(image.size)
    left, top = (image.width - shorter) // 2, (image.height - shorter) // 2
    box = (left, top, left + shorter, top + shorter)
    if shorter == side:
        return image.crop(box)
    # One step: the filter still sees the pixels beyond the box, exactly as resizing first and cropping then would.
    return image.resize((side, side), Image.Resampling.LANCZOS, box=box)


def _as_array(image: Any) -> tuple[NDArray[Any], bool]:
    """A NumPy view of ``image``, and whether its first axis is the channels by convention (torch)."""
    if isinstance(image, np.ndarray):
        return image, False
    if hasattr(image, "detach") and hasattr(image, "cpu"):
        return np.asarray(image.detach().cpu().numpy()), True
    raise BadImage(f"neither a PIL image nor an array or tensor, but {type(image).__name__}")


def _as_eight_bit(array: NDArray[Any], channels_first: bool) -> Pixels:
    array = _channels_last(array, channels_first)
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if array.dtype.kind != "f":
        raise BadImage(f"{array.dtype} values; give uint8, uint16, or float in [0, 1]")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0.0 and high <= 1.0):  # also false for NaN
        raise BadImage(f"float values in [{low:.3g}, {high:.3g}], not [0, 1] (leave out Normalize)")
    return np.rint(array.astype(np.float32) * 255).astype(np.uint8)


def _channels_last(array: NDArray[Any], channels_first: bool) -> NDArray[Any]:
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3 or 0 in array.shape:
        raise BadImage(f"an array of shape {array.shape} is no image")
    first, last = array.shape[0] in (1, 3, 4), array.shape[2] in (1, 3, 4)
    if first and (channels_first or not last):
        return np.moveaxis(array, 0, -1)
    if not last:
        raise BadImage(f"no axis of shape {array.shape} holds 1, 3 or 4 channels")
    return array


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"larger than {MAX_PIXELS:,} pixels"
    if isinstance(error, OSError) and error.errno is not None:
        return "symlink loop" if error.errno == errno.ELOOP else f"cannot be read: {os.strerror(error.errno)}"
    return f"truncated or damaged: {error}" if str(error) else f"truncated or damaged ({type(error).__name__})"
