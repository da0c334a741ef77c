"""Dataset objects of other libraries: Hugging Face ``datasets`` and map-style torch datasets."""

import importlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unrote.data.decode import BadImage, DecodeSettings, decode_file, decode_stream, to_pixels
from unrote.data.sources import Sample, digest_of
from unrote.data.store import numbered
from unrote.errors import InputError, first_line

IMAGE_KEYS = ("image", "images", "img", "pixel_values")
LABEL_KEYS = ("label", "labels", "target", "class", "y")
TEXT_KEYS = ("text", "caption", "captions", "prompt")


class HuggingFaceSource:
    """The images of a ``datasets.Dataset``, with its ``ClassLabel`` and text column.

    The image column is the first with an ``Image`` feature. The text column is the one named text, caption or prompt,
    of strings or lists of strings, or else the only string column. Files are decoded by this package, so that a damaged
    one is quarantined like any other; transforms set on the dataset are not applied.

    Raises:
        InputError: Not a single map-style dataset, or no image column.
    """

    thread_safe = True
    ignored = 0

    def __init__(self, dataset: Any, description: str) -> None:
        self.description = description
        self.rejected: list[tuple[str, str]] = []
        features = _single_dataset(dataset, description).features
        kinds = {column: type(feature).__name__ for column, feature in features.items()}
        image = next((column for column, kind in kinds.items() if kind == "Image"), None)
        if image is None:
            raise InputError(f"{description} has no image column, only {', '.join(kinds) or 'nothing'}")
        self._image = image
        self._label = next((column for column, kind in kinds.items() if kind == "ClassLabel"), None)
        self.class_names = None if self._label is None else tuple(features[self._label].names)
        texts = [column for column, feature in features.items() if getattr(feature, "dtype", None) == "string"]
        lists = [column for column, feature in features.items() if _lists_strings(feature)]
        named = [column for column in TEXT_KEYS if column in texts or column in lists]
        self._text = next(iter(named), texts[0] if len(texts) == 1 else None)
        self._original = dataset
        undecoded = type(features[image])(decode=False)
        columns = [column for column in (image, self._label, self._text) if column is not None]
        self._dataset = dataset.with_format(None).select_columns(columns).cast_column(image, undecoded)
        self._names = numbered(len(dataset))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The position."""
        return self._names[index]

    def load(self, index: int, settings: DecodeSettings) -> Sample:
        """Decode the stored file of one row."""
        row = self._dataset[index]
        stored = row[self._image]
        if stored is None:
            raise BadImage("no image in this row")
        if stored["bytes"] is not None:
            pixels, first_frame = decode_stream(io.BytesIO(stored["bytes"]), settings)
        else:
            pixels, first_frame = decode_file(stored["path"], settings)
        label = None if self._label is None else row[self._label]
        text, *more = (None,) if self._text is None else _captions(row[self._text]) or ("",)
        return Sample(pixels, None if label is None or label < 0 else label, text, first_frame, tuple(more))

    def key(self) -> str | None:
        """The dataset's own fingerprint; None if it only points to files, which may change behind it."""
        stored = self._dataset.data.column(self._image).combine_chunks()
        if stored.field("bytes").null_count:
            return None
        return digest_of("datasets", self._original._fingerprint, len(self))


class MapDatasetSource:
    """Any object with ``len`` and ``[index]``, such as a ``torch.utils.data.Dataset``.

    An item is an image (PIL, array or tensor, see :func:`~unrote.data.decode.to_pixels`), a tuple that starts with one
    and goes on with a label or caption, or a dict with both under the usual names. Items are read once, in order, in
    this thread: an augmentation inside the dataset is frozen by that, so leave it out.
    """

    thread_safe = False
    ignored = 0

    def __init__(self, dataset: Any, description: str) -> None:
        self.description = description
        self.rejected: list[tuple[str, str]] = []
        classes = getattr(dataset, "classes", None)
        listed = isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes)
        self.class_names = tuple(classes) if listed and classes is not None else None
        self._dataset = dataset
        self._names = numbered(len(dataset))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The position."""
        return self._names[index]

    def load(self, index: int, settings: DecodeSettings) -> Sample:
        """Take one item apart."""
        try:
            item = self._dataset[index]
        except Exception as error:  # whatever a dataset raises for one item means that this item is not usable
            raise BadImage(f"the dataset raised {type(error).__name__}: {error}") from error
        image, label, captions = _take_apart(item)
        return Sample(to_pixels(image, settings), label, next(iter(captions), None), more_captions=captions[1:])

    def key(self) -> None:
        """Nothing but reading every item shows what it holds."""


def load_saved(folder: Path, description: str) -> HuggingFaceSource:
    """A folder made by ``Dataset.save_to_disk``."""
    library = _datasets_library(description)
    try:
        return HuggingFaceSource(library.load_from_disk(str(folder)), description)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {folder} as a saved dataset: {error}") from error


def load_from_hub(description: str) -> HuggingFaceSource:
    """``hf:owner/name`` or ``hf:owner/name:split`` (split ``train`` when left out).

    Raises:
        InputError: The library is not installed, or the dataset cannot be had.
    """
    library = _datasets_library(description)
    name, _, split = description.removeprefix("hf:").partition(":")
    try:
        dataset = library.load_dataset(name, split=split or "train")
    except Exception as error:  # network, missing dataset, wrong split: the library raises many kinds
        raise InputError(
            f"cannot load {description} from the Hugging Face Hub: {first_line(error)}; offline, give a folder instead"
        ) from error
    return HuggingFaceSource(dataset, description)


def is_hugging_face(data: Any) -> bool:
    """Whether ``data`` is an object of the ``datasets`` library."""
    return type(data).__module__.partition(".")[0] == "datasets"


def _datasets_library(description: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise InputError(f"{description} needs the datasets library: pip install 'unrote[hf]'") from error


def _single_dataset(dataset: Any, description: str) -> Any:
    if isinstance(dataset, Mapping):
        raise InputError(f"{description} holds the splits {', '.join(dataset)}; give one of them")
    if not hasattr(dataset, "select_columns") or not hasattr(dataset, "__len__"):
        raise InputError(f"{description} is a streaming dataset; load it without streaming")
    return dataset


def _take_apart(item: Any) -> tuple[Any, int | None, tuple[str, ...]]:
    if isinstance(item, Mapping):
        image = next((item[key] for key in IMAGE_KEYS if key in item), None)
        label = next((item[key] for key in LABEL_KEYS if key in item), None)
        caption = next((item[key] for key in TEXT_KEYS if key in item), None)
        if image is None:
            raise BadImage(f"no image under {', '.join(IMAGE_KEYS)}, only {', '.join(map(str, item))}")
        return image, _label(label), _captions(caption)
    if isinstance(item, tuple | list) and item:
        rest = item[1:]
        labels = [label for label in map(_label, rest) if label is not None]
        captions = [found for found in map(_captions, rest) if found]
        return item[0], next(iter(labels), None), next(iter(captions), ())
    return item, None, ()


def _label(value: Any) -> int | None:
    if isinstance(value, Image.Image | str) or value is None or getattr(value, "ndim", 0) != 0:
        return None
    try:
        number = value.__index__()
    except (AttributeError, TypeError):
        return None
    return number if number >= 0 else None


def _captions(value: Any) -> tuple[str, ...]:
    """Of a text, or of a list of texts."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        return ()
    return tuple(text for text in value if isinstance(text, str))


def _lists_strings(feature: Any) -> bool:
    return getattr(getattr(feature, "feature", None), "dtype", None) == "string"
