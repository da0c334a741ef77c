"""Where proxies wait while they are not live: in memory, or in immutable files that checkpoints can refer to."""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from unrote.tensorfiles import Stored, clone_state, load_state, save_state


class Slots(Protocol):
    """Named states."""

    def put(self, name: str, state: dict[str, Any]) -> None:
        """Keep ``state`` under ``name`` in place of the one before."""

    def __contains__(self, name: str) -> bool: ...

    def get(self, name: str, parts: Sequence[str] | None = None) -> Stored:
        """The state under ``name``, or its ``parts`` only; to be read before the next one is put."""

    def drop(self, name: str) -> None:
        """Forget the state under ``name``, if there is one."""

    def expect(self, name: str) -> None:
        """The state under ``name``, if there is one, will be needed soon: read it meanwhile, without waiting for it."""

    def fetch(self, name: str, path: Path) -> None:
        """Have under ``name`` what a process, maybe this one, wrote into a file of a :class:`FolderSlots`."""


class MemorySlots:
    """Named states in CPU memory."""

    def __init__(self) -> None:
        self._states: dict[str, Any] = {}

    def put(self, name: str, state: dict[str, Any]) -> None:
        """Keep a copy of ``state`` under ``name``, in the memory of the one before."""
        self._states[name] = Stored.of(state).into(self._states.get(name))

    def __contains__(self, name: str) -> bool:
        return name in self._states

    def get(self, name: str, parts: Sequence[str] | None = None) -> Stored:
        """The state under ``name``, or its ``parts`` only; to be read before the next one is put.

        Raises:
            KeyError: if there is none.
        """
        stored = Stored.of(self._states[name])
        return stored if parts is None else stored.parts(parts)

    def drop(self, name: str) -> None:
        """Forget the state under ``name``, if there is one."""
        self._states.pop(name, None)

    def expect(self, name: str) -> None:
        """It is in memory."""

    def fetch(self, name: str, path: Path) -> None:
        """Read the file into memory."""
        self._states[name] = load_state(path)

    def state_dict(self) -> dict[str, Any]:
        """All states."""
        return clone_state(self._states)  # type: ignore[no-any-return]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._states = clone_state(state)


class FolderSlots:
    """Named states in files that are never rewritten: a new version of a state is a new file.

    So a checkpoint need only name the files it goes with. Old versions go at once, but for those named in ``pinned``.
    Several processes may share a folder if each has names of its own.

    Args:
        folder: made if it does not exist.
        names: those of this process, whose files it takes over and clears away; None is all.

    Attributes:
        checksums: hex SHA-256, by file, of what was written into those that hold the current states.
    """

    def __init__(self, folder: Path, names: Iterable[str] | None = None) -> None:
        self.folder = folder
        self._names = None if names is None else frozenset(names)
        self.pinned: frozenset[str] = frozenset()
        self._files: dict[str, str] = {}
        self.checksums: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)
        # After whatever an earlier process left: its checkpoints may name those files.
        self._version = max((int(path.stem.rpartition(".")[2]) for path in folder.glob("*.safetensors")), default=0)

    def put(self, name: str, state: dict[str, Any]) -> None:
        """Write ``state`` as the newest version of ``name``; durable only after a checkpoint syncs it."""
        self._version += 1
        old, new = self._files.get(name), f"{name}.{self._version:08d}.safetensors"
        self.checksums[new] = save_state(self.folder / new, state, durable=False)
        self._files[name] = new
        self._remove(old)

    def drop(self, name: str) -> None:
        """Forget the state under ``name``, if there is one."""
        self._remove(self._files.pop(name, None))

    def _remove(self, file: str | None) -> None:
        self.checksums.pop(file or "", None)
        if file is not None and file not in self.pinned:
            (self.folder / file).unlink(missing_ok=True)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def get(self, name: str, parts: Sequence[str] | None = None) -> Stored:
        """The newest state under ``name``, or only its ``parts``; to be read before the next one is put.

        Raises:
            KeyError: if there is none.
        """
        stored = Stored.at(self.folder / self._files[name])
        return stored if parts is None else stored.parts(parts)

    def expect(self, name: str) -> None:
        """The system reads the file into its cache, from where it is as quick as memory, if it can be asked to."""
        if name in self._files and hasattr(os, "posix_fadvise"):
            with suppress(OSError), (self.folder / self._files[name]).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def fetch(self, name: str, path: Path) -> None:
        """The file is here already."""

    def files(self) -> list[str]:
        """Names of the files that hold the current states."""
        return sorted(self._files.values())

    def pin(self, files: Iterable[str]) -> None:
        """Keep ``files``, which checkpoints name; remove every other one that is not current."""
        self.pinned = frozenset(files)
        wanted = self.pinned | set(self._files.values())
        for path in self.folder.iterdir():
            if path.name not in wanted and self._owns(path.name.lstrip(".").partition(".")[0]):
                path.unlink(missing_ok=True)

    def _owns(self, name: str) -> bool:
        return self._names is None or name in self._names

    def state_dict(self) -> dict[str, Any]:
        """The names of the current files."""
        return {"files": dict(self._files), "version": self._version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; the files must still be there, and are pinned until the next pin."""
        self._files = {name: file for name, file in state["files"].items() if self._owns(name)}
        self._version = max(self._version, state["version"])
        # Until there is a newer checkpoint, this one may be needed again.
        self.pinned = frozenset(state["files"].values())
