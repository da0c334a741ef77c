"""One file over HTTP, resumable: after a cut connection or a stopped process only what is missing is fetched."""

import fcntl
import http.client
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

from tqdm import tqdm

from unrote.errors import InputError

log = logging.getLogger("unrote")

_BLOCK = 1 << 18
_TIMEOUT = 30.0
_FRUITLESS = 4  # attempts in a row that bring nothing


def download(url: str, path: Path, *, size: int | None = None, wait: float = 1.0) -> Path:
    """Fetch ``url`` into ``path`` by way of ``path.part``, which a later call goes on from.

    Args:
        url: Where the file is.
        path: Where it goes; returned at once if it is there already.
        size: Bytes the file must have, if known.
        wait: Seconds before the second attempt; doubled for each further one.

    Raises:
        InputError: The server cannot be reached, keeps failing, or has a file of another size.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with _exclusive(part) as file, tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
        fruitless = 0
        while True:
            before = file.seek(0, 2)
            bar.n = before
            try:
                total = _attempt(url, file, size, bar)
            except (OSError, http.client.HTTPException) as error:
                fruitless = 0 if file.seek(0, 2) > before else fruitless + 1
                if fruitless >= _FRUITLESS or _final(error):
                    raise InputError(f"cannot download {url}: {_words(error)}") from error
                log.info("%s: %s; going on at byte %s", path.name, _words(error), f"{file.tell():,}")
                time.sleep(wait * 2**fruitless)
                continue
            if size is not None and total != size:
                part.unlink()
                raise InputError(f"{url} has {total:,} bytes, expected {size:,}")
            part.rename(path)
            return path


def _attempt(url: str, file: BinaryIO, size: int | None, bar: "tqdm[NoReturn]") -> int:
    """Append what is missing to ``file``; returns its whole size or raises if the connection ended early."""
    have = file.seek(0, 2)
    if size is not None and have >= size:
        return have
    request = urllib.request.Request(
        url, headers={"User-Agent": "unrote"} | ({"Range": f"bytes={have}-"} if have else {})
    )
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return have
        if error.code == 416:
            file.truncate(0)
            raise ConnectionError("the part on disk does not fit the file on the server") from error
        raise
    with response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0
            file.truncate(0)
            bar.n = 0
        length = response.headers.get("Content-Length")
        while block := response.read(_BLOCK):
            file.write(block)
            bar.update(len(block))
    file.flush()
    arrived = file.seek(0, 2)
    if length is not None and arrived != have + int(length):
        raise ConnectionError("the connection ended early")
    return arrived


@contextmanager
def _exclusive(part: Path) -> Iterator[BinaryIO]:
    with part.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{part} is being downloaded by another process") from error
        try:
            yield file
        finally:
            if part.exists() and part.stat().st_size == 0:
                part.unlink()


def _final(error: Exception) -> bool:
    """Whether asking again cannot help: no such host, no such file."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in (400, 401, 403, 404, 410)
    return isinstance(error, urllib.error.URLError) and not isinstance(error.reason, TimeoutError | ConnectionError)


def _words(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    return str(error.reason if isinstance(error, urllib.error.URLError) else error) or type(error).__name__
