"""What fuzz.py watches while an input is read, by an audit hook of Python."""

import os
import sys
from pathlib import Path
from typing import Any


class Watch:
    """Forbids what no input may bring about."""

    def __init__(self, folder: Path) -> None:
        self.allowed, self.found, self.on = str(folder.resolve()), [], False
        sys.addaudithook(self._note)

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND) if flags else 0
            if (writes or (mode and set(mode) & set("wax+"))) and not isinstance(path, int):
                self._inside(event, path)
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._inside(event, args[1], args[-1])
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.chmod"):
            self._inside(event, args[0], args[-1])
        elif event in ("os.truncate", "shutil.rmtree"):
            self._inside(event, args[0])
        elif event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect"):
            self.found.append(f"{event} {args!r:.80}")

    def _inside(self, event: str, path: Any, folder: int = -1) -> None:
        # Where a tree is removed, its parts are named below a folder that is open.
        base = Path(f"/proc/self/fd/{folder}").readlink() if folder >= 0 else Path()
        real = os.path.realpath(base / os.fsdecode(path))
        if real not in (self.allowed, os.devnull) and not real.startswith(self.allowed + os.sep):
            self.found.append(f"{event} {real}")
