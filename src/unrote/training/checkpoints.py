"""Checkpoints: whole or absent, verified by checksum, the newest good one is used."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from unrote.errors import InputError
from unrote.files import fsync, parse_json, read_back, sha256_file, write_json
from unrote.method.peers import Alone, Peers
from unrote.method.slots import FolderSlots, MemorySlots
from unrote.tensorfiles import load_state, save_state

logger = logging.getLogger("unrote")


class Checkpoints:
    """A folder of checkpoints; each is a manifest of checksums that names the files it consists of.

    A checkpoint is its own state file and the files of the proxies that were not live. The manifest is written last, so
    a checkpoint without one, or with a file that does not match, is not used.

    Args:
        folder: made if it does not exist.
        slots: the proxies' files.
        limit: how many checkpoints are kept.
        peers: the processes that have files of proxies; all save and load at once.
    """

    def __init__(self, folder: Path, slots: FolderSlots | MemorySlots, limit: int, peers: Peers | None = None) -> None:
        assert isinstance(slots, FolderSlots)
        self._folder, self._slots, self._limit, self._peers = folder, slots, limit, peers or Alone()
        self._checksums: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, read it back, and then remove the oldest beyond the limit.

        Every process brings the files of its own proxies onto the disk; the first writes ``state`` and the manifest.

        Raises:
            InputError: if the disk has something else than was written.
        """
        everyone = self._peers.gather(self._own_checksums())
        pinned: list[str] = []
        if self._peers.rank == 0:
            path = self._folder / f"{step:09d}.safetensors"
            checksum = save_state(path, state)
            _compare(path, checksum)
            proxies = {name: checksum for one in everyone for name, checksum in one.items()}
            manifest = {"step": step, "state": checksum, "proxies": dict(sorted(proxies.items()))}
            write_json(path.with_suffix(".json"), manifest)
            read_back(path.with_suffix(".json"))
            if _manifest(path.with_suffix(".json")) != manifest:
                raise _unsound(path.with_suffix(".json"))
            pinned = self._prune(path.stem)
        self._slots.pin(self._peers.gather(pinned)[0])
        self._checksums = {name: self._checksums[name] for name in self._slots.files()}

    def _own_checksums(self) -> dict[str, str]:
        names = self._slots.files()
        for name in names:
            if name not in self._checksums:
                _compare(self._slots.folder / name, self._slots.checksums[name])
                self._checksums[name] = self._slots.checksums[name]
        fsync(self._slots.folder)
        return {name: self._checksums[name] for name in names}

    def load_newest(self) -> dict[str, Any] | None:
        """The state of the newest whole checkpoint; None if there has never been one.

        Raises:
            InputError: if there are checkpoints and none is whole.
        """
        names = self._peers.gather(sorted((path.name for path in self._folder.glob("*.json")), reverse=True))[0]
        problems = []
        for path in (self._folder / name for name in names):
            found = self._peers.gather(self._problem_of(path))
            problem = next((one for one in found if one is not None), None)
            if problem is None:
                self._checksums = _manifest(path)["proxies"]
                state: dict[str, Any] = load_state(path.with_suffix(".safetensors"))
                return state
            logger.warning("checkpoint %s is damaged (%s): using the one before", path.stem, problem)
            problems.append(f"{path.stem}: {problem}")
        if problems:
            raise InputError(
                f"{self._folder}: no checkpoint is whole ({'; '.join(problems)}). "
                "Restore the files from a backup, or train into a new folder"
            )
        return None

    def clear_away(self) -> None:
        """Remove the files of proxies that no checkpoint names and nobody uses; every process must call it at once.

        A run that goes on from its last checkpoint and only writes its outputs saves no other, which would do it.
        """
        self._slots.pin(self._peers.gather(self._named() if self._peers.rank == 0 else [])[0])

    def finish(self) -> None:
        """The first process removes what no checkpoint names, also of the others: nobody writes any more.

        One that was killed before it did so itself would leave it for good, since a finished run is not gone on with.
        """
        FolderSlots(self._slots.folder).pin(self._named())

    def _named(self) -> list[str]:
        named: set[str] = set()
        for path in self._folder.glob("*.json"):
            with suppress(ValueError):
                named |= _manifest(path)["proxies"].keys()
        return sorted(named)

    def _problem_of(self, manifest_path: Path) -> str | None:
        try:
            manifest = _manifest(manifest_path)
            files = {manifest_path.with_suffix(".safetensors"): manifest["state"]}
            files |= {self._slots.folder / name: checksum for name, checksum in manifest["proxies"].items()}
            # The processes share the reading.
            for path, checksum in list(files.items())[self._peers.rank :: self._peers.size]:
                if sha256_file(path) != checksum:
                    return f"{path.name} does not match its checksum"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (ValueError, OSError):
            return f"{manifest_path.name} can't be read"
        return None

    def _prune(self, newest: str) -> list[str]:
        """Remove the oldest checkpoints; the proxies' files that the others need."""
        # What is newer than the newest was damaged and gone back from: it must not take the place of a whole one.
        kept = sorted(path for path in self._folder.glob("*.json") if path.stem <= newest)[-self._limit :]
        names = {path.stem for path in kept}
        # A manifest goes before its files, so that none ever names a file that was removed on purpose.
        for path in sorted(self._folder.iterdir(), key=lambda path: path.suffix != ".json"):
            if path.stem not in names:
                path.unlink(missing_ok=True)
        pinned: set[str] = set()
        for path in kept:
            try:
                pinned |= _manifest(path)["proxies"].keys()
            except ValueError:
                path.unlink(missing_ok=True)
        return sorted(pinned)


def _compare(path: Path, checksum: str) -> None:
    if read_back(path) != checksum:
        raise _unsound(path)


def _unsound(path: Path) -> InputError:
    return InputError(
        f"{path}: the disk has something else than was written; see that it is sound. Checkpoints from before are "
        "kept, and the same command goes on from there"
    )


def _manifest(path: Path) -> dict[str, Any]:
    """Checksums: ``state``, and ``proxies`` by the name of their file. Raises ValueError if it is no manifest."""
    found = parse_json(path.read_bytes())
    proxies = found.get("proxies") if isinstance(found, dict) and "state" in found else None
    if not isinstance(proxies, dict) or any(Path(name).name != name for name in proxies):
        raise ValueError("it is no manifest")
    return cast(dict[str, Any], found)
