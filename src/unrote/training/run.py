"""The run folder: everything about one training run, and all that a later command needs to know of it."""

import csv
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from unrote.config import Config, changed_keys, parse, read_yaml
from unrote.data.store import ImageStore
from unrote.errors import InputError
from unrote.files import parse_json, read_object, remove_leftovers, write_json, write_text
from unrote.ownership import Ownership

logger = logging.getLogger("unrote")


class Run:
    """A run folder.

    ``config.yaml``, ``data.json`` and ``base.json`` say what is trained on what; ``log.jsonl`` how it went;
    ``checkpoints/`` and ``proxies/`` are for going on; ``snapshots/`` are models from along the way; ``model/`` (a
    diffusers pipeline), ``ledger.csv``, ``README.md`` and ``run.json`` are there when the run has ended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ownership = Ownership(path / ".lock", f"{path}: another process is training in this folder")

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def model_folder(self) -> Path:
        """The diffusers pipeline folder."""
        return self.path / "model"

    def snapshot_folder(self, samples: int) -> Path:
        """The diffusers pipeline folder of the model after so many samples seen."""
        return self.path / "snapshots" / f"{samples:012d}"

    @property
    def finished(self) -> bool:
        """Whether training has ended and everything is written."""
        return (self.path / "run.json").exists()

    @property
    def config(self) -> Config:
        """What is trained, with which settings. Raises InputError if the folder is not a run."""
        file = self.path / "config.yaml"
        if not file.exists():
            raise InputError(f"{self.path}: is not a run folder (it has no config.yaml)")
        return parse(read_yaml(file), str(file))

    @property
    def data(self) -> dict[str, Any]:
        """Fingerprint, counts and shape of the training set. Raises InputError if the file is damaged."""
        file = self.path / "data.json"
        try:
            values = parse_json(file.read_bytes())
            if isinstance(values["fingerprint"], str) and len(values["shape"]) == 3 and values["count"] > 0:
                return dict(values)
        except (ValueError, KeyError, TypeError):
            pass
        raise InputError(f"{file}: is damaged; restore it, or train into a new folder")

    def start(self, config: Config, images: ImageStore) -> None:
        """Begin a run in the locked folder, or check that it is one of exactly this configuration and these images.

        What killed processes left half written is removed: no other process may be writing in the folder yet.

        Raises:
            InputError: naming the changed keys, or if the images have changed.
        """
        for folder in ("", "checkpoints", "proxies", "snapshots", "monitor"):
            remove_leftovers(self.path / folder)
        data = describe_data(images)
        if (self.path / "config.yaml").exists():
            self._check_unchanged(config, data)
            return
        write_json(self.path / "data.json", data)
        lines = [json.dumps({"name": bad.name, "reason": bad.reason}) for bad in images.quarantined]
        write_text(self.path / "quarantine.jsonl", "".join(line + "\n" for line in lines))
        # The configuration comes last: it is what makes the folder a run.
        write_text(self.path / "config.yaml", config.to_yaml())

    def _check_unchanged(self, config: Config, data: Mapping[str, Any]) -> None:
        changed = changed_keys(self.config, config)
        if changed:
            raise InputError(
                f"{self.path}: was started with another configuration ({'; '.join(changed)}). "
                "Give the same command to go on, or another --out"
            )
        if self.data["fingerprint"] != data["fingerprint"]:
            raise InputError(
                f"{self.path}: the images in {config.data.source} are not those the run was started on "
                f"({self.data['count']} then, {data['count']} now). Restore them to go on, or choose another --out"
            )

    def keep_base(self, weights: Mapping[str, str]) -> None:
        """Note the pretrained model, SHA-256 of its networks by name, or check that it is the one noted.

        Raises:
            InputError: it is another, naming the networks that differ.
        """
        file = self.path / "base.json"
        if not file.exists():
            if weights:
                write_json(file, dict(weights))
            return
        noted = read_object(file, "restore it to go on, or choose another --out")
        changed = sorted(name for name in noted.keys() | weights.keys() if noted.get(name) != weights.get(name))
        if changed:
            raise InputError(
                f"model.pretrained: {self.config.model.pretrained} is not the model that {self.path} was started from "
                f"({', '.join(changed)} differ). Restore it to go on, or choose another --out"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep other processes out of it.

        Raises:
            InputError: if another process trains there, or the folder holds something else; that is left as it is.
        """
        begun = any((self.path / name).exists() for name in (".lock", "config.yaml"))
        if not begun and self.path.exists() and (not self.path.is_dir() or any(self.path.glob("[!.]*"))):
            raise InputError(f"--out {self.path}: is not empty and is not a run folder; choose another")
        self.path.mkdir(parents=True, exist_ok=True)
        with self.ownership.held():
            yield

    def write_ledger(self, columns: Mapping[str, np.ndarray], names: Any) -> None:
        """Write ``ledger.csv``: one line per training image, empty where a ratio was never measured."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["index", "name", *columns])
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        for index, (name, row) in enumerate(zip(names, rows, strict=True)):
            writer.writerow([index, name, *("" if value != value else _short(value) for value in row)])
        write_text(self.path / "ledger.csv", text.getvalue())

    def read_ledger(self) -> dict[str, np.ndarray] | None:
        """The columns of ``ledger.csv`` without index and name, NaN where never measured; None if there is none yet.

        Raises:
            InputError: if the file is damaged.
        """
        file = self.path / "ledger.csv"
        if not file.exists():
            return None
        try:
            with file.open(newline="", encoding="utf-8") as stream:
                return _columns_of(stream)
        except (ValueError, OverflowError, csv.Error) as error:
            raise InputError(f"{file}: is no ledger, or is damaged ({error})") from None


def _columns_of(stream: TextIO) -> dict[str, np.ndarray]:
    header, *rows = csv.reader(stream)
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    return {
        name: np.array([float(value or "nan") for value in column], dtype=np.float32)
        if name.endswith("ratio")
        else np.array(column, dtype=np.int64)
        for name, column in columns.items()
        if name not in ("index", "name")
    }


def _short(value: float) -> str:
    # Nine digits bring back the same float32.
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def describe_data(images: ImageStore) -> dict[str, Any]:
    """What ``data.json`` says of a training set."""
    count, height, width, channels = images.images.shape
    return {
        "source": images.source,
        "fingerprint": images.fingerprint,
        "count": count,
        "shape": [height, width, channels],
        "classes": list(images.class_names or ()),
        "quarantined": len(images.quarantined),
    }


class Log:
    """``log.jsonl``: a line per interval. On resuming it is cut back to what the checkpoint knows.

    Args:
        path: the file.
        length: bytes to keep.
    """

    def __init__(self, path: Path, length: int) -> None:
        self._file = path.open("ab")
        # Somebody may have removed the file meanwhile: to truncate to more than there is would fill it with zeros.
        self._file.truncate(min(length, self._file.seek(0, os.SEEK_END)))
        self._file.seek(0, os.SEEK_END)

    @property
    def length(self) -> int:
        """Bytes so far."""
        return self._file.tell()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line."""
        self._file.write((json.dumps(record) + "\n").encode())
        self._file.flush()

    def sync(self) -> None:
        """Make the lines so far survive a power cut, as the checkpoint that knows of them does."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
