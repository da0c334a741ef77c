"""Arrays, .npz files, Hugging Face and torch datasets, and stores themselves as input."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from unrote.data import open_images
from unrote.errors import InputError


@pytest.fixture(autouse=True)
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNROTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stores"


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def test_array_is_used_as_it_is(images: np.ndarray, stores: Path) -> None:
    store = open_images(images, resolution=8)
    assert store.images is images or np.shares_memory(store.images, images)
    assert list(store.names)[:2] == ["000000", "000001"] and store.source == "array"
    assert not stores.exists()
    grey = open_images(images[..., 0], resolution=8, channels=1)
    assert grey.images.shape == (6, 8, 8, 1)


def test_array_of_another_size_or_type_is_converted(images: np.ndarray) -> None:
    assert open_images(images, resolution=4).images.shape == (6, 4, 4, 3)
    assert open_images(images, resolution=8, channels=1).images.shape == (6, 8, 8, 1)
    assert np.array_equal(open_images(images / 255.0, resolution=8).images, images)
    assert np.array_equal(open_images(np.moveaxis(images, 3, 1), resolution=8).images, images)
    with pytest.raises(InputError, match=r"\[N, H, W, C\], not \[6, 8\]"):
        open_images(images[:, :, 0, 0], resolution=8)
    with pytest.raises(InputError, match="leave out Normalize"):
        open_images(images / 127.5 - 1, resolution=8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("key", ["images", "arr_0", "x"])
def test_npz(images: np.ndarray, tmp_path: Path, save: Any, key: str) -> None:
    save(
        tmp_path / "a.npz",
        **{key: images},
        labels=np.arange(6) % 2,
        captions=np.array(list("abcdéf")),
        class_names=np.array(["x", "y"]),
    )
    store = open_images(str(tmp_path / "a.npz"), resolution=8)
    assert np.array_equal(store.images, images)
    assert store.labels is not None and store.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert store.captions == list("abcdéf") and store.class_names == ("x", "y")
    assert open_images(tmp_path / "a.npz", resolution=8).fingerprint == store.fingerprint


def test_npz_is_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.array([{"any": "object"}], dtype=object))
    with pytest.raises(InputError, match=r"a\.npz"):
        open_images(tmp_path / "a.npz", resolution=8)
    np.savez(tmp_path / "b.npz", images=np.zeros((1, 8, 8), np.uint8), captions=np.array([["x"]], dtype=object))
    with pytest.raises(InputError, match=r"b\.npz"):
        open_images(tmp_path / "b.npz", resolution=8)


def test_unusable_npz(images: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, photos=images)
    with pytest.raises(InputError, match="holds photos, but no images"):
        open_images(path, resolution=8)
    np.savez(path, images=images, labels=np.arange(5))
    with pytest.raises(InputError, match=r"labels must be integers \[6\]"):
        open_images(path, resolution=8)
    np.savez(path, images=images, captions=np.array(["a"]))
    with pytest.raises(InputError, match="1 captions for 6 images"):
        open_images(path, resolution=8)
    np.savez(path, images=images[0, 0])
    with pytest.raises(InputError, match="not images"):
        open_images(path, resolution=8)
    np.savez(path, images=np.tile(images, (100, 1, 1, 1)))
    content = bytearray(path.read_bytes())
    content[60_000] ^= 255
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npz, image 5\d\d: the archive is damaged"):
        open_images(path, resolution=8)
    path.write_bytes(content[:300])
    with pytest.raises(InputError, match=r"as \.npz"):
        open_images(path, resolution=8)
    path.write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"as \.npz: File is not a zip file"):
        open_images(path, resolution=8)


def hugging_face(images: np.ndarray, **columns: Any) -> datasets.Dataset:
    rows = {"image": [Image.fromarray(image) for image in images]} | columns
    features = datasets.Features(
        {
            "image": datasets.Image(),
            **({"label": datasets.ClassLabel(names=["x", "y"])} if "label" in columns else {}),
            **{name: datasets.Value("string") for name in columns if name != "label"},
        }
    )
    return datasets.Dataset.from_dict(rows, features=features)


def test_hugging_face_dataset(images: np.ndarray, tmp_path: Path, stores: Path) -> None:
    dataset = hugging_face(images, label=[0, 1] * 3, path=list("uvwxyz"), text=["a", "b", None, "d", "e", "f"])
    store = open_images(dataset, resolution=8)
    assert np.array_equal(store.images, images)
    assert store.class_names == ("x", "y") and store.labels is not None and store.labels.tolist() == [0, 1] * 3
    assert store.captions == ["a", "b", "", "d", "e", "f"]
    open_images(dataset.select([1, 0]).with_format("torch"), resolution=8)
    assert np.array_equal(open_images(dataset.select([1, 0]), resolution=8).images, images[[1, 0]])
    before = len(list(stores.glob("*/meta.json")))
    open_images(dataset, resolution=8)
    assert len(list(stores.glob("*/meta.json"))) == before
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert open_images(str(tmp_path / "saved"), resolution=8).fingerprint == store.fingerprint


def test_hugging_face_columns_are_found_by_type(images: np.ndarray) -> None:
    dataset = hugging_face(images, anything=list("abcdef")).rename_column("image", "jpg")
    store = open_images(dataset, resolution=8)
    assert store.captions == list("abcdef") and store.labels is None
    assert open_images(hugging_face(images, one=list("abcdef"), two=list("abcdef")), resolution=8).captions is None
    assert open_images(hugging_face(images, label=[0, 1, -1, 0, 1, 0]), resolution=8).labels is None


def test_hugging_face_lists_of_captions(images: np.ndarray) -> None:
    dataset = hugging_face(images, path=list("uvwxyz"))
    lists = [["a", "b"], ["c"], [], None, ["d", "e", "f"], [""]]
    feature = datasets.Sequence(datasets.Value("string"))
    store = open_images(dataset.add_column("captions", lists, feature=feature), resolution=8)
    assert store.every_caption() == [["a", "b"], ["c"], [""], [""], ["d", "e", "f"], [""]]


def test_hugging_face_files_may_be_bad_and_may_change(images: np.ndarray, tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, image in zip(paths, images, strict=False):
        Image.fromarray(image).save(path)
    paths[1].write_bytes(b"junk")
    dataset = datasets.Dataset.from_dict({"image": [str(path) for path in paths]})
    dataset = dataset.cast_column("image", datasets.Image())
    store = open_images(dataset, resolution=8)
    assert np.array_equal(store.images, images[[0, 2]])
    assert [(item.name, item.reason) for item in store.quarantined] == [("000001", "not an image of a known format")]
    Image.fromarray(images[5]).save(paths[1])
    assert np.array_equal(open_images(dataset, resolution=8).images, images[[0, 5, 2]])


def test_unusable_hugging_face_data(images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no image column, only a"):
        open_images(datasets.Dataset.from_dict({"a": [1]}), resolution=8)
    splits = datasets.DatasetDict({"train": hugging_face(images), "test": hugging_face(images)})
    with pytest.raises(InputError, match="holds the splits train, test"):
        open_images(splits, resolution=8)
    splits.save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(InputError, match=r"saved DatasetDict; name one split, such as .*dict/test"):
        open_images(tmp_path / "dict", resolution=8)
    with pytest.raises(InputError, match="streaming"):
        open_images(hugging_face(images).to_iterable_dataset(), resolution=8)


class Pairs(torch.utils.data.Dataset[Any]):
    """A map-style dataset with whatever items it is given."""

    classes = ("x", "y")

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


def chw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def test_torch_datasets(images: np.ndarray) -> None:
    pil, chw_bytes = [Image.fromarray(image) for image in images], [chw(image) for image in images]
    floats = [tensor.float() / 255 for tensor in chw_bytes]
    for items in (pil, list(images), chw_bytes, floats, [(image,) for image in pil]):
        store = open_images(Pairs(items), resolution=8)
        assert np.array_equal(store.images, images) and store.labels is None and store.captions is None
    for one in (1, np.int64(1), torch.tensor(1)):
        store = open_images(Pairs([(image, one) for image in floats]), resolution=8)
        assert store.labels is not None and store.labels.tolist() == [1] * 6 and store.class_names == ("x", "y")
    items = [{"pixel_values": image, "label": index, "text": f"n{index}"} for index, image in enumerate(floats)]
    store = open_images(Pairs(items), resolution=8)
    assert store.captions == [f"n{index}" for index in range(6)]
    assert store.labels is not None and store.labels.tolist() == list(range(6))
    several = open_images(Pairs([(image, ["c", "d"]) for image in pil]), resolution=8)
    assert several.captions == ["c"] * 6 and several.every_caption() == [["c", "d"]] * 6
    assert np.array_equal(open_images(torch.stack(chw_bytes), resolution=8).images, images)
    assert np.array_equal(open_images(torch.utils.data.Subset(Pairs(pil), [2, 0]), resolution=8).images, images[[2, 0]])


def test_torch_dataset_with_bad_items(images: np.ndarray) -> None:
    store = open_images(Pairs([images[0], OSError("gone"), images[1] * 2.0, {"a": 1}, images[2]]), resolution=8)
    assert np.array_equal(store.images, images[[0, 2]])
    found = {item.name: item.reason for item in store.quarantined}
    assert found["000001"] == "the dataset raised OSError: gone"
    assert "not [0, 1]" in found["000002"] and "no image under" in found["000003"]


def test_store_as_input(images: np.ndarray) -> None:
    store = open_images(Pairs([(image, index % 2) for index, image in enumerate(images)]), resolution=8)
    assert open_images(store, resolution=8) is store and open_images(store, resolution=None) is store
    smaller = open_images(store.subset([4, 1]), resolution=4)
    assert smaller.images.shape == (2, 4, 4, 3) and smaller.names == ["000004", "000001"]
    assert smaller.labels is not None and smaller.labels.tolist() == [0, 1] and smaller.class_names == ("x", "y")


def test_wrong_arguments() -> None:
    for arguments, message in (
        ({"resolution": 0}, "resolution must be at least 1"),
        ({"resolution": 8, "channels": 4}, "channels must be 1 or 3"),
        ({"resolution": 8, "limit": 0}, "limit must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            open_images("emoji", **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cannot read images from float"):
        open_images(3.5, resolution=8)
