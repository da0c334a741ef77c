"""The images that a run trains on."""

from pathlib import Path
from typing import Any

from unrote.config import Config
from unrote.data import ImageStore, open_images
from unrote.data.namelist import read_names
from unrote.errors import InputError


def training_images(config: Config, data: Any = None) -> ImageStore:
    """The images that a run of ``config`` trains on; ``data`` where the source is no path or name."""
    settings = config.data
    images = open_images(
        settings.source if data is None else data,
        resolution=settings.resolution,
        center_crop=settings.center_crop,
        channels=settings.channels,
    )
    if settings.include is not None:
        images = _included(images, Path(settings.include))
    return images if settings.limit is None else images.limit(settings.limit)


def watched_against(config: Config, images: ImageStore) -> ImageStore | None:
    """The held-out images of the monitor, at the size of the training images; None if there are none.

    Raises:
        InputError: they can't be read, have another size or channels, or are fewer than two.
    """
    source = config.monitor.holdout
    if source is None:
        return None
    try:
        holdout = open_images(source, resolution=images.images.shape[1], channels=config.data.channels)
    except InputError as error:
        raise InputError(f"monitor.holdout: {error}") from None
    if holdout.images.shape[1:] != images.images.shape[1:] or len(holdout) < 2:
        raise InputError(
            f"monitor.holdout: {source}: takes two images or more of the training images' size and channels"
        )
    return holdout


def _included(images: ImageStore, file: Path) -> ImageStore:
    """The images that ``file`` names, in their own order. Raises InputError for names that there are not."""
    try:
        wanted = set(read_names(file))
    except InputError as error:
        raise InputError(f"data.include: {error}") from None
    if not wanted:
        raise InputError(f"data.include: {file} names nothing")
    unknown = sorted(wanted - set(images.names))
    if unknown:
        what = f"has {len(unknown):,} names that {images.source} does not have, such as {unknown[0]!r}"
        raise InputError(f"data.include: {file} {what}")
    return images.subset([index for index, name in enumerate(images.names) if name in wanted])
