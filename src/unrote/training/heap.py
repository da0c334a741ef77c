"""Memory that a training step frees is kept for the next one."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory, for the whole process.

    Every step allocates and frees the same activations. By default glibc hands much of that memory back to the system,
    which must then clear every page of it again in the next step: up to a tenth of the time of a step on a CPU. Peak
    memory stays what it was; after training, the process keeps up to that much.

    Returns:
        Whether it took effect: only glibc has these settings.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Without mmap for large blocks: the limit above which they are mapped, and so handed back, can't be set freely
    # everywhere. -1 is never to shrink the heap.
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
