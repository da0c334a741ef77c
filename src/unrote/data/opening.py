"""``open_images``: whatever the user has, as an :class:`~unrote.data.store.ImageStore`."""

import difflib
from pathlib import Path
from typing import Any

import numpy as np

from unrote.data.arrays import ArraySource, NpzSource
from unrote.data.build import open_source
from unrote.data.datasets import HuggingFaceSource, MapDatasetSource, is_hugging_face, load_from_hub, load_saved
from unrote.data.decode import DecodeSettings
from unrote.data.folder import FolderSource
from unrote.data.named import SPLITS, downloaded, emoji_store, split_name
from unrote.data.sources import ImageSource
from unrote.data.store import ImageStore, in_memory_store
from unrote.errors import InputError


def open_images(
    data: Any,
    *,
    resolution: int | None,
    center_crop: bool = True,
    channels: int = 3,
    limit: int | None = None,
    cache_dir: Path | None = None,
) -> ImageStore:
    """Open images of any kind; files are decoded once and found again in the cache.

    Args:
        data: A folder, an ``.npz`` file, the name of a set (``emoji``, ``emoji:holdout``, ``cifar10:test``), a Hub id
            (``hf:owner/name:split``), an array ``[N, H, W]`` or ``[N, H, W, C]`` (uint8, or float in [0, 1]), a Hugging
            Face ``Dataset``, a map-style torch dataset, or an :class:`ImageStore`. A set's name wins over a folder of
            that name; write ``./emoji`` for the folder.
        resolution: Side of the square every image becomes, in pixels; None keeps the images' own size (all must agree).
        center_crop: Scale the shorter side and crop the centre; otherwise stretch.
        channels: 3 (RGB) or 1 (grey).
        limit: Use only this many images, chosen by a fixed seed.
        cache_dir: Cache folder instead of ``$UNROTE_CACHE`` or ``~/.cache/unrote``.

    Raises:
        InputError: No such data, nothing usable in it, or images of several sizes without ``resolution``.
    """
    if resolution is not None and resolution < 1:
        raise InputError(f"resolution must be at least 1, not {resolution}")
    if channels not in (1, 3):
        raise InputError(f"channels must be 1 or 3, not {channels}")
    settings = DecodeSettings(resolution, center_crop, channels)
    found = _find(data)
    if isinstance(found, ImageStore):
        store = found if _fits(found, settings) else open_source(_again(found), settings, cache_dir)
    else:
        store = open_source(found, settings, cache_dir)
    return store if limit is None else store.limit(limit)


def _find(data: Any) -> ImageStore | ImageSource:
    if isinstance(data, ImageStore):
        return data
    if isinstance(data, str) and (named := split_name(data)) is not None:
        name, split = named
        return emoji_store(split) if name == "emoji" else _path_source(downloaded(name, split), f"{name}:{split}")
    if isinstance(data, str | Path):
        if data == "":
            raise InputError('"" names no images; write . for the current folder')
        return (
            load_from_hub(str(data))
            if str(data).startswith("hf:")
            else _path_source(Path(data).expanduser(), str(data))
        )
    if isinstance(data, np.ndarray):
        return _array(data)
    if is_hugging_face(data):
        return HuggingFaceSource(data, "datasets.Dataset")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return MapDatasetSource(data, type(data).__name__)
    raise InputError(f"cannot read images from {type(data).__name__}")


def _path_source(path: Path, description: str) -> ImageSource:
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
            raise InputError(f"{description} is a saved DatasetDict; name one split, such as {path / splits[0]}")
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return load_saved(path, description)
        return FolderSource(path, description)
    if path.is_file():
        if path.suffix.lower() == ".npz":
            return NpzSource(path, description)
        raise InputError(f"{description} is a file, but no .npz; give a folder of images or an .npz")
    raise InputError(_missing(path, description))


def _missing(path: Path, description: str) -> str:
    known = [f"{name}:{split}" for name, splits in SPLITS.items() for split in splits] + list(SPLITS)
    near = difflib.get_close_matches(description, known, n=2)
    if path.parent.is_dir():
        beside = [entry.name for entry in path.parent.iterdir()]
        near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, beside, n=3)] + near
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; named sets are {', '.join(SPLITS)}"
    return f"there is no {description}{hint}"


def _array(array: np.ndarray[Any, Any]) -> ImageStore | ImageSource:
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise InputError(f"an array of images is [N, H, W] or [N, H, W, C], not {list(array.shape)}")
    if array.dtype == np.uint8 and (array.ndim == 3 or array.shape[3] in (1, 3)):
        return in_memory_store(array.reshape(*array.shape[:3], -1), source="array")
    return ArraySource(array, "array")


def _fits(store: ImageStore, settings: DecodeSettings) -> bool:
    _, height, width, channels = store.images.shape
    side = settings.resolution
    return channels == settings.channels and (side is None or (height, width) == (side, side))


def _again(store: ImageStore) -> ImageSource:
    return ArraySource(
        store.images,
        store.source,
        names=store.names,
        labels=store.labels,
        class_names=store.class_names,
        captions=store.captions,
        more_captions=store.more_captions,
    )
