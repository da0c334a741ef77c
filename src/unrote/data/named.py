"""Named sets: ``emoji`` comes with the package, the others are fetched by ``unrote data get``."""

import os
from importlib import resources
from pathlib import Path

import numpy as np

from unrote.data.build import cache_folder
from unrote.data.store import ImageStore, in_memory_store
from unrote.errors import InputError

SPLITS = {
    "emoji": ("train", "holdout"),
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "afhq-dog": ("train", "test"),
    "laion-10k": ("train",),
}
"""Every named set with its splits; the first one is meant when none is named."""


def data_folder() -> Path:
    """Where ``unrote data get`` puts sets and where they are looked for: ``$UNROTE_DATA``, or the cache folder."""
    own = os.environ.get("UNROTE_DATA")
    return Path(own).expanduser() if own else cache_folder() / "datasets"


def split_name(data: str) -> tuple[str, str] | None:
    """``("cifar10", "test")`` for ``cifar10:test``; None if ``data`` names no set.

    Raises:
        InputError: A named set without such a split.
    """
    name, _, split = data.partition(":")
    if name not in SPLITS:
        return None
    split = split or SPLITS[name][0]
    if split not in SPLITS[name]:
        raise InputError(f"{name} has no split {split!r}, only {', '.join(SPLITS[name])}")
    return name, split


def emoji_store(split: str) -> ImageStore:
    """Noto Emoji, 32 x 32 on white: ``train`` or ``holdout``; variants of one emoji are always on the same side."""
    asset = resources.files("unrote.data").joinpath("assets/emoji.npz")
    with asset.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        chosen = np.flatnonzero(arrays["holdout"] == (split == "holdout"))
        return in_memory_store(
            arrays["images"][chosen],
            source=f"emoji:{split}",
            names=[str(name) for name in arrays["names"][chosen]],
            labels=arrays["labels"][chosen],
            class_names=tuple(str(name) for name in arrays["class_names"]),
            captions=[str(caption) for caption in arrays["captions"][chosen]],
        )


def downloaded(name: str, split: str) -> Path:
    """The ``.npz`` or folder of a fetched set.

    Raises:
        InputError: It is not there; the message says which command gets it.
    """
    for path in (data_folder() / name / f"{split}.npz", data_folder() / name / split):
        if path.exists():
            return path
    raise InputError(f"{name} is not in {data_folder()}; get it with: unrote data get {name}")
