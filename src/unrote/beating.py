"""Signs of life from a thread, while a process does something else."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def beating(beat: Callable[[], object], seconds: float) -> Iterator[None]:
    """Inside the block, call ``beat`` every so many ``seconds`` in a thread, which has ended after it."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(seconds):
            beat()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
